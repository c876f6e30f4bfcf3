"""Masks. Everywhere in this library a mask is boolean and True means: takes part."""

import torch
from torch import Tensor

from ..kernels.checks import check_key_mask, check_mask
from ..kernels.masking import causal_mask, combine_masks, mask_of_lengths, masked_softmax, window_mask

__all__ = [
    "attention_mask",
    "causal_mask",
    "mask_from_lengths",
    "mask_from_padding",
    "masked_softmax",
    "window_mask",
]


def mask_from_lengths(lengths: Tensor, max_length: int | None = None) -> Tensor:
    """The key mask of a padded batch: True on each sequence's own places, False on the padding behind them.

    Args:
        lengths: (B,) of integers, how many places of each sequence are real.
        max_length: L; the longest length where it is not given, which reads `lengths` (on a GPU a
            synchronisation, under `torch.compile` a graph break: give it there).

    Returns:
        (B, L) of bool, on the device of `lengths`.

    Raises:
        ValueError: `lengths` is not a vector of integers.

    Source:
        Lamina's convention; `torch.nn` means the inverse by `key_padding_mask` (see `mask_from_padding`).

    Example:
        >>> mask_from_lengths(torch.tensor([1, 3]))
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.dtype is torch.bool:
        raise ValueError(
            f"lengths must be a vector of integers, got shape {tuple(lengths.shape)} of {lengths.dtype}"
        )
    if max_length is None:
        max_length = int(lengths.max()) if len(lengths) else 0
    return mask_of_lengths(lengths, max_length)


def mask_from_padding(padding: Tensor) -> Tensor:
    """The mask of this library from PyTorch's `key_padding_mask` or `attn_mask`, in which True means: hidden.

    Args:
        padding: bool of any shape, True where a place is padding or hidden.

    Returns:
        bool of the same shape, e.g. (B, L), True where a place takes part.

    Raises:
        ValueError: `padding` is not boolean: whether a 1 hides or shows cannot be known.

    Source:
        The meaning that `torch.nn.MultiheadAttention` and `torch.nn.Transformer` give to their boolean masks.

    Example:
        >>> mask_from_padding(torch.tensor([[False, True]]))
        tensor([[ True, False]])
    """
    if padding.dtype is not torch.bool:
        raise ValueError(f"padding must be boolean with True where a place is hidden, got {padding.dtype}")
    return ~padding


def attention_mask(
    key_mask: Tensor | None, mask: Tensor | None, shape: tuple[int, int, int, int]
) -> Tensor | None:
    """`key_mask` (B, Lk) and `mask`, checked, as one that broadcasts to the scores' (B, H, Lq, Lk)."""
    batch, _, _, keys = shape
    check_mask("mask", mask, shape)
    check_key_mask(key_mask, (batch, keys))
    return combine_masks(None if key_mask is None else key_mask[:, None, None, :], mask)
