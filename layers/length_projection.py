"""Projections over the length of a sequence: the E and F of the Linformer (Wang et al., 2020)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.checks import check_key_mask

Kind = Literal["linear", "mean", "max", "conv"]


class LengthProjection(nn.Module):
    """Maps a sequence of any length up to a maximum to a few columns, each a mixture of its places.

    .. math:: y_c = \\sum_j E_{cj} \\, x_j

    over the places j that take part. `kind` says what E is. "linear": a learned matrix, of which a shorter
    sequence takes the first columns; "mean": the mean over windows of s = ⌈max_length / rank⌉ neighbours;
    "conv": a learned kernel over the same windows, one a head, which all channels share; "max": the greatest
    value of each window, channel by channel, which is no matrix at all.

    Padding has no influence: a place that is masked counts as zero, and is left out of a mean or a maximum,
    so that a sequence gives the same with padding behind it as without. The paper has no mask, and nor have
    the implementations that people use, in which E lets padding in. The paper's convolution is named but not
    given; here it mixes no channels, so that it is a banded E.

    Time O(L rank D) for "linear" and O(L D) for the others; memory O(rank D) beside the input.

    Args:
        max_length: n, the longest sequence that it takes.
        rank: k, how many columns a sequence of `max_length` gives; at most `max_length`.
        heads: how many matrices or kernels there are, one for each head of x; 1 is shared by all. There is
            none to share in "mean" and "max".
        kind: "linear", "mean", "max" or "conv".
        device: where the parameter is.
        dtype: of the parameter.

    Shape:
        - x: (B, H, L, D) with L up to `max_length`; H is `heads` where that is not 1
        - key_mask: (B, L) of bool, True where a place takes part
        - output: (B, H, k', D); k' is `rank` for "linear", and ⌈L / s⌉ for the windows

    Raises:
        ValueError: a size, kind or mask does not fit, or x is longer than `max_length`.

    Reference:
        Wang, Li, Khabsa, Fang, Ma. Linformer: Self-Attention with Linear Complexity. arXiv:2006.04768, 2020.
        Section 4, equation 7 and "General projections".

    Example:
        >>> projection = LengthProjection(100, rank=20)
        >>> projection(torch.randn(2, 4, 70, 8)).shape
        torch.Size([2, 4, 20, 8])
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        max_length: int,
        rank: int,
        *,
        heads: int = 1,
        kind: Kind = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= max_length:
            raise ValueError(f"rank must be from 1 to max_length={max_length}, got {rank}")
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        self.max_length, self.rank, self.kind = max_length, rank, kind
        self.heads = heads if kind in ("linear", "conv") else 1
        self.stride = -(-max_length // rank)
        shape = {"linear": (heads, rank, max_length), "conv": (heads, self.stride)}.get(kind)
        weight = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1/k) for "linear", as in the paper's theorem; N(0, 1/s) for "conv", which keeps the variance.

        The authors' code draws E from Xavier's uniform distribution with gain 1/√2 instead:
        `for matrix in projection.weight: nn.init.xavier_uniform_(matrix, gain=2**-0.5)`.
        """
        if self.weight is not None:
            nn.init.normal_(self.weight, std=(self.rank if self.kind == "linear" else self.stride) ** -0.5)

    @property
    def is_linear(self) -> bool:
        """Whether the output is linear in x: all kinds but "max"."""
        return self.kind != "max"

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        self._check(x, key_mask)
        taking_part = None if key_mask is None else key_mask[:, None, :, None]
        if self.kind == "max":
            if taking_part is not None:
                x = x.masked_fill(~taking_part, -torch.inf)
            y = self._windows(x, fill=-torch.inf).amax(3)
            return y if key_mask is None else y.masked_fill(~self.column_mask(key_mask)[:, None, :, None], 0)
        if taking_part is not None:
            x = x.masked_fill(~taking_part, 0)
        if self.weight is None:
            if key_mask is None:
                key_mask = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
            counts = self._windows(key_mask[:, None, :, None]).sum(3).clamp(min=1)
            return self._windows(x).sum(3) / counts.to(x.dtype)
        if self.kind == "conv":
            return (self.weight[:, None, None] @ self._windows(x)).squeeze(3)
        matrix = self.weight[:, :, : x.shape[2]]
        if self.heads > 1:
            return torch.einsum("hkl,bhld->bhkd", matrix, x)
        # A batch of products that read one matrix: faster than one product over all rows laid side by side.
        rows = x.flatten(0, 1)
        return torch.bmm(matrix.expand(len(rows), -1, -1), rows).unflatten(0, x.shape[:2])

    def columns(self, length: int) -> int:
        """k', how many columns a sequence of this length gives."""
        return self.rank if self.kind == "linear" else -(-length // self.stride)

    def column_mask(self, key_mask: Tensor) -> Tensor:
        """Which columns exist, (B, k') of bool: those that some place which takes part goes into."""
        if self.kind == "linear":
            return key_mask.any(-1, keepdim=True).expand(-1, self.rank)
        return self._windows(key_mask[:, None, :, None]).any(3)[:, 0, :, 0]

    def matrix(
        self,
        length: int,
        *,
        key_mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """E as it acts on a sequence of this length, (B, heads, k', length); B is 1 without a mask.

        Raises:
            ValueError: `kind` is "max", which has no matrix.
        """
        if not self.is_linear:
            raise ValueError(
                'kind "max" has no matrix, and its values no weights: a maximum takes another place for each '
                "channel"
            )
        batch = 1 if key_mask is None else len(key_mask)
        if self.weight is not None:
            device, dtype = self.weight.device, self.weight.dtype
        places = torch.eye(length, device=device, dtype=dtype).expand(batch, self.heads, -1, -1)
        return self.forward(places, key_mask=key_mask)

    def extra_repr(self) -> str:
        sizes = f"max_length={self.max_length}, rank={self.rank}, heads={self.heads}"
        return f"{sizes}, kind={self.kind!r}"

    def _windows(self, x: Tensor, fill: float = 0) -> Tensor:
        """(B, H, L, D) as (B, H, k', s, D), the last window filled up."""
        columns = self.columns(x.shape[2])
        missing = columns * self.stride - x.shape[2]
        if torch.compiler.is_compiling() or missing:  # compiled, the branch would pin the length
            x = F.pad(x, (0, 0, 0, missing), value=fill)
        return x.unflatten(2, (columns, self.stride))

    def _check(self, x: Tensor, key_mask: Tensor | None) -> None:
        if x.ndim != 4 or (self.heads > 1 and x.shape[1] != self.heads):
            heads = "H" if self.heads == 1 else self.heads
            raise ValueError(f"x must be (B, {heads}, L, D), got {tuple(x.shape)}")
        if x.shape[2] > self.max_length:
            raise ValueError(f"x must have at most max_length={self.max_length} places, got {x.shape[2]}")
        check_key_mask(key_mask, (x.shape[0], x.shape[2]), "(B, L)")
