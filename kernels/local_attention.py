"""Dot-product attention in windows: a chunk of queries sees its own keys and those of the chunks beside it.

    out[i] = sum_j softmax_j( scale * query[i] . key[j] ) value[j]

where j runs over the keys whose chunk, j // window, is at most look_back before and look_ahead behind i's.

No kernel of its own yet: the definition is dense attention under a mask, and the fast path lays the chunks
into the batch of `dot_product_attention`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Refusals, choose, forward_derivatives, operation
from .checks import check_dropout, check_key_mask
from .dot_product_attention import dot_product_attention, dot_product_attention_reference
from .masking import causal_mask


def _refusals(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Refusals:
    refusals: Refusals = {"triton": "there is no fused kernel of this operation yet"}
    if forward_derivatives(query, key, value):
        refusals["torch"] = (
            "forward-mode derivatives are taken, which PyTorch's fused attention does not have"
        )
    return refusals


@operation(_refusals)
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    look_back: int = 1,
    look_ahead: int = 0,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each query's mean of the values in the chunks around its own, weighted by softmax.

    With w = window (look_back + 1 + look_ahead) keys for a query: time O(L w D), memory O(L (w + D)), and
    O(L²) in the definition. Derivatives and determinism are as of `dot_product_attention`.

    Args:
        query: (B, H, L, D).
        key: (B, H, L, D).
        value: (B, H, L, Dv).
        window: how many tokens a chunk holds. L need not be a multiple.
        look_back: how many chunks before its own a query sees; the first chunk has nothing before it.
        look_ahead: how many chunks behind its own.
        key_mask: bool, (B, L), True where a key takes part.
        is_causal: a query sees no key behind its own place, and so nothing of `look_ahead`.
        scale: of the dot products; 1 / sqrt(D) where it is not given.
        dropout: probability with which a weight is dropped; drawn whenever it is not 0, so pass 0 to
            evaluate.

    Returns:
        (B, H, L, Dv). A query with no key gives zero, and passes no gradient.

    Raises:
        ValueError: a shape, dtype or size does not fit, or dropout is not in [0, 1).

    Reference:
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020 (its local layers).

    Example:
        >>> query, key, value = torch.randn(3, 2, 4, 100, 8)
        >>> local_attention(query, key, value, window=16).shape
        torch.Size([2, 4, 100, 8])
    """
    _check(query, key, value, window, look_back, look_ahead, key_mask, dropout)
    run = _torch_path
    if choose("local_attention", _refusals(query, key, value)) != "torch":
        run = local_attention_reference
    return run(
        query,
        key,
        value,
        window=window,
        look_back=look_back,
        look_ahead=look_ahead,
        key_mask=key_mask,
        is_causal=is_causal,
        scale=scale,
        dropout=dropout,
    )


def local_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    look_back: int = 1,
    look_ahead: int = 0,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The definition, in PyTorch: what every other path is tested against. Arguments as of the operation."""
    mask = local_mask(query.shape[2], window, look_back, look_ahead, query.device)
    mask = mask if key_mask is None else mask & key_mask[:, None, None, :]
    return dot_product_attention_reference(
        query, key, value, mask=mask, is_causal=is_causal, scale=scale, dropout=dropout
    )


def local_mask(length: int, window: int, look_back: int, look_ahead: int, device: torch.device) -> Tensor:
    """Which keys lie in the chunks that a query sees: (L, L) of bool."""
    chunk = torch.arange(length, device=device) // window
    distance = chunk - chunk.unsqueeze(-1)
    return (distance >= -look_back) & (distance <= look_ahead)


def _torch_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    look_back: int,
    look_ahead: int,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    length, device = query.shape[2], query.device
    if length <= window:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return dot_product_attention(
            query, key, value, mask=mask, is_causal=is_causal, scale=scale, dropout=dropout
        )
    look_ahead = 0 if is_causal else look_ahead
    batch = query.shape[0]
    count = (length + window - 1) // window
    width = window * (look_back + 1 + look_ahead)
    before, behind = look_back * window, (count + look_ahead) * window - length

    def around(x: Tensor) -> Tensor:
        """(B, H, L, D) as (B n, H, w, D). `unfold` would have a slower backward pass."""
        chunks = F.pad(x, (0, 0, before, behind)).unflatten(2, (-1, window)).transpose(1, 2)
        steps = range(look_back + 1 + look_ahead)
        return torch.cat([chunks[:, step : step + count] for step in steps], 3).flatten(0, 1)

    real = torch.ones(1, length, dtype=torch.bool, device=device) if key_mask is None else key_mask
    real = F.pad(real, (before, behind)).unfold(1, width, window)
    mask = real.expand(batch, -1, -1).reshape(batch * count, 1, 1, width)
    if is_causal:
        mask = mask & causal_mask(window, width, device=device)
    chunks = F.pad(query, (0, 0, 0, count * window - length)).unflatten(2, (count, window))
    chunks = chunks.transpose(1, 2).flatten(0, 1)
    out = dot_product_attention(chunks, around(key), around(value), mask=mask, scale=scale, dropout=dropout)
    return out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    look_back: int,
    look_ahead: int,
    key_mask: Tensor | None,
    dropout: float,
) -> None:
    if not (
        query.ndim == key.ndim == value.ndim == 4
        and query.shape == key.shape
        and query.shape[:3] == value.shape[:3]
    ):
        raise ValueError(
            "expected query and key (B, H, L, D) and value (B, H, L, Dv), got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if window < 1 or min(look_back, look_ahead) < 0:
        raise ValueError(
            "window must be positive, look_back and look_ahead not negative, got "
            f"{window=}, {look_back=} and {look_ahead=}"
        )
    check_key_mask(key_mask, (query.shape[0], query.shape[2]), "(B, L)")
    check_dropout(dropout)
