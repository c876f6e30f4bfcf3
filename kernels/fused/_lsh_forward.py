"""The forward kernels of LSH attention: a round at a time, and all rounds together."""

import triton
import triton.language as tl

from ._attention_tiles import dot, store_rows
from ._lsh_tiles import (
    chunk_of,
    gather,
    inverse_length,
    kept,
    kept_alone,
    scatter,
    scores,
    taking_part,
    whose,
)


@triton.jit
def _attend(
    total, peak, mass, own, x, v, ring, seed, dropout, b, h, pair, r, i, place_i, chunk_i, label_i, there_i,
    start, stop, real,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr,
    CIRCULAR: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes the keys at the places from `start` on into the running softmax: sum, peak and mass."""
    at = start + tl.arange(0, COLUMNS)
    j, _, label_j, there_j = whose(ring, pair, r, at, stop, real, CHUNK, CIRCULAR)
    key = gather(x, b, h, j, there_j, SIZE, BLOCK)
    value = gather(v, b, h, j, there_j, V_SIZE, V_BLOCK)
    s = scores(
        dot(own, tl.trans(key), ACC, PRECISION), inverse_length(key, SIZE, ACC)[None, :], ring, pair,
        i[:, None], chunk_i[:, None], label_i[:, None], there_i[:, None],
        j[None, :], chunk_of(at, BACK, CHUNK)[None, :], label_j[None, :], there_j[None, :],
        CHUNK, BACK, AHEAD, CIRCULAR, CAUSAL, WHOLE, SCALE, ACC,
    )  # fmt: skip
    higher = tl.maximum(peak, tl.max(s, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(peak - safe)
    mass = mass * shrink + tl.sum(p, 1)
    if seed is not None:
        keep = kept(seed, dropout, pair, place_i[:, None], chunk_i[:, None], at[None, :], CHUNK, BACK, AHEAD)
        p = tl.where(keep, p / (1 - dropout), 0.0)
    total = total * shrink[:, None] + dot(p.to(value.dtype), value, ACC, PRECISION)
    return total, higher, mass


@triton.jit
def forward_kernel(
    x, v, out, lse, ring, seed, dropout, heads,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr,
    CIRCULAR: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, ONCE: tl.constexpr,
    SINGLE: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS neighbours of one round: their outputs and the logarithms of their softmax's mass.

    Both are written where the tokens stand, not where they were sorted to. A tile is `WHOLE` where it lies in
    one chunk, and its keys are taken at `ONCE` where they fit. A `SINGLE` round's output is the operation's.
    """
    tiles = tl.cdiv(ring.length, ROWS)
    first = tl.program_id(0) % tiles * ROWS
    r = tl.program_id(0) // tiles % ring.rounds
    pair = (tl.program_id(0) // tiles // ring.rounds).to(tl.int64)
    b, h = pair // heads, pair % heads
    real = taking_part(ring, b)
    at = first + tl.arange(0, ROWS)
    i, place_i, label_i, inside = whose(ring, pair, r, at, ring.length, ring.length, CHUNK, CIRCULAR)
    there_i = at < real
    own = gather(x, b, h, i, there_i, SIZE, BLOCK)
    chunk_i = at // CHUNK
    total = tl.zeros((ROWS, V_BLOCK), ACC)
    peak = tl.full((ROWS,), float("-inf"), ACC)
    mass = tl.zeros((ROWS,), ACC)
    start = (first // CHUNK - BACK) * CHUNK
    stop = ((tl.minimum(first + ROWS, ring.length) - 1) // CHUNK + 1 + AHEAD) * CHUNK
    if ONCE:
        total, peak, mass = _attend(
            total, peak, mass, own, x, v, ring, seed, dropout, b, h, pair, r, i, place_i, chunk_i, label_i,
            there_i, start, stop, real, SIZE, V_SIZE, BLOCK, V_BLOCK, COLUMNS, CHUNK, BACK, AHEAD, CIRCULAR,
            CAUSAL, WHOLE, SCALE, ACC, PRECISION,
        )  # fmt: skip
    else:
        if not CIRCULAR:
            start = tl.maximum(start, 0)
            stop = tl.minimum(stop, real)
        stop = tl.where(first < real, stop, start)
        for j0 in range(start, stop, COLUMNS):
            total, peak, mass = _attend(
                total, peak, mass, own, x, v, ring, seed, dropout, b, h, pair, r, i, place_i, chunk_i,
                label_i, there_i, j0, stop, real, SIZE, V_SIZE, BLOCK, V_BLOCK, COLUMNS, CHUNK, BACK, AHEAD,
                CIRCULAR, CAUSAL, WHOLE, SCALE, ACC, PRECISION,
            )  # fmt: skip
    empty = mass == 0
    mass = tl.where(empty, 1.0, mass)
    total = tl.where(empty[:, None], 0.0, total / mass[:, None])
    if SINGLE:
        total += _itself(v, b, h, i, empty & there_i, seed, dropout, pair, V_SIZE, V_BLOCK, ACC)
    scatter(out, b, h, r, i, inside, total, V_SIZE, V_BLOCK)
    log_mass = tl.where(empty, float("-inf"), peak + tl.log2(mass))
    tl.store(lse + (pair * ring.rounds + r) * ring.length + i, log_mass, mask=inside)


@triton.jit
def _itself(
    v, b, h, i, alone, seed, dropout, pair, V_SIZE: tl.constexpr, V_BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """The values of tokens that are `alone`, who attend to themselves."""
    value = gather(v, b, h, i, alone, V_SIZE, V_BLOCK).to(ACC)
    if seed is not None:
        keep = kept_alone(seed, dropout, pair, i)
        value = tl.where(keep[:, None], value / (1 - dropout), 0.0)
    return value


@triton.jit
def combine_kernel(
    parts, masses, v, out, lse, mask, seed, dropout, heads, rounds, length,
    V_SIZE: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of all rounds: the mean of the rounds' outputs, each in proportion to its mass."""
    tiles = tl.cdiv(length, ROWS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = pair // heads, pair % heads
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = i < length
    masses += pair * rounds * length + i
    d = tl.arange(0, V_BLOCK)
    rows = parts.at + b * parts.batch + h * parts.head + i.to(tl.int64)[:, None] * parts.row + d[None, :]
    step = tl.cast(parts.round, tl.int64)  # some rounds of it may not fit into 32 bits
    cells = inside[:, None] & (d[None, :] < V_SIZE)
    peak = tl.full((ROWS,), float("-inf"), ACC)
    for r in range(rounds):
        peak = tl.maximum(peak, tl.load(masses + r * length, mask=inside, other=float("-inf")))
    empty = peak == float("-inf")
    peak = tl.where(empty, 0.0, peak)
    mass = tl.zeros((ROWS,), ACC)
    total = tl.zeros((ROWS, V_BLOCK), ACC)
    for r in range(rounds):
        share = tl.exp2(tl.load(masses + r * length, mask=inside, other=float("-inf")) - peak)
        mass += share
        total += tl.load(rows + r * step, mask=cells, other=0.0).to(ACC) * share[:, None]
    mass = tl.where(empty, 1.0, mass)
    alone = empty & inside
    if mask is not None:
        alone = alone & (tl.load(mask + b * length + i, mask=inside, other=0) != 0)
    total = total / mass[:, None] + _itself(v, b, h, i, alone, seed, dropout, pair, V_SIZE, V_BLOCK, ACC)
    store_rows(out, b, h, 0, i.to(tl.int64), length, total, V_SIZE, V_BLOCK)
    tl.store(lse + pair * length + i, tl.where(empty, float("-inf"), peak + tl.log2(mass)), mask=inside)


@triton.jit
def kept_kernel(
    out, alone, seed, dropout, length, rounds, count,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What dropout leaves of the weights of ROWS places of the ring, and of tokens that see no other."""
    places = rounds * count * CHUNK
    tiles = tl.cdiv(places, ROWS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    width: tl.constexpr = (BACK + 1 + AHEAD) * CHUNK
    chunk = place % (count * CHUNK) // CHUNK
    for first in range(0, width, COLUMNS):
        slot = first + tl.arange(0, COLUMNS)
        at = (chunk[:, None] - BACK) * CHUNK + slot[None, :]
        keep = kept(seed, dropout, pair, place[:, None], chunk[:, None], at, CHUNK, BACK, AHEAD)
        inside = (place[:, None] < places) & (slot[None, :] < width)
        tl.store(
            out + (pair * places + place[:, None]) * width + slot[None, :], keep.to(tl.uint8), mask=inside
        )
    inside = place < length
    tl.store(alone + pair * length + place, kept_alone(seed, dropout, pair, place).to(tl.uint8), mask=inside)
