"""How a grid is cut into windows and put together again, and the attention within them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..kernels import dot_product_attention
from ..kernels.backend import forced_backend
from ..kernels.dot_product_attention import SHORT
from ..kernels.masking import combine_masks, masked_softmax

# Bytes of scores that a CPU takes at once where it writes them out: they stay in its cache. A window whose
# scores are beyond the second number is left to PyTorch's fused attention, and one of few places never is.
_CHUNK, _LARGE = 2**20, 2**25
_JOINED = "b w h t d -> b w t (h d)"


@dataclass(frozen=True)
class Axis:
    """One axis of a grid, cut every `window` cells from `shift` on; what is before `shift` joins the last."""

    length: int
    window: int
    shift: int

    @property
    def count(self) -> int:
        return -(-self.length // self.window)

    @property
    def padding(self) -> int:
        return self.count * self.window - self.length

    def mask(self, device: torch.device) -> Tensor:
        """(count, window, window): whether two places of a window are neighbours, and the key no padding.

        Padding sees padding too, so that each place sees at least itself and no softmax is over nothing.
        """
        padded = self.length + self.padding
        cells = torch.arange(self.shift, self.shift + padded, device=device)
        # Numbers, not truths: inductor cannot compare those of two indices.
        turn = (cells // max(padded, 1)).unflatten(0, (self.count, self.window))  # 1 where rolled around
        padding = ((cells >= self.length) & (cells < padded)).unflatten(0, (self.count, self.window))
        same = turn[:, :, None] == turn[:, None, :]
        return same & (padding[:, :, None] | ~padding[:, None, :])


class Windows:
    """The windows of a grid. An axis that fits into one window is one, and is not shifted."""

    def __init__(self, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> None:
        self.rows, self.cols = (
            Axis(length, max(length, 1), 0) if length <= side else Axis(length, side, by)
            for length, side, by in zip(grid, window, shift, strict=True)
        )

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.window, self.cols.window

    def cut(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, windows, places, C)."""
        rows, cols = self.rows, self.cols
        image = tokens.unflatten(1, (rows.length, cols.length))
        if rows.padding or cols.padding:
            image = F.pad(image, (0, 0, 0, cols.padding, 0, rows.padding))
        if rows.shift or cols.shift:
            image = image.roll((-rows.shift, -cols.shift), (1, 2))
        return rearrange(image, "b (y r) (x c) d -> b (y x) (r c) d", **self._sizes)

    def join(self, windows: Tensor) -> Tensor:
        """(B, windows, places, C) -> (B, N, C), without the padding."""
        rows, cols = self.rows, self.cols
        image = rearrange(windows, "b (y x) (r c) d -> b (y r) (x c) d", **self._sizes)
        if rows.shift or cols.shift:
            image = image.roll((rows.shift, cols.shift), (1, 2))
        return image[:, : rows.length, : cols.length].flatten(1, 2)

    def mask(self, device: torch.device) -> Tensor | None:
        """(windows, places, places), True where the first sees the second; None where all see all."""
        if not any(axis.padding or axis.shift for axis in (self.rows, self.cols)):
            return None
        of_rows, of_cols = self.rows.mask(device), self.cols.mask(device)
        both = of_rows[:, None, :, None, :, None] & of_cols[None, :, None, :, None, :]
        return both.flatten(4, 5).flatten(2, 3).flatten(0, 1)

    @property
    def _sizes(self) -> dict[str, int]:
        rows, cols = self.rows, self.cols
        return {"y": rows.count, "x": cols.count, "r": rows.window, "c": cols.window}


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """(B, W, T, H D) of q, k and v (B, W, H, T, D), bias (H, T, T), mask (W, T, T), key_mask (B, W, T)."""
    batch, windows, heads, places, _ = q.shape
    scores = heads * places**2 * q.element_size()  # bytes a window
    if (
        q.device.type != "cpu"
        or torch.compiler.is_compiling()
        or forced_backend() is not None
        or scores > _LARGE
    ):
        return _at_once(q, k, v, bias, mask, key_mask, dropout)
    # What SDPA is fast at on a CPU: not few tokens, dropout, or the gradient of a bias.
    trained_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if places > SHORT and key_mask is None and not dropout and not trained_bias:
        if mask is None:
            return _at_once(q, k, v, bias, mask, key_mask, dropout)
        if batch and windows * scores <= _LARGE:
            return _image_by_image(q, k, v, _masked(bias, mask))
    images = max(1, min(batch, _CHUNK // scores))
    some = max(1, _CHUNK // (scores * images))
    outputs = []
    # Split, not sliced: the gradient of a slice is as large as the whole.
    for b, of_images in enumerate(zip(*(t.split(images) for t in (q, k, v)), strict=True)):
        chunks = []
        for w, (some_q, some_k, some_v) in enumerate(
            zip(*(t.split(some, 1) for t in of_images), strict=True)
        ):
            here = slice(b * images, (b + 1) * images), slice(w * some, (w + 1) * some)
            seen = None if mask is None else mask[here[1]]
            keys = None if key_mask is None else key_mask[here]
            heads_of_chunk = _plain(some_q, some_k, some_v, bias, seen, keys, dropout)
            chunks.append(rearrange(heads_of_chunk, _JOINED))
        outputs.append(chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _masked(bias: Tensor | None, mask: Tensor) -> Tensor:
    """(W, H, T, T): the mask in the bias, for all images. Each place sees itself, so no row is all -inf."""
    return torch.where(mask[:, None], 0.0 if bias is None else bias, -torch.inf)


def _image_by_image(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Windows as the batch, since SDPA would want the bias copied for each image."""
    images = zip(q.unbind(), k.unbind(), v.unbind(), strict=True)
    heads = torch.stack([dot_product_attention(*image, bias=bias).transpose(1, 2) for image in images])
    return heads.flatten(3)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """The definition, (B, W, H, T, D)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None and key_mask is None:
        bias = _masked(bias, mask)
    if bias is not None:
        scores = scores + bias
    if key_mask is None:
        weights = scores.softmax(-1)
    else:
        mask = None if mask is None else mask[:, None]
        weights = masked_softmax(scores, combine_masks(key_mask[:, :, None, None], mask))
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights.to(v.dtype) @ v


def _at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """All windows in one call of the kernels' operation."""
    batch, windows, heads, places, _ = q.shape
    if mask is None and key_mask is None:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = dot_product_attention(q, k, v, bias=bias, dropout=dropout).unflatten(0, (batch, windows))
        return rearrange(out, _JOINED)
    # Windows stand beside the heads, so that what depends on the window alone is not copied for each image.
    q, k, v = (t.flatten(1, 2) for t in (q, k, v))
    of_window = None if mask is None else mask[None, :, None]
    of_image = None if key_mask is None else key_mask[:, :, None, None]
    both = combine_masks(of_window, of_image)
    taking_part = None if both is None else both.expand(-1, -1, heads, -1, -1).flatten(1, 2)
    bias = None if bias is None else bias.expand(windows, heads, places, places).flatten(0, 1)
    out = dot_product_attention(q, k, v, mask=taking_part, bias=bias, dropout=dropout)
    return rearrange(out.unflatten(1, (windows, heads)), _JOINED)
