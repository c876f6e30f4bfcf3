"""Triton kernels of `lamina.kernels.deformable_sampling`, forward and backward: their registration.

Saved are the inputs alone. The backward pass adds the gradient of the values up with atomics, in float32,
and so in an order that no two runs share; under `torch.use_deterministic_algorithms(True)` it sorts the
samples by where they lie, and each cell collects its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._deformable_bags import gradients_of_definition
from .._vmap import fold_into_batch
from ..deformable_sampling import working_dtype
from ._deformable_kernels import backward_kernel, collect_kernel, forward_kernel

# Of a tile: eight for each thread of a program's one warp, which needs no barrier between what it loads, adds
# up and stores. With more, registers spill (by what the compiler reports for sm_90,
# test_fused_deformable_sampling.py); what is fastest a GPU has yet to tell. In the interpreter it is programs
# that take time.
NUMBERS = 8192 if triton.knobs.runtime.interpret else 256
NARROW = 2**31  # keys below are sorted in half the bits


@torch.library.custom_op("lamina::deformable_sampling", mutates_args=())
def deformable_sampling(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """As the public operation, with the shapes of the levels one after the other: height, width, height, …"""
    call = _Call(value, sizes, locations, weights)
    if not (call.value.numel() and call.weights.numel()):
        return value.new_zeros(call.out_shape)
    out = value.new_empty(call.out_shape)
    together = min(8, triton.next_power_of_2(call.points), call.rows)
    queries = call.rows // together
    call.run(
        forward_kernel, triton.cdiv(call.queries, queries), call.chunks, call.value, call.locations,
        call.weights, out, call.sizes, call.cells, call.queries, call.heads,
        QUERIES=queries, TOGETHER=together,
    )  # fmt: skip
    return out


@deformable_sampling.register_fake
def _(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], weights.shape[1], *value.shape[2:])


@torch.library.custom_op("lamina::deformable_sampling_backward", mutates_args=())
def deformable_sampling_backward(
    grad: Tensor,
    needed: Sequence[bool],
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights: of what is not `needed`, nothing to read."""
    call = _Call(value, sizes, locations, weights)
    if not (call.value.numel() and call.weights.numel()):
        return _zeros(value, needed[0]), _zeros(locations, needed[1]), _zeros(weights, needed[2])
    of_value, of_locations, of_weights = needed
    d_locations = torch.empty_like(call.locations) if of_locations else None
    d_weights = torch.empty_like(call.weights) if of_weights else None
    d_value = keys = None
    if of_value and torch.are_deterministic_algorithms_enabled():
        keys = torch.empty_like(call.weights, dtype=torch.int32 if call.nowhere < NARROW else torch.int64)
    elif of_value:
        d_value = torch.zeros_like(call.value, dtype=call.wide)
    grad = grad.contiguous()
    call.run(
        backward_kernel, triton.cdiv(call.queries * call.points, call.rows), 1, grad, call.value,
        call.locations, call.weights, d_value, d_locations, d_weights, keys, call.nowhere, call.sizes,
        call.cells, call.anchors, call.queries, call.heads, ROWS=call.rows,
    )  # fmt: skip
    if keys is not None:
        d_value = _collected(call, keys, grad)
    return (
        _zeros(value, False) if d_value is None else d_value.to(value.dtype),
        _zeros(locations, False) if d_locations is None else d_locations,
        _zeros(weights, False) if d_weights is None else d_weights,
    )


@deformable_sampling_backward.register_fake
def _(
    grad: Tensor,
    needed: Sequence[bool],
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, ...]:
    inputs = zip((value, locations, weights), needed, strict=True)
    return tuple(t.new_empty(t.shape if wanted else 0) for t, wanted in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    needed = [ctx.needs_input_grad[n] for n in (0, 2, 3)]
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        of_value, *others = gradients_of_definition(grad, needed, inputs, ctx.sizes)
    else:
        value, *places = inputs
        found = deformable_sampling_backward(grad, needed, value, ctx.sizes, *places)
        of_value, *others = (g if wanted else None for g, wanted in zip(found, needed, strict=True))
    return of_value, None, *others


deformable_sampling.register_autograd(_backward, setup_context=_setup_context)
fold_into_batch(deformable_sampling, ["value", "locations", "weights"])


def _collected(call: "_Call", keys: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the values from sorted samples. Nothing here waits for the device to know a size."""
    out = torch.empty_like(call.value)
    keys, order = keys.flatten().sort(stable=True)
    anchors = torch.arange(call.nowhere + 1, dtype=keys.dtype, device=keys.device)
    starts = torch.searchsorted(keys, anchors)
    together = min(8, call.rows)
    cells = call.rows // together
    call.run(
        collect_kernel, triton.cdiv(call.cells, cells), call.chunks, grad, call.locations, call.weights,
        order, starts, out, call.sizes, call.cells, call.anchors, call.heads, CELLS=cells, TOGETHER=together,
    )  # fmt: skip
    return out


class _Call:
    """What all kernels of one call take."""

    def __init__(self, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> None:
        self.value, self.locations, self.weights = (t.contiguous() for t in (value, locations, weights))
        self.batch, self.cells, self.heads, self.dim = value.shape
        self.queries, self.levels, self.points = weights.shape[1], *weights.shape[3:]
        self.out_shape = self.batch, self.queries, self.heads, self.dim
        self.sizes = tuple(2 * size + 1 for size in sizes)  # as the kernels take them
        # What may be above and left of a sample: the cells of a level, and a row and a column before them.
        self.anchors = sum((h + 1) * (w + 1) for h, w in zip(sizes[::2], sizes[1::2], strict=True))
        self.nowhere = self.batch * self.heads * self.anchors
        self.wide = working_dtype(value, locations, weights)
        self.block, self.rows = _tile(self.dim, self.wide)
        self.chunks = triton.cdiv(self.dim, self.block)

    def run(self, kernel: Any, tiles: int, chunks: int, *arguments: Any, **constants: int) -> None:
        programs = tiles * self.heads * self.batch
        if not programs * chunks:
            return
        with torch.cuda.device_of(self.value):
            kernel[(programs, chunks)](
                *arguments, SIZE=self.dim, BLOCK=self.block, LEVELS=self.levels, POINTS=self.points,
                ACC=tl.float64 if self.wide is torch.float64 else tl.float32, num_warps=1, **constants,
            )  # fmt: skip


def _zeros(like: Tensor, wanted: bool) -> Tensor:
    """A gradient of zeros, or what stands for one that is not wanted."""
    return like.new_zeros(like.shape if wanted else 0)


def _tile(dim: int, wide: torch.dtype) -> tuple[int, int]:
    """Channels and rows of a tile."""
    numbers = NUMBERS // 2 if wide is torch.float64 else NUMBERS
    block = triton.next_power_of_2(max(dim, 1)) if dim <= 128 else 64
    return block, min(128, numbers // block)
