"""How tokens are handed to the kernels of additive attention, and the sizes of their tiles."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._additive_kernels import UNITS, spread_kernel


class Tokens(NamedTuple):
    """(B, L, H) of a side as a kernel reads it: e^2x, x, each token's largest |x| (B, L), and L in memory."""

    raised: Any
    plain: Any
    peaks: Any
    length: int


class Tiles(NamedTuple):
    """Of one launch: queries and keys of a tile, and warps."""

    rows: int
    columns: int
    warps: int


# From the largest on, the first that gives programs enough to fill a GPU. No GPU has timed them yet.
_TILES = (Tiles(64, 64, 8), Tiles(32, 64, 4), Tiles(32, 32, 4), Tiles(16, 32, 2))
_PROGRAMS = 512


def tiles(batch: int, queries: int, keys: int) -> Tiles:
    """Of the kernel that writes scores."""
    for tile in _TILES:
        if batch * triton.cdiv(queries, tile.rows) * triton.cdiv(keys, tile.columns) >= _PROGRAMS:
            break
    if queries == 1:  # a decoder's step
        return Tiles(1, tile.columns, tile.warps)
    return tile


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """What is computed in: float32, or float64 for what is in that."""
    return (torch.float64, tl.float64) if dtype is torch.float64 else (torch.float32, tl.float32)


def units_of(hidden: int) -> int:
    """How many hidden units a walk over them takes."""
    return int(triton.cdiv(hidden, UNITS.value) * UNITS.value)


def by_unit(x: Tensor) -> Tokens:
    """For a walk over hidden units: (B, units, L), of some units and tokens more, whose x is zero."""
    batch, length, hidden = x.shape
    units, in_memory = units_of(hidden), triton.cdiv(length, 16) * 16
    raised, plain = x.new_empty(2, batch, units, in_memory, dtype=accumulator(x.dtype)[0])
    return _spread(x, Tokens(raised, plain, None, in_memory), units, of_token=1, of_unit=in_memory)


def by_token(x: Tensor) -> Tokens:
    """For a walk over tokens: (B, L, H)."""
    raised = torch.empty_like(x, dtype=accumulator(x.dtype)[0])
    length, hidden = x.shape[1:]
    tokens = _spread(x, Tokens(raised, None, None, length), hidden, of_token=hidden, of_unit=1)
    return tokens._replace(plain=x)


def _spread(x: Tensor, to: Tokens, units: int, *, of_token: int, of_unit: int) -> Tokens:
    batch, length, hidden = x.shape
    wide, acc = accumulator(x.dtype)
    peaks = x.new_empty(batch, length, dtype=wide)
    programs = triton.cdiv(to.length, 32) * batch
    if programs:
        with torch.cuda.device_of(x):
            spread_kernel[(programs,)](
                x, to.raised, to.plain, peaks, length, to.length, hidden, units, units * to.length, of_token,
                of_unit, TOKENS=32, BLOCK=64, ACC=acc, num_warps=4,
            )  # fmt: skip
    return to._replace(peaks=peaks)
