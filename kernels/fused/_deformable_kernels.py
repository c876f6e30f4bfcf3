"""The kernels of deformable sampling: forward, backward, and the sums that stand for the backward's atomics.

A program has one head of one image. The rows of its tile are samples, or the cells that were sampled, and the
columns are channels, which lie side by side in memory: positions and shares are computed once a row.

`sizes` holds the height and width of each level, each as 2 size + 1. Of a tuple's integers Triton compiles a
kernel for those that are 1 and for multiples of 16; odd numbers above are neither, so a picture of a new size
compiles nothing.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _level(sizes, s: tl.constexpr):
    """Height and width."""
    return sizes[2 * s] >> 1, sizes[2 * s + 1] >> 1


@triton.jit
def _pixels(locations, n, axis, taken, size, ACC: tl.constexpr):
    """A coordinate of the samples n, in cells from the centre of the first. Those not taken lie outside."""
    location = tl.load(locations + 2 * n + axis, mask=taken, other=-1.0).to(ACC)
    size = size.to(ACC)
    # The product is rounded before the half is taken off, as in the definition. A fused multiply-add moves
    # samples off the centres of cells, where a model has them at its start, and takes the other derivative.
    product = location * size if INTERPRETED else libdevice.mul_rn(location, size)
    return product - 0.5


@triton.jit
def _place(locations, n, axis, taken, size, ACC: tl.constexpr):
    """The cell before each sample on an axis, and how far the sample is past the centre of that.

    A location that is NaN is outside of the level, at a distance of NaN, which all that it weighs becomes.
    """
    pixels = _pixels(locations, n, axis, taken, size, ACC)
    # As in the definition, for infinity to be outside too. Comparisons, unlike a minimum, leave NaN.
    pixels = tl.where(pixels < -2.0, -2.0, pixels)
    pixels = tl.where(pixels > size + 1.0, size + 1.0, pixels)
    before = tl.floor(pixels)
    return tl.where(before == before, before, -2.0).to(tl.int32), (pixels - before).to(ACC)


@triton.jit
def _both(before, size):
    """Whether the cell before a sample is one of the level's, and whether the next is."""
    return (before >= 0) & (before < size), (before >= -1) & (before < size - 1)


@triton.jit
def _channels(inside, d, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows that are inside, the channels that there are."""
    mask = inside[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (d[None, :] < SIZE)
    return mask


@triton.jit
def _weighed(value, at, inside, share, d, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Rows of channels, each times its share. What is outside is not read, whatever its share."""
    cells = tl.load(value + at[:, None] + d[None, :], mask=_channels(inside, d, SIZE, BLOCK), other=0.0)
    return share[:, None] * cells.to(ACC)


@triton.jit
def _store(at, x, mask):
    """Rounds to what is stored; from float64 to bfloat16 there is no way but through float32."""
    if at.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.float32)
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["cells", "queries"])
def forward_kernel(
    value, locations, weights, out, sizes, cells, queries, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    QUERIES: tl.constexpr, TOGETHER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """QUERIES outputs, BLOCK channels of each. A query's points are TOGETHER rows at a time."""
    rest, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    tiles = tl.cdiv(queries, QUERIES)
    b = (rest // tiles).to(tl.int64)
    row = tl.arange(0, QUERIES * TOGETHER)
    q = rest % tiles * QUERIES + row // TOGETHER
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first_sample = ((b * queries + q) * heads + h) * (LEVELS * POINTS)
    step = heads * SIZE  # from a cell to the next
    level = b * cells * step + h * SIZE
    total = tl.zeros((QUERIES * TOGETHER, BLOCK), ACC)
    for s in tl.static_range(LEVELS):
        height, width = _level(sizes, s)
        for p0 in range(0, POINTS, TOGETHER):
            p = p0 + row % TOGETHER
            taken = (q < queries) & (p < POINTS)
            n = first_sample + s * POINTS + p
            x, across = _place(locations, n, 0, taken, width, ACC)
            y, down = _place(locations, n, 1, taken, height, ACC)
            weight = tl.load(weights + n, mask=taken, other=0.0).to(ACC)
            at = level + (y * width + x).to(tl.int64) * step
            left, right = _both(x, width)
            upper, lower = _both(y, height)
            above, below = (1 - down) * weight, down * weight
            total += _weighed(value, at, upper & left, above * (1 - across), d, SIZE, BLOCK, ACC)
            total += _weighed(value, at + step, upper & right, above * across, d, SIZE, BLOCK, ACC)
            at += width.to(tl.int64) * step
            total += _weighed(value, at, lower & left, below * (1 - across), d, SIZE, BLOCK, ACC)
            total += _weighed(value, at + step, lower & right, below * across, d, SIZE, BLOCK, ACC)
        level += (height * width).to(tl.int64) * step
    total = tl.sum(tl.reshape(total, (QUERIES, TOGETHER, BLOCK)), 1)
    q = rest % tiles * QUERIES + tl.arange(0, QUERIES)
    at = out + ((b * queries + q) * heads + h)[:, None] * SIZE + d[None, :]
    _store(at, total, _channels(q < queries, d, SIZE, BLOCK))


@triton.jit
def _tile(at, d, d_value, BLOCK: tl.constexpr):
    """Offsets of a tile of the backward pass.

    A thread's atomics take four numbers. So shall its loads, though it might take eight of 16 bits: else all
    goes through shared memory between the two.
    """
    at = at[:, None] + d[None, :]
    if d_value is not None:
        at = tl.max_contiguous(at, [1, min(4, BLOCK)])
    return at


@triton.jit
def _passed_back(
    grad, value, d_value, at, inside, share, d, PLACES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gives a corner's cells their part of the gradient, and returns their product with it."""
    at = _tile(at, d, d_value, BLOCK)
    mask = _channels(inside, d, SIZE, BLOCK)
    if d_value is not None:
        tl.atomic_add(d_value + at, share[:, None] * grad, mask=mask, sem="relaxed")
    product = tl.zeros(inside.shape, ACC)
    if PLACES:
        product = tl.sum(grad * tl.load(value + at, mask=mask, other=0.0).to(ACC), 1)
    return product


@triton.jit(do_not_specialize=["nowhere", "cells", "anchors", "queries"])
def backward_kernel(
    grad, value, locations, weights, d_value, d_locations, d_weights, keys, nowhere, sizes, cells, anchors,
    queries, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """ROWS points of all levels: the gradients that are not None, and the `keys` of `collect_kernel`.

    The gradient of the values is added up by atomics, of four channels each where a head has a multiple.
    """
    PLACES: tl.constexpr = d_locations is not None or d_weights is not None
    rest, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    tiles = tl.cdiv(queries * POINTS, ROWS)
    b = (rest // tiles).to(tl.int64)
    i = rest % tiles * ROWS + tl.arange(0, ROWS)
    q, p = i // POINTS, i % POINTS
    taken = q < queries
    first_sample = ((b * queries + q) * heads + h) * (LEVELS * POINTS)
    grad_at = ((b * queries + q) * heads + h) * SIZE
    step = heads * SIZE
    level = b * cells * step + h * SIZE
    d = tl.arange(0, BLOCK)
    grad_tile = grad + _tile(grad_at, d, d_value, BLOCK)
    g = tl.load(grad_tile, mask=_channels(taken, d, SIZE, BLOCK), other=0.0).to(ACC)
    anchor = (b * heads + h) * anchors
    for s in tl.static_range(LEVELS):
        height, width = _level(sizes, s)
        n = first_sample + s * POINTS + p
        x, across = _place(locations, n, 0, taken, width, ACC)
        y, down = _place(locations, n, 1, taken, height, ACC)
        if keys is not None:
            key = anchor + (y + 1) * (width + 1) + (x + 1)
            found = (x >= -1) & (x < width) & (y >= -1) & (y < height)
            _store(keys + n, tl.where(found, key, nowhere), taken)
            anchor += (height + 1).to(tl.int64) * (width + 1)
        if PLACES or d_value is not None:
            weight = tl.load(weights + n, mask=taken, other=0.0).to(ACC)
            at = level + (y * width + x).to(tl.int64) * step
            row_step = width.to(tl.int64) * step
            left, right = _both(x, width)
            upper, lower = _both(y, height)
            above, below = (1 - down) * weight, down * weight
            upper_left = tl.zeros((ROWS,), ACC)
            upper_right = tl.zeros((ROWS,), ACC)
            lower_left = tl.zeros((ROWS,), ACC)
            lower_right = tl.zeros((ROWS,), ACC)
            for d0 in range(0, SIZE, BLOCK):
                if SIZE > BLOCK:
                    d = d0 + tl.arange(0, BLOCK)
                    grad_tile = grad + _tile(grad_at, d, d_value, BLOCK)
                    g = tl.load(grad_tile, mask=_channels(taken, d, SIZE, BLOCK), other=0.0).to(ACC)
                upper_left += _passed_back(
                    g, value, d_value, at, upper & left, above * (1 - across), d, PLACES, SIZE, BLOCK, ACC
                )
                upper_right += _passed_back(
                    g, value, d_value, at + step, upper & right, above * across, d, PLACES, SIZE, BLOCK, ACC
                )
                lower_left += _passed_back(
                    g, value, d_value, at + row_step, lower & left, below * (1 - across), d, PLACES, SIZE,
                    BLOCK, ACC,
                )  # fmt: skip
                lower_right += _passed_back(
                    g, value, d_value, at + row_step + step, lower & right, below * across, d, PLACES, SIZE,
                    BLOCK, ACC,
                )  # fmt: skip
            on_top = (1 - across) * upper_left + across * upper_right
            beneath = (1 - across) * lower_left + across * lower_right
            if d_weights is not None:
                _store(d_weights + n, (1 - down) * on_top + down * beneath, taken)
            if d_locations is not None:
                by_x = (1 - down) * (upper_right - upper_left) + down * (lower_right - lower_left)
                _store(d_locations + 2 * n, by_x * weight * width, taken)
                _store(d_locations + 2 * n + 1, (beneath - on_top) * weight * height, taken)
        level += (height * width).to(tl.int64) * step


@triton.jit(do_not_specialize=["cells", "anchors"])
def collect_kernel(
    grad, locations, weights, order, starts, d_value, sizes, cells, anchors, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, CELLS: tl.constexpr,
    TOGETHER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of CELLS values, BLOCK channels of each: every sum in one order, without atomics.

    `order` has the samples, sorted by their anchors, the cells above and left of them; `starts` says where
    those of an anchor begin. Anchors are the cells of a level, and a row and a column before them. The
    samples around a cell have it as their anchor, or the one to its left, which is before it in the order, or
    one of the two above those. TOGETHER rows share the samples of a cell.
    """
    rest, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    tiles = tl.cdiv(cells, CELLS)
    b = (rest // tiles).to(tl.int64)
    row = tl.arange(0, CELLS * TOGETHER)
    cell = rest % tiles * CELLS + row // TOGETHER
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # The level of each cell: the last that does not begin behind it.
    height, width = tl.zeros(row.shape, tl.int32), tl.zeros(row.shape, tl.int32)
    first = tl.zeros(row.shape, tl.int32)
    anchor = tl.zeros(row.shape, tl.int64)
    start = tl.zeros((), tl.int32)
    first_anchor = (b * heads + h) * anchors
    for s in tl.static_range(LEVELS):
        level_height, level_width = _level(sizes, s)
        within = cell >= start
        height, width = tl.where(within, level_height, height), tl.where(within, level_width, width)
        first, anchor = tl.where(within, start, first), tl.where(within, first_anchor, anchor)
        start += level_height * level_width
        first_anchor += (level_height + 1).to(tl.int64) * (level_width + 1)
    y, x = (cell - first) // width, (cell - first) % width
    total = tl.zeros((CELLS * TOGETHER, BLOCK), ACC)
    for side in tl.static_range(2):  # the samples above, and those below
        at = starts + anchor + (y + side) * (width + 1) + x
        begin = tl.load(at, mask=cell < cells, other=0)
        end = tl.load(at + 2, mask=cell < cells, other=0)
        for i in range(0, tl.max(end - begin, 0).to(tl.int32), TOGETHER):
            place = begin + i + row % TOGETHER
            taken = place < end
            n = tl.load(order + place, mask=taken, other=0)
            across = _pixels(locations, n, 0, taken, width, ACC) - x
            down = _pixels(locations, n, 1, taken, height, ACC) - y
            weight = tl.load(weights + n, mask=taken, other=0.0).to(ACC)
            share = (1 - tl.abs(down)) * weight * (1 - tl.abs(across))
            total += _weighed(grad, n // (LEVELS * POINTS) * SIZE, taken, share, d, SIZE, BLOCK, ACC)
    total = tl.sum(tl.reshape(total, (CELLS, TOGETHER, BLOCK)), 1)
    cell = rest % tiles * CELLS + tl.arange(0, CELLS)
    at = d_value + ((b * cells + cell) * heads + h)[:, None] * SIZE + d[None, :]
    _store(at, total, _channels(cell < cells, d, SIZE, BLOCK))
