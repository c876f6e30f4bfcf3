"""Masks, resolved in one place for every path. A mask is boolean and True means: takes part."""

import torch
from torch import Tensor


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension among the places where `mask` is True.

    Args:
        scores: (..., L). A score of -inf is as good as False in the mask.
        mask: bool, broadcastable to `scores`; None for all.

    Returns:
        (..., L). A row in which nothing takes part is all zero, not NaN, and passes no gradient.

    Source:
        Softmax over a subset; that an empty subset has zero weight is Lamina's rule for every path.

    Example:
        >>> mask = torch.tensor([[True, True, False], [False, False, False]])
        >>> masked_softmax(torch.zeros(2, 3), mask)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    if mask is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def causal_mask(queries: int, keys: int, *, device: torch.device | str | None = None) -> Tensor:
    """The mask under which the last query sees the last key, and each earlier query one key fewer.

    Args:
        queries: Lq.
        keys: Lk; query i sees the keys up to i + Lk - Lq, so that decoding with a cache is right.
        device: where the mask is made.

    Returns:
        (Lq, Lk) of bool. With more queries than keys the first queries see nothing.

    Reference:
        Vaswani et al. Attention Is All You Need. NIPS 2017. Section 3.2.3.

    Example:
        >>> causal_mask(2, 3)
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def window_mask(
    queries: int,
    keys: int,
    *,
    before: int,
    after: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask under which a query sees the keys near its own place, which counts from the end.

    Args:
        queries: Lq.
        keys: Lk; query i stands at place i + Lk - Lq, so that the last query stands at the last key.
        before: how many keys before its own place a query sees.
        after: how many behind it; with 0 the mask is causal too.
        device: where the mask is made.

    Returns:
        (Lq, Lk) of bool: a band of before + 1 + after keys a row, cut off at the ends.

    Raises:
        ValueError: `before` or `after` is negative.

    Reference:
        Beltagy, Peters, Cohan. Longformer: The Long-Document Transformer. arXiv:2004.05150, 2020.

    Example:
        >>> window_mask(3, 4, before=1)
        tensor([[ True,  True, False, False],
                [False,  True,  True, False],
                [False, False,  True,  True]])
    """
    if min(before, after) < 0:
        raise ValueError(f"before and after must not be negative, got {before=} and {after=}")
    return band_mask(queries, keys, before, after, device=device)


def band_mask(
    queries: int, keys: int, before: int | None, after: int | None, *, device: torch.device | str | None
) -> Tensor:
    """`window_mask`, where None is no bound."""
    band = torch.ones(queries, keys, dtype=torch.bool, device=device)
    band = band if after is None else band.tril(keys - queries + after)
    return band if before is None else band.triu(keys - queries - before)


def mask_of_lengths(lengths: Tensor, keys: int) -> Tensor:
    """(B, Lk): the first so many of `keys`, lengths (B,)."""
    return torch.arange(keys, device=lengths.device) < lengths.unsqueeze(-1)


def combine_masks(*masks: Tensor | None) -> Tensor | None:
    """What takes part under all of these masks, which broadcast to each other; None where none is given."""
    combined = None
    for mask in masks:
        if mask is not None:
            combined = mask if combined is None else combined & mask
    return combined


def resolve_mask(
    mask: Tensor | None, bias: Tensor | None, is_causal: bool, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Everything that excludes a key from a query, as one mask that broadcasts to (B, H, Lq, Lk).

    A bias of -inf excludes too: were it left to the softmax, a row of nothing else would be NaN.
    """
    return combine_masks(
        mask,
        causal_mask(queries, keys, device=device) if is_causal else None,
        None if bias is None else bias != -torch.inf,
    )
