"""What the kernels of LSH attention share: who stands where, who sees whom, and the scores of one tile.

Places count from the start of the program's own round, in whole chunks: a place before it or behind its end
is one of the rounds beside it where all form a ring, and of nobody otherwise. Scores are in units of log 2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._attention_tiles import LOG2E


class Ring(NamedTuple):
    """Where the tokens stand. None is left out."""

    order: Any  # (B, H, R, L), the token at each place
    labels: Any  # (B, H, R, L), the bucket at each place, where only one's own is seen
    places: Any  # (B, H, R, L), where each token stands, for pairs that count once
    lengths: Any  # (B,), how many tokens take part: the first ones of the order
    rounds: int
    length: int
    chunks: int  # of a round


class Parts(NamedTuple):
    """(B, H, R, L, D), one for each round, whose last dimension is contiguous."""

    at: Any
    batch: int
    head: int
    round: int
    row: int


@triton.jit
def taking_part(ring, b):
    """How many tokens take part."""
    real = ring.length
    if ring.lengths is not None:
        real = tl.load(ring.lengths + b).to(tl.int32)
    return real


@triton.jit
def whose(ring, pair, r, at, stop, real, CHUNK: tl.constexpr, CIRCULAR: tl.constexpr):
    """Of each place before `stop`: its token, its place in the ring, its label, and whether one is there."""
    span = ring.chunks * CHUNK
    if CIRCULAR:
        place = (r * span + at + ring.rounds * span) % (ring.rounds * span)
        turn = place // span
        at_home = place - turn * span
        there = (at < stop) & (at_home < real)
    else:
        place = r * span + at
        turn = r + tl.zeros_like(at)
        at_home = at
        there = (at >= 0) & (at < tl.minimum(stop, real))
    first = (pair * ring.rounds + turn) * ring.length
    token = tl.load(ring.order + first + at_home, mask=there, other=0).to(tl.int32)
    label = token
    if ring.labels is not None:
        label = tl.load(ring.labels + first + at_home, mask=there, other=0)
        if CIRCULAR:  # a bucket of another round is another bucket
            wide = tl.int64 if label.dtype == tl.int64 else tl.int32
            label = label.to(wide) * ring.rounds + turn
    return token, place, label, there


@triton.jit
def chunk_of(at, REACH: tl.constexpr, CHUNK: tl.constexpr):
    """The chunk of a place; `REACH` chunks before the round are as far as anyone sees."""
    return (at + REACH * CHUNK) // CHUNK - REACH


@triton.jit
def gather(x, b, h, i, there, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The rows i, (rows, BLOCK), zero where none is there and from column SIZE on."""
    d = tl.arange(0, BLOCK)
    at = x.at + b * x.batch + h * x.head + i.to(tl.int64)[:, None] * x.row + d[None, :]
    inside = there[:, None]
    if SIZE != BLOCK:
        inside = inside & (d[None, :] < SIZE)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def scatter(x, b, h, r, i, there, values, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the rows i of round r."""
    d = tl.arange(0, BLOCK)
    first = x.at + b * x.batch + h * x.head + r.to(tl.int64) * x.round
    inside = there[:, None]
    if SIZE != BLOCK:
        inside = inside & (d[None, :] < SIZE)
    at = first + i.to(tl.int64)[:, None] * x.row + d[None, :]
    tl.store(at, values.to(x.at.dtype.element_ty), mask=inside)


@triton.jit
def inverse_length(rows, SIZE: tl.constexpr, ACC: tl.constexpr):
    """What brings a key to unit length: one over the root of x . x + 1e-6 D."""
    wide = rows.to(ACC)
    return tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6 * SIZE)


@triton.jit
def meetings(
    ring, pair, i, there_i, j, there_j,
    CHUNK: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr, CIRCULAR: tl.constexpr,
):  # fmt: skip
    """In how many places of all rounds the queries i see the keys j: at least 0, as far as they are there."""
    total = (i + j) * 0
    first = pair * ring.rounds * ring.length
    around = ring.rounds * ring.chunks
    for a in range(ring.rounds):
        from_a = first + a * ring.length
        place_i = tl.load(ring.places + from_a + i, mask=there_i, other=0)
        if CIRCULAR:
            for c in range(ring.rounds):
                from_c = first + c * ring.length
                place_j = tl.load(ring.places + from_c + j, mask=there_j, other=0)
                apart = (c - a) * ring.chunks + place_j // CHUNK - place_i // CHUNK + BACK
                meet = (apart + around) % around <= BACK + AHEAD
                if ring.labels is not None:
                    of_i = tl.load(ring.labels + from_a + place_i, mask=there_i, other=0)
                    of_j = tl.load(ring.labels + from_c + place_j, mask=there_j, other=0)
                    meet = meet & (of_i == of_j) & (a == c)
                total += meet.to(tl.int32)
        else:
            place_j = tl.load(ring.places + from_a + j, mask=there_j, other=0)
            apart = place_j // CHUNK - place_i // CHUNK
            meet = (apart >= -BACK) & (apart <= AHEAD)
            if ring.labels is not None:
                of_i = tl.load(ring.labels + from_a + place_i, mask=there_i, other=0)
                of_j = tl.load(ring.labels + from_a + place_j, mask=there_j, other=0)
                meet = meet & (of_i == of_j)
            total += meet.to(tl.int32)
    return total


@triton.jit
def scores(
    products, inverse, ring, pair, i, chunk_i, label_i, there_i, j, chunk_j, label_j, there_j,
    CHUNK: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr, CIRCULAR: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores of products x[i] . x[j] times log2(e); -inf where query i does not see key j.

    What is of queries and of keys are vectors that broadcast to the tile, whichever are its rows. Where the
    tile is `WHOLE`, all that is there is in reach.
    """
    s = products * (inverse * (SCALE * LOG2E))
    if ring.places is not None:
        times = meetings(ring, pair, i, there_i, j, there_j, CHUNK, BACK, AHEAD, CIRCULAR)
        s -= tl.log2(tl.maximum(times, 1).to(ACC))
    visible = there_i & there_j
    visible = visible & ((j < i) if CAUSAL else (j != i))
    if not WHOLE:
        apart = chunk_j - chunk_i
        visible = visible & (apart >= -BACK) & (apart <= AHEAD)
    if ring.labels is not None:
        visible = visible & (label_i == label_j)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def kept(
    seed, dropout, pair, place_i, chunk_i, at_j,
    CHUNK: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Which weights dropout leaves, by the query's place in the ring and the key's place in what it sees."""
    slot = at_j - (chunk_i - BACK) * CHUNK
    return tl.rand(tl.load(seed) + pair, place_i * ((BACK + 1 + AHEAD) * CHUNK) + slot) >= dropout


@triton.jit
def kept_alone(seed, dropout, pair, i):
    """The same of tokens that see no other: their numbers count from the other end."""
    return tl.rand(tl.load(seed) + pair, -1 - i) >= dropout
