"""Triton kernels of the nearest code: a scan of lower bounds, and what it leaves open, settled in float64.

Of a vector x and a code c, both from one origin, the scan needs |c|² - 2 x · c. Its product is of rounded
numbers (TF32, or 16 bits as they came), so it knows that to within an error, which it bounds:

    |x| slack + squares |c|²,    slack = 2 (|c| rounding of x + |c - rounded c| + |c| rounding of the sum)

Codes j, j + COLUMNS, j + 2 COLUMNS … share a slot: of each the scan keeps the least lower bound, the code
that it is of, and the second least. Every code whose lower bound is not above the upper bound of some other
may be the nearest. These are held by the slots, unless a second bound is as low too: then another scan finds
them all. Their distances are compared in float64, so that the scan's precision costs time and no exactness.
What is NaN is above and below nothing, and so is settled too.
"""

import triton
import triton.language as tl

from ._attention_tiles import dot

ALL = tl.constexpr(tl.PropagateNan.ALL)
SHORTEST = tl.constexpr(1e-15)  # a shorter vector's errors are bounded as this one's: its squares underflow
WIDER = tl.constexpr(1.01)  # than the bounds come out, which are computed in float32 themselves


@triton.jit
def rounded(x):
    """float32 to the ten bits of TF32's mantissa, to the nearest: tensor cores would cut the rest off."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def load_vectors(vectors, rows, inside, d0, D, BLOCK: tl.constexpr):
    """(rows, BLOCK) from channel d0 on, zero beyond D and where it is not `inside`.

    Rows that lie together are counted in 32 bits, from the pointer that is given: half the registers.
    """
    d = d0 + tl.arange(0, BLOCK)
    at = vectors + (rows[:, None] * D + d[None, :])
    return tl.load(at, mask=inside[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def from_origin(vectors, origin, rows, inside, d0, D, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The same in ACC, less the origin where there is one."""
    x = load_vectors(vectors, rows, inside, d0, D, BLOCK).to(ACC)
    if origin is not None:
        d = d0 + tl.arange(0, BLOCK)
        x -= tl.load(origin + d, mask=d < D, other=0.0)[None, :]
        x = tl.where(inside[:, None], x, 0.0)
    return x


@triton.jit
def multiplied(x, origin, rows, inside, d0, D, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """What the scan multiplies: the vectors as they are, or rounded where they are taken from an origin."""
    if origin is not None:
        part = rounded(from_origin(x, origin, rows, inside, d0, D, BLOCK, ACC))
    else:
        part = load_vectors(x, rows, inside, d0, D, BLOCK)
    return part


@triton.jit
def codes_kernel(
    codebook, origin, codes, low, slack, K, D, of_vectors, of_squares,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of ROWS codes: what is multiplied, where it is not themselves; |c|² from below; the slack."""
    begin = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = rows < K - begin
    codebook += begin * D
    square = tl.zeros((ROWS,), ACC)
    residual = tl.zeros((ROWS,), ACC)
    for d0 in range(0, D, BLOCK):
        c = from_origin(codebook, origin, rows, inside, d0, D, BLOCK, ACC)
        square += tl.sum(c * c, 1)
        if origin is not None:
            near = rounded(c)
            residual += tl.sum((c - near) * (c - near), 1)
            d = d0 + tl.arange(0, BLOCK)
            at = codes + begin * D + (rows[:, None] * D + d[None, :])
            tl.store(at, near, mask=inside[:, None] & (d[None, :] < D))
    length = tl.maximum(tl.sqrt(square), SHORTEST, propagate_nan=ALL)
    tl.store(slack + begin + rows, (length * of_vectors + tl.sqrt(residual)) * (2 * WIDER), mask=inside)
    tl.store(low + begin + rows, square - square * of_squares, mask=inside)


@triton.jit
def lower_bounds(
    x, tile, codes, origin, low, slack, rows, inside, length, first, stop, D,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of |c|² - 2 x · c for the codes from `first` on, (rows, COLUMNS); infinite from `stop` on.

    `tile` is the vectors, where they are no longer than BLOCK; else they are read again and again.
    """
    columns = tl.arange(0, COLUMNS)
    j = first + columns
    there = j < stop
    codes += tl.cast(first, tl.int64) * D
    if tile is not None:
        products = dot(tile, tl.trans(load_vectors(codes, columns, there, 0, D, BLOCK)), ACC, "tf32")
    else:
        products = tl.zeros((rows.shape[0], COLUMNS), ACC)
        for d0 in range(0, D, BLOCK):
            part = multiplied(x, origin, rows, inside, d0, D, BLOCK, ACC)
            products += dot(part, tl.trans(load_vectors(codes, columns, there, d0, D, BLOCK)), ACC, "tf32")
    least = tl.load(low + j, mask=there, other=float("inf"))
    error = tl.load(slack + j, mask=there, other=0.0)
    return least[None, :] - length[:, None] * error[None, :] - 2 * products


@triton.jit
def settled(candidates, codes, x, codebook, rows, distance, index, K, D, BLOCK: tl.constexpr):
    """The least distance in float64, and of which code, among `candidates` of the `codes` and what there was.

    NaN is the least of all, as it is to argmin. Of equal distances that of the lower code stays: candidates
    are gone through upwards.
    """
    next = tl.min(tl.where(candidates, codes, K), 1)
    while tl.min(next, 0) < K:
        there = next < K
        apart = tl.zeros((rows.shape[0],), tl.float64)
        for d0 in range(0, D, BLOCK):
            ours = load_vectors(x, rows, there, d0, D, BLOCK).to(tl.float64)
            ours -= load_vectors(codebook, next.to(tl.int64), there, d0, D, BLOCK).to(tl.float64)
            apart += tl.sum(ours * ours, 1)
        nearer = there & (distance == distance) & ~(apart >= distance)
        distance = tl.where(nearer, apart, distance)
        index = tl.where(nearer, next, index)
        candidates = candidates & (codes > next[:, None]) & (distance == distance)[:, None]
        next = tl.min(tl.where(candidates, codes, K), 1)
    return distance, index


@triton.jit
def nearest_kernel(
    x, codebook, codes, origin, low, slack, index, distance, N, K, D, part, of_squares,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    GATHERED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The nearest of `part` codes to each of ROWS vectors; with its distance where others have the rest."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = rows < N - row
    x += row * D
    begin = tl.program_id(1) * part
    stop = tl.minimum(begin + part, K)

    square = tl.zeros((ROWS,), ACC)
    for d0 in range(0, D, BLOCK):
        some = from_origin(x, origin, rows, inside, d0, D, BLOCK, ACC)
        square += tl.sum(some * some, 1)
    length = tl.maximum(tl.sqrt(square), SHORTEST, propagate_nan=ALL)
    tile = multiplied(x, origin, rows, inside, 0, D, BLOCK, ACC) if WHOLE else None

    best = tl.full((ROWS, COLUMNS), float("inf"), ACC)
    second = tl.full((ROWS, COLUMNS), float("inf"), ACC)
    place = tl.zeros((ROWS, COLUMNS), tl.int32) + begin
    for first in range(begin, stop, COLUMNS):
        bound = lower_bounds(
            x, tile, codes, origin, low, slack, rows, inside, length, first, stop, D,
            COLUMNS, BLOCK, ACC,
        )  # fmt: skip
        higher = tl.maximum(best, bound, propagate_nan=ALL)
        second = tl.minimum(second, higher, propagate_nan=ALL)  # where a bound is NaN it stays NaN
        lower = bound < best
        best = tl.where(lower, bound, best)
        place = tl.where(lower, first, place)

    held = place + tl.arange(0, COLUMNS)[None, :]
    there = held < stop
    wide = length[:, None] * tl.load(slack + held, mask=there, other=0.0)
    wide += of_squares * tl.load(low + held, mask=there, other=0.0)
    upper = tl.min(best + wide * (2 * WIDER), 1)
    complete = tl.max((~(second > upper[:, None])).to(tl.int32), 1) == 0
    candidates = there & (best <= upper[:, None]) & (complete & inside)[:, None]
    found = tl.min(tl.where(candidates, held, K), 1)
    nearest = tl.where(complete, found, begin)
    least = tl.full((ROWS,), float("inf"), tl.float64)
    if distance is None:
        alone = tl.sum(candidates.to(tl.int32), 1) == 1
        candidates = candidates & ~alone[:, None]
    least, nearest = settled(candidates, held, x, codebook, rows, least, nearest, K, D, GATHERED)

    missed = inside & ~complete
    if tl.max(missed.to(tl.int32), 0) > 0:
        for first in range(begin, stop, COLUMNS):
            bound = lower_bounds(
                x, tile, codes, origin, low, slack, rows, inside, length, first, stop, D,
                COLUMNS, BLOCK, ACC,
            )  # fmt: skip
            j = first + tl.arange(0, COLUMNS)
            here = ~(bound > upper[:, None]) & (j < stop)[None, :] & (missed & (least == least))[:, None]
            j = tl.broadcast_to(j[None, :], (ROWS, COLUMNS))
            least, nearest = settled(here, j, x, codebook, rows, least, nearest, K, D, GATHERED)

    if distance is None:
        tl.store(index + row + rows, nearest.to(tl.int64), mask=inside)
    else:
        at = tl.program_id(1).to(tl.int64) * N + row + rows
        tl.store(index + at, nearest.to(tl.int64), mask=inside)
        tl.store(distance + at, least, mask=inside)


@triton.jit
def merged_kernel(indices, distances, index, N, parts, ROWS: tl.constexpr):
    """Of the nearest codes of all parts the nearest, and of two as near that of the lower part."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    least = tl.load(distances + rows, mask=inside, other=0.0)
    nearest = tl.load(indices + rows, mask=inside, other=0)
    for p in range(1, parts):
        at = tl.cast(p, tl.int64) * N + rows
        distance = tl.load(distances + at, mask=inside, other=0.0)
        nearer = (least == least) & ~(distance >= least)
        least = tl.where(nearer, distance, least)
        nearest = tl.where(nearer, tl.load(indices + at, mask=inside, other=0), nearest)
    tl.store(index + rows, nearest, mask=inside)
