"""Triton kernels of `lamina.kernels.nearest_code`: their registration and launch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._code_search import codes_kernel, merged_kernel, nearest_kernel


class Tiles(NamedTuple):
    """Of one launch: vectors and codes of a tile, channels of a product at a time, warps, stages."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int


# By bits of a number, then by the most channels of an entry: what the compiler reports for sm_90 to spill
# nothing, or little before the scan begins (test_fused_nearest_code.py). Which of those is the fastest, a GPU
# has yet to tell. A vector stays in shared memory through the scan, but for those of the last entry.
_TILES: dict[int, dict[float, Tiles]] = {
    16: {
        64: Tiles(128, 64, 64, 8, 3),
        128: Tiles(128, 64, 128, 8, 3),
        256: Tiles(128, 64, 256, 8, 2),
        torch.inf: Tiles(128, 64, 128, 8, 2),
    },
    32: {
        64: Tiles(128, 64, 64, 8, 3),
        128: Tiles(128, 64, 128, 8, 2),
        256: Tiles(128, 32, 256, 8, 2),
        torch.inf: Tiles(128, 64, 32, 8, 3),
    },
    64: {32: Tiles(32, 32, 32, 4, 1), torch.inf: Tiles(32, 32, 32, 4, 1)},  # for tests
}
_PROGRAMS = 264  # two for each multiprocessor of an H100: few vectors have several share the codes
_GATHERED = 16  # channels of a distance in float64 that are read at once


@torch.library.custom_op("lamina::nearest_code", mutates_args=())
def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """(...) of int64, of x (..., D) and codebook (K, D); both are float64, or neither is."""
    index = x.new_empty(x.shape[:-1], dtype=torch.int64)
    codes, channels = codebook.shape
    count = index.numel()
    if count == 0 or channels == 0:
        return index.zero_()
    if channels % 16:  # what is copied into shared memory has to be aligned; zeros change no distance
        x, codebook = (F.pad(t, (0, -channels % 16)) for t in (x, codebook))
        channels += -channels % 16
    x, codebook = x.contiguous(), codebook.contiguous()
    exact = x.dtype is torch.float64
    wide, acc = (torch.float64, tl.float64) if exact else (torch.float32, tl.float32)
    # Equal halves multiply without an error, and twice as fast. Others are rounded to TF32, less the codes'
    # mean, so that an offset which they share makes no error either.
    rounds = x.dtype is torch.float32 or x.dtype is not codebook.dtype
    bits = 64 if exact else 32 if rounds else 16
    limit, tile = next((limit, tile) for limit, tile in _TILES[bits].items() if channels <= limit)
    whole = limit != torch.inf
    block = max(16, triton.next_power_of_2(channels)) if whole else tile.block
    eps = 2.0**-52 if exact else 2.0**-23
    of_sums = 2 * (channels + 8) * eps  # tensor cores cut terms off where the largest one's last bit is
    of_squares = (channels + 16) * eps

    origin = codebook.to(torch.float32).mean(0) if rounds else None
    products = torch.empty_like(codebook, dtype=torch.float32) if rounds else codebook
    low, slack = codebook.new_empty(2, codes, dtype=wide)
    blocks = triton.cdiv(count, tile.rows)
    n_tiles = triton.cdiv(codes, tile.columns)
    parts = max(1, min(_PROGRAMS // blocks, n_tiles // 4))
    part = triton.cdiv(n_tiles, parts) * tile.columns
    parts = triton.cdiv(codes, part)
    indices = index if parts == 1 else index.new_empty(parts, count)
    distances = None if parts == 1 else index.new_empty(parts, count, dtype=torch.float64)
    with torch.cuda.device_of(x):
        codes_kernel[(triton.cdiv(codes, 32),)](
            codebook, origin, products, low, slack, codes, channels, of_sums + 2.0**-11 * rounds, of_squares,
            ROWS=32, BLOCK=min(block, 128), ACC=acc, num_warps=4,
        )  # fmt: skip
        nearest_kernel[(blocks, parts)](
            x, codebook, products, origin, low, slack, indices, distances, count, codes, channels, part,
            of_squares, ROWS=tile.rows, COLUMNS=tile.columns, BLOCK=block, WHOLE=whole,
            GATHERED=min(block, _GATHERED), ACC=acc, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if distances is not None:
            merged_kernel[(triton.cdiv(count, 256),)](indices, distances, index, count, parts, ROWS=256)
    return index


@nearest_code.register_fake
def _(x: Tensor, codebook: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)
