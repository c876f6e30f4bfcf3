"""Batches without padding: all sequences' tokens in one row, and where each sequence starts."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.checks import check_key_mask


class Packing(NamedTuple):
    """Where the sequences of a packed row of tokens stand.

    Args:
        starts: (B + 1,) of int32 or int64, from 0 to the number of tokens: sequence b starts at the b-th and
            ends before the next. Elsewhere they are called `cu_seqlens`.
        longest: the most tokens that a sequence has, or more: so that no kernel has to read the starts.

    Shape:
        - what it is given with: (N, ...), the tokens of all B sequences, one sequence after the other

    Source:
        The form is that of FlashAttention's code. Dao et al. FlashAttention. NeurIPS 2022.

    Example:
        >>> attention = MultiHeadAttention(8, num_heads=2)
        >>> packing = Packing(torch.tensor([0, 3, 7]), longest=4)
        >>> attention(torch.randn(7, 8), packing=packing).shape
        torch.Size([7, 8])
    """

    starts: Tensor
    longest: int


def pack(tokens: Tensor, key_mask: Tensor) -> tuple[Tensor, Packing]:
    """The tokens of a padded batch that take part, one sequence after the other, and where each stands.

    What padding costs is saved in all that is done with them. How many there are is read from the mask: on a
    GPU a synchronisation, under `torch.compile` a graph break where `fullgraph=True` does not forbid it.

    Args:
        tokens: (B, L, ...) of any dtype.
        key_mask: (B, L) of bool, True where a token takes part. It may have holes: they are closed.

    Returns:
        (N, ...) for the N tokens that take part, and their `Packing`, whose `longest` is L.

    Raises:
        ValueError: the mask is not boolean, or not (B, L).

    Source:
        `unpad_input` of FlashAttention's code.

    Example:
        >>> ids = torch.tensor([[5, 3, 9], [7, 0, 0]])
        >>> pack(ids, ids != 0)
        (tensor([5, 3, 9, 7]), Packing(starts=tensor([0, 3, 4], dtype=torch.int32), longest=3))
    """
    _check(tokens.shape[:2], key_mask)
    lengths = key_mask.sum(1, dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    places = key_mask.flatten().nonzero().squeeze(1)
    return tokens.flatten(0, 1).index_select(0, places), Packing(starts, key_mask.shape[1])


def unpack(tokens: Tensor, key_mask: Tensor) -> Tensor:
    """The padded batch again: packed tokens in their places, and zero where the mask is False.

    Args:
        tokens: (N, ...), from `pack` with the same mask.
        key_mask: (B, L) of bool, with N places that are True.

    Returns:
        (B, L, ...).

    Raises:
        ValueError: the mask is not boolean or no matrix; or, looked at on a CPU, it has not N places.

    Source:
        `pad_input` of FlashAttention's code.

    Example:
        >>> key_mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> unpack(torch.tensor([5, 3, 9, 7]), key_mask)
        tensor([[5, 3, 9],
                [7, 0, 0]])
    """
    _check(key_mask.shape, key_mask)
    if key_mask.is_cpu and not torch.compiler.is_compiling() and int(key_mask.sum()) != len(tokens):
        raise ValueError(
            f"key_mask must be True in {len(tokens)} places, one a token, got {int(key_mask.sum())}"
        )
    # Not `nonzero`: how many there are is known, and a GPU need not be waited for.
    places = key_mask.flatten().nonzero_static(size=tokens.shape[0]).squeeze(1)
    padded = tokens.new_zeros(key_mask.numel(), *tokens.shape[1:]).index_copy(0, places, tokens)
    return padded.unflatten(0, key_mask.shape)


def packed_places(packing: Packing, count: int) -> tuple[Tensor, Tensor]:
    """Of each of `count` packed tokens its sequence's number and its place in it, (count,) each."""
    starts = packing.starts.long()
    tokens = torch.arange(count, device=starts.device)
    sequences = torch.bucketize(tokens, starts[1:], right=True)
    return sequences, tokens - starts[sequences]


def _check(shape: tuple[int, ...], key_mask: Tensor) -> None:
    if len(shape) != 2:
        raise ValueError(f"tokens must be (B, L, ...) and key_mask (B, L), got {tuple(key_mask.shape)}")
    check_key_mask(key_mask, (shape[0], shape[1]), "(B, L)")
    if key_mask.shape != shape:
        raise ValueError(f"key_mask must be (B, L) = {tuple(shape)}, got {tuple(key_mask.shape)}")
