"""Triton kernel of `lamina.kernels.lsh_buckets`: the rotated vectors are never written.

It takes no gradient, and gives none.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._vmap import fold_into_batch
from ._attention_tiles import INTERPRETED, Rows, dot, load_rows
from ._lsh_launch import accumulator, block, dense_rows, rows_of


@torch.library.custom_op("lamina::lsh_buckets", mutates_args=())
def lsh_buckets(query_key: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """The buckets (B, H, R, L) of int64, of the product of `factors` many in a round.

    Args:
        query_key: (B, H, L, D).
        rotations: (H, D, R, M) or (1, D, R, M) of float32, or of float64 as the vectors are.
        factors: even or 1, whose halves' sum is M.
    """
    batch, heads, length, dim = query_key.shape
    n_rounds = rotations.shape[2]
    buckets = query_key.new_empty(batch, heads, n_rounds, length, dtype=torch.int64)
    hashed = [n for n in factors if n > 1]
    if not hashed:
        buckets.zero_()
    rows = max(16, min(128 if dim <= 128 else 64, triton.next_power_of_2(length)))
    if query_key.dtype in (torch.float32, torch.float64):
        rows = min(rows, 64 if dim <= 64 else 32)
    programs = triton.cdiv(length, rows) * n_rounds * batch * heads
    # A bfloat16 is multiplied as it is, with the parts that a rotation is the sum of: three are a float32.
    highest = torch.get_float32_matmul_precision() == "highest"
    step, first = 1, 0
    for n in hashed if programs else ():
        with torch.cuda.device_of(query_key):
            buckets_kernel[(programs,)](
                rows_of(query_key), _of_heads(rotations), buckets, heads, length, n_rounds, first, n // 2,
                step, SIZE=dim, BLOCK=block(dim), ROWS=rows, COLUMNS=64 if dim <= 128 else 32,
                ADDS=step > 1, PARTS=(3 if highest else 2) if query_key.dtype is torch.bfloat16 else 0,
                ACC=accumulator(rotations.dtype), PRECISION="tf32x3" if highest else "tf32",
                num_warps=4 if dim <= 64 else 8, num_stages=2,
            )  # fmt: skip
        step, first = step * n, first + n // 2
    return buckets


@lsh_buckets.register_fake
def _(query_key: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    batch, heads, length, _ = query_key.shape
    return query_key.new_empty(batch, heads, rotations.shape[2], length, dtype=torch.int64)


fold_into_batch(lsh_buckets, ["query_key"])


def _of_heads(rotations: Tensor) -> Rows:
    """(H, D, R, M) as (R, H, D, M)."""
    rotations, shared = dense_rows(rotations), rotations.shape[0] == 1
    return Rows(rotations, rotations.stride(2), 0 if shared else rotations.stride(0), rotations.stride(1))


@triton.jit
def _turned(rows, turns, PARTS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """rows @ turns, exact to float32."""
    if INTERPRETED or PARTS == 0:
        product = dot(rows.to(ACC), turns.to(ACC), ACC, PRECISION)
    else:
        part = turns.to(rows.dtype)
        product = tl.dot(rows, part, out_dtype=ACC)
        for _ in tl.static_range(PARTS - 1):
            turns -= part.to(ACC)
            part = turns.to(rows.dtype)
            product = tl.dot(rows, part, product, out_dtype=ACC)
    return product


@triton.jit
def buckets_kernel(
    x, rotations, buckets, heads, length, rounds, first, half, step,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADDS: tl.constexpr,
    PARTS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The nearest of `half` directions and their opposites, of ROWS tokens in one round.

    The first of equals, as the maximum of [turned; -turned] is: what points with a direction comes before
    what points against one. `step` is the product of the factors before this, whose buckets it `ADDS` to.
    """
    tiles = tl.cdiv(length, ROWS)
    r = tl.program_id(0) // tiles % rounds
    pair = (tl.program_id(0) // tiles // rounds).to(tl.int64)
    b, h = pair // heads, pair % heads
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row = load_rows(x, b, h, 0, i.to(tl.int64), length, SIZE, BLOCK)
    d = tl.arange(0, BLOCK)
    furthest = tl.full((ROWS,), -1.0, ACC)
    nearest = tl.zeros((ROWS,), tl.int32)
    for start in range(0, half, COLUMNS):
        m = start + tl.arange(0, COLUMNS)
        at = rotations.at + r * rotations.batch + h * rotations.head + d[:, None] * rotations.row
        turns = tl.load(at + first + m[None, :], mask=(d[:, None] < SIZE) & (m[None, :] < half), other=0.0)
        turned = _turned(row, turns.to(ACC), PARTS, ACC, PRECISION)
        size = tl.where(m[None, :] < half, tl.abs(turned), -1.0)
        code = tl.where(turned < 0, half, 0) + m[None, :]
        best = tl.max(size, 1)
        which = tl.min(tl.where(size == best[:, None], code, 2 * half), 1)
        equal = tl.where(best == furthest, tl.minimum(which, nearest), nearest)
        nearest = tl.where(best > furthest, which, equal)
        furthest = tl.maximum(furthest, best)
    at = buckets + (pair * rounds + r) * length + i
    found = tl.minimum(nearest, 2 * half - 1).to(tl.int64) * step
    if ADDS:
        found += tl.load(at, mask=i < length, other=0)
    tl.store(at, found, mask=i < length)
