"""Triton kernels of `lamina.kernels.extract_glimpses`, forward and backward: each is linear, and the other's
gradient, so that derivatives of any order are these two.

A cell of a scale is the mean of `step` samples a pixel apart, each way. Along an axis it takes the pixels
first, first + 1 … first + step of the cell: the first for the part that lies in it, 1 - f, the last for the
rest, f, and those between whole. f is one number for all cells of a glimpse, as they are whole pixels apart.
So a cell reads (step + 1)² pixels, and a pixel is read by at most four cells of a scale: the gradient of the
images is gathered, pixel by pixel, without atomics.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._vmap import fold_into_batch

ALL = tl.constexpr(tl.PropagateNan.ALL)
_CELLS = 512  # of a program, whatever channels they are of
_TILE = (16, 64)  # rows and columns of the pixels of a program


@torch.library.custom_op("lamina::extract_glimpses", mutates_args=())
def extract_glimpses(images: Tensor, locations: Tensor, size: int, num_scales: int) -> Tensor:
    """(B, T, num_scales, C, size, size) of images (B, C, H, W) and locations (B, T, 2) of float32 or 64."""
    (batch, channels, height, width), count = images.shape, locations.shape[1]
    out = images.new_empty(batch, count, num_scales, channels, size, size)
    cells = channels * size * size
    if out.numel() == 0:
        return out
    if height * width == 0:
        return out.zero_()
    block = min(_CELLS, max(32, triton.next_power_of_2(cells)))
    programs = batch * count * num_scales * triton.cdiv(cells, block)
    with torch.cuda.device_of(images):
        forward_kernel[(programs,)](
            images.contiguous(), locations.contiguous(), out, batch * count, count, channels, height, width,
            size, num_scales, CELLS=block, ACC=_accumulator(images, locations), num_warps=4,
        )  # fmt: skip
    return out


@extract_glimpses.register_fake
def _(images: Tensor, locations: Tensor, size: int, num_scales: int) -> Tensor:
    return images.new_empty(images.shape[0], locations.shape[1], num_scales, images.shape[1], size, size)


@torch.library.custom_op("lamina::extract_glimpses_backward", mutates_args=())
def extract_glimpses_backward(grad: Tensor, locations: Tensor, shape: Sequence[int]) -> Tensor:
    """Of images of this (B, C, H, W), given that of the glimpses."""
    out = grad.new_empty(shape)
    batch, channels, height, width = shape
    if out.numel() == 0:
        return out
    if grad.numel() == 0:
        return out.zero_()
    tile_rows = min(_TILE[0], triton.next_power_of_2(height))
    tile_columns = min(_TILE[1], triton.next_power_of_2(width))
    programs = batch * channels * triton.cdiv(height, tile_rows) * triton.cdiv(width, tile_columns)
    with torch.cuda.device_of(grad):
        backward_kernel[(programs,)](
            grad.contiguous(), locations.contiguous(), out, locations.shape[1], channels, height, width,
            grad.shape[-1], grad.shape[2], ROWS=tile_rows, COLUMNS=tile_columns,
            ACC=_accumulator(grad, locations), num_warps=4,
        )  # fmt: skip
    return out


@extract_glimpses_backward.register_fake
def _(grad: Tensor, locations: Tensor, shape: Sequence[int]) -> Tensor:
    return grad.new_empty(tuple(shape))


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, locations, _, _ = inputs
    ctx.shape = images.shape
    ctx.save_for_backward(locations)


def _forward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (locations,) = ctx.saved_tensors
    return extract_glimpses_backward(grad, locations, ctx.shape), None, None, None


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, locations, _ = inputs
    ctx.size, ctx.num_scales = grad.shape[-1], grad.shape[2]
    ctx.save_for_backward(locations)


def _backward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (locations,) = ctx.saved_tensors
    return extract_glimpses(grad, locations, ctx.size, ctx.num_scales), None, None


extract_glimpses.register_autograd(_forward_gradient, setup_context=_forward_context)
extract_glimpses_backward.register_autograd(_backward_gradient, setup_context=_backward_context)
fold_into_batch(extract_glimpses, ["images", "locations"])


def _accumulator(pixels: Tensor, locations: Tensor) -> tl.dtype:
    return tl.float64 if torch.float64 in (pixels.dtype, locations.dtype) else tl.float32


@triton.jit
def corner(locations, glimpse, AXIS: tl.constexpr, length, cells, ACC: tl.constexpr):
    """Along an axis: the first pixel of the first of `cells` samples, and how much of the sample is past it.

    Far outside, where all is zero, it is as near as that, so that infinity is too; NaN stays what it is.
    """
    middle = (tl.load(locations + glimpse * 2 + AXIS).to(ACC) + 1) * (length / 2) - 0.5
    place = middle - (cells - 1) / 2
    place = tl.maximum(place, -cells - 2.0, propagate_nan=ALL)
    place = tl.minimum(place, length + 1.0, propagate_nan=ALL)
    first = tl.floor(tl.where(place == place, place, 0.0))
    return first.to(tl.int32), place - first


@triton.jit
def share(k, past, step):
    """How much of the k-th pixel of a cell lies in it, of step + 1 pixels."""
    return tl.where(k == 0, 1 - past, tl.where(k == step, past, 1.0))


@triton.jit
def forward_kernel(
    images, locations, out, glimpses, count, channels, height, width, size, num_scales,
    CELLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """CELLS cells of one scale of one glimpse; the widest scale, whose cells take longest, comes first."""
    cells = channels * size * size
    blocks = tl.cdiv(cells, CELLS)
    program = tl.program_id(0)
    block = program % blocks
    glimpse = (program // blocks % glimpses).to(tl.int64)
    scale = num_scales - 1 - program // blocks // glimpses
    step = tl.cast(1, tl.int32) << scale
    y, down = corner(locations, glimpse, 1, height, size * step, ACC)
    x, across = corner(locations, glimpse, 0, width, size * step, ACC)
    cell = block * CELLS + tl.arange(0, CELLS)
    inside = cell < cells
    channel = cell // (size * size)
    y += cell // size % size * step
    x += cell % size * step
    base = images + ((glimpse // count) * channels + channel) * height * width
    total = tl.zeros((CELLS,), ACC)
    for i in range(step + 1):
        row = y + i
        in_row = inside & (row >= 0) & (row < height)
        line = tl.zeros((CELLS,), ACC)
        for j in range(step + 1):
            column = x + j
            found = in_row & (column >= 0) & (column < width)
            pixel = tl.load(base + row.to(tl.int64) * width + column, mask=found, other=0.0).to(ACC)
            line += pixel * share(j, across, step)
        total += line * share(i, down, step)
    at = out + (glimpse * num_scales + scale) * cells + cell
    tl.store(at, total * (1.0 / (step * step)), mask=inside)


@triton.jit
def cells_of(pixel, first, past, step, size):
    """The two cells that a pixel may lie in, and how much of it does: none where there is no such cell."""
    k = pixel - first
    cell = k // step  # of negative k too many, and none at all is there
    last = k - cell * step
    there = (k >= 0) & (cell < size)
    before = (k >= step) & (last == 0) & (cell <= size)
    of_cell = tl.where(there, share(last, past, step), 0.0)
    of_before = tl.where(before, past, 0.0)
    return tl.where(there, cell, 0), of_cell, tl.where(before, cell - 1, 0), of_before


@triton.jit
def backward_kernel(
    grad, locations, out, count, channels, height, width, size, num_scales,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of pixels of one channel of one image: from every glimpse of it that sees one of them."""
    across_tiles = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * across_tiles
    program = tl.program_id(0)
    row0 = program % tiles // across_tiles * ROWS
    column0 = program % tiles % across_tiles * COLUMNS
    image = (program // tiles // channels).to(tl.int64)
    channel = program // tiles % channels
    row, column = row0 + tl.arange(0, ROWS), column0 + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for glimpse in range(count):
        at = image * count + glimpse
        for scale in range(num_scales):
            step = tl.cast(1, tl.int32) << scale
            y, down = corner(locations, at, 1, height, size * step, ACC)
            x, across = corner(locations, at, 0, width, size * step, ACC)
            seen = (y < row0 + ROWS) & (y + size * step >= row0)
            seen = seen & (x < column0 + COLUMNS) & (x + size * step >= column0)
            total += (down + across) * 0  # NaN of a location that is none
            if seen:
                i0, down0, i1, down1 = cells_of(row, y, down, step, size)
                j0, across0, j1, across1 = cells_of(column, x, across, step, size)
                base = grad + ((at * num_scales + scale) * channels + channel) * size * size
                for far in tl.static_range(4):
                    i, of_row = (i1, down1) if far // 2 else (i0, down0)
                    j, of_column = (j1, across1) if far % 2 else (j0, across0)
                    found = (of_row != 0)[:, None] & (of_column != 0)[None, :]
                    cell = tl.load(base + i[:, None] * size + j[None, :], mask=found, other=0.0)
                    total += cell.to(ACC) * (of_row[:, None] * of_column[None, :] * (1.0 / (step * step)))
    pixels = ((image * channels + channel) * height + row)[:, None] * width + column[None, :]
    tl.store(out + pixels, total, mask=(row < height)[:, None] & (column < width)[None, :])
