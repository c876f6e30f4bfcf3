"""Triton kernels of `lamina.kernels.code_sums`: a segmented reduction, in order and without atomics.

Sorted by their codes, the vectors of a code are a segment. A program takes a chunk of the sorted vectors,
whatever codes they are of, so that a code that all vectors chose does not wait for one program. A segment
within a chunk is summed and done; what a chunk has of one that goes on elsewhere is a part, and other
programs add the parts up.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 64, 64  # vectors of a chunk, and channels that a program has of them


@torch.library.custom_op("lamina::code_sums", mutates_args=())
def code_sums(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """(K, D) in float32 at least, of x (N, D) and indices (N,): what is not in [0, K) is left out."""
    count, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(num_codes, channels, dtype=wide, device=x.device)
    if count == 0 or channels == 0:
        return out
    x = x.contiguous()
    ordered, order = torch.sort(indices, stable=True)
    chunks = triton.cdiv(count, _ROWS)
    columns = min(_COLUMNS, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, columns)
    parts = out.new_empty(chunks, 2, channels)
    spans = torch.zeros(num_codes, 2, dtype=torch.int32, device=x.device)
    sizes = {"ROWS": _ROWS, "COLUMNS": columns, "ACC": tl.float64 if wide is torch.float64 else tl.float32}
    with torch.cuda.device_of(x):
        chunks_kernel[(chunks, blocks)](
            x, ordered, order, out, parts, spans, count, num_codes, channels, **sizes, num_warps=4
        )
        parts_kernel[(num_codes, blocks)](parts, spans, out, channels, **sizes, num_warps=4)
    return out


@code_sums.register_fake
def _(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    return x.new_empty(num_codes, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """Each vector has the gradient of its code's sum: of PyTorch's own operations, so it has one itself."""
    (indices,) = ctx.saved_tensors
    taken = (indices >= 0) & (indices < grad.shape[0])
    rows = grad.index_select(0, indices.masked_fill(~taken, 0))
    return rows.masked_fill(~taken.unsqueeze(-1), 0).to(ctx.dtype), None, None


code_sums.register_autograd(_backward, setup_context=_setup_context)


@triton.jit
def chunks_kernel(
    x, ordered, order, out, parts, spans, N, K, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of one chunk's segments: and the parts of those that go on elsewhere.

    A chunk has two at the most: the first of what began before it, the second of what goes on after it alone.
    """
    chunk = tl.program_id(0).to(tl.int64)
    rows = chunk * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < N
    code = tl.load(ordered + rows, mask=inside, other=-1)
    taken = inside & (code >= 0) & (code < K)
    code = tl.where(taken, code, K)
    place = tl.load(order + rows, mask=taken, other=0)
    found = taken[:, None] & (d < D)[None, :]
    tile = tl.load(x + place[:, None] * D + d[None, :], mask=found, other=0.0).to(ACC)
    before = tl.load(ordered + chunk * ROWS - 1, mask=chunk > 0, other=-1)
    after = tl.load(ordered + (chunk + 1) * ROWS, mask=(chunk + 1) * ROWS < N, other=-1)
    current = tl.min(code, 0)
    while current < K:
        total = tl.sum(tl.where((code == current)[:, None], tile, 0.0), 0)
        comes = current == before
        goes = current == after
        alone = ~comes & ~goes
        second = tl.where(comes, 0, 1)
        tl.store(out + current.to(tl.int64) * D + d, total, mask=(d < D) & alone)
        tl.store(parts + (chunk * 2 + second) * D + d, total, mask=(d < D) & ~alone)
        tl.store(spans + current * 2, chunk.to(tl.int32), mask=goes & ~comes)
        tl.store(spans + current * 2 + 1, chunk.to(tl.int32), mask=comes & ~goes)
        current = tl.min(tl.where(code > current, code, K), 0)


@triton.jit
def parts_kernel(parts, spans, out, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """The sum of the parts of one code, where it has several: of the chunks `first` to `last`."""
    code = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(spans + code * 2)
    last = tl.load(spans + code * 2 + 1)
    if first < last:
        total = tl.zeros((COLUMNS,), ACC)
        for begin in range(first, last + 1, ROWS):
            chunk = begin + tl.arange(0, ROWS)
            at = chunk.to(tl.int64) * 2 + (chunk == first)
            found = (chunk <= last)[:, None] & (d < D)[None, :]
            total += tl.sum(tl.load(parts + at[:, None] * D + d[None, :], mask=found, other=0.0), 0)
        tl.store(out + code * D + d, total, mask=d < D)
