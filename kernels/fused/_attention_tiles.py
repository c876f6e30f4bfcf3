"""What the attention kernels share: how tensors are handed over, and the scores of one tile.

Rows are queries i and columns keys j, or the other way round: `scores` takes i and j as vectors that
broadcast to its tile. Scores are in units of log 2, so that the exponential is the hardware's.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Rows(NamedTuple):
    """(B, H, L, D), whose last dimension is contiguous."""

    at: Any
    batch: int
    head: int
    row: int


class Line(NamedTuple):
    """(B, H, L), whose last dimension is contiguous."""

    at: Any
    batch: int
    head: int


class Cells(NamedTuple):
    """(B, H, Lq, Lk); a stride is 0 where it broadcasts."""

    at: Any
    batch: int
    head: int
    row: int
    column: int


class Table(NamedTuple):
    """A bias (H, R) that is read at the difference of a query's position and a key's."""

    at: Any
    head: int
    query_positions: Any
    key_positions: Any


class Rules(NamedTuple):
    """What a score is besides the scaled product, and which pairs take part. None is left out."""

    mask: Cells | None
    bias: Cells | None
    table: Table | None
    coefficients: Any  # (H,), of the distance to the power POWER
    key_lengths: Any  # (B,)
    query_starts: Any  # (B + 1,), of sequences that lie one after the other
    key_starts: Any
    before: int | None  # keys that a query sees before its own place, and after it
    after: int | None


@triton.jit
def dot(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    if INTERPRETED:  # which multiplies bfloat16 wrongly; of rounded operands this is the same product
        product = tl.dot(a.to(ACC), b.to(ACC), out_dtype=ACC)
    else:
        product = tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)
    return product


@triton.jit
def extent(rules, b, longest_queries, longest_keys):
    """Where the sequence starts, and how many queries and keys it has, and how many of these take part."""
    first_query = tl.zeros((), tl.int64)
    first_key = tl.zeros((), tl.int64)
    queries = longest_queries
    keys = longest_keys
    if rules.query_starts is not None:
        first_query = tl.load(rules.query_starts + b).to(tl.int64)
        first_key = tl.load(rules.key_starts + b).to(tl.int64)
        queries = (tl.load(rules.query_starts + b + 1) - first_query).to(tl.int32)
        keys = (tl.load(rules.key_starts + b + 1) - first_key).to(tl.int32)
    taken = keys
    if rules.key_lengths is not None:
        taken = tl.minimum(keys, tl.load(rules.key_lengths + b).to(tl.int32))
    return first_query, first_key, queries, keys, taken


@triton.jit
def load_rows(x, b, h, first, rows, limit, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK), zero from row `limit` and column SIZE on."""
    d = tl.arange(0, BLOCK)
    at = x.at + b * x.batch + h * x.head + (first + rows)[:, None] * x.row + d[None, :]
    inside = rows[:, None] < limit
    if SIZE != BLOCK:
        inside = inside & (d[None, :] < SIZE)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_rows(x, b, h, first, rows, limit, values, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    at = x.at + b * x.batch + h * x.head + (first + rows)[:, None] * x.row + d[None, :]
    inside = rows[:, None] < limit
    if SIZE != BLOCK:
        inside = inside & (d[None, :] < SIZE)
    tl.store(at, values.to(x.at.dtype.element_ty), mask=inside)


@triton.jit
def load_line(x, b, h, first, rows, limit, other):
    return tl.load(x.at + b * x.batch + h * x.head + first + rows, mask=rows < limit, other=other)


@triton.jit
def load_mass(lse, b, h, first, rows, limit):
    """The log masses; infinite where there is none, so that every weight is zero."""
    mass = load_line(lse, b, h, first, rows, limit, float("inf"))
    return tl.where(mass == float("-inf"), float("inf"), mass)


@triton.jit
def load_cells(x, b, h, i, j, inside):
    at = x.at + b * x.batch + h * x.head + i.to(tl.int64) * x.row + j.to(tl.int64) * x.column
    return tl.load(at, mask=inside, other=0)


@triton.jit
def distance(i, j, shift, POWER: tl.constexpr, ACC: tl.constexpr):
    """|i - j| to the power POWER, the last query standing where the last key does."""
    apart = (i + shift - j).to(ACC)
    return tl.abs(apart) if POWER == 1 else apart * apart


@triton.jit
def scores(
    products, rules, b, h, i, j, shift, queries, taken,
    SCALE: tl.constexpr, POWER: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of products q · k, times log2(e); -inf where a pair takes no part."""
    s = products * (SCALE * LOG2E)
    inside = (i < queries) & (j < taken)
    if rules.bias is not None:
        s += load_cells(rules.bias, b, h, i, j, inside).to(ACC) * LOG2E
    if rules.table is not None:
        of_query = tl.load(rules.table.query_positions + i, mask=i < queries, other=0)
        of_key = tl.load(rules.table.key_positions + j, mask=j < taken, other=0)
        at = rules.table.at + h * rules.table.head + (of_query - of_key)
        s += tl.load(at, mask=inside, other=0.0).to(ACC) * LOG2E
    if POWER > 0:
        s += distance(i, j, shift, POWER, ACC) * (tl.load(rules.coefficients + h).to(ACC) * LOG2E)
    if rules.mask is not None:
        s = tl.where(load_cells(rules.mask, b, h, i, j, inside) != 0, s, float("-inf"))
    if EDGE:
        visible = inside
        if rules.before is not None:
            visible = visible & (j >= i + shift - rules.before)
        if rules.after is not None:
            visible = visible & (j <= i + shift + rules.after)
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def keys_of(rules, i0, shift, taken, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the queries i0 … i0 + ROWS - 1: the first key that any sees, the ends of what all see, the end.

    All four are multiples of BLOCK but the last.
    """
    start = tl.zeros((), tl.int32)
    stop = taken
    full = tl.zeros((), tl.int32)
    full_stop = taken
    if rules.before is not None:
        start = tl.maximum(i0 + shift - rules.before, 0) // BLOCK * BLOCK
        full = tl.cdiv(tl.maximum(i0 + ROWS - 1 + shift - rules.before, 0), BLOCK) * BLOCK
    if rules.after is not None:
        stop = tl.minimum(taken, tl.maximum(i0 + ROWS + shift + rules.after, 0))
        full_stop = tl.minimum(taken, tl.maximum(i0 + shift + rules.after + 1, 0))
    full = tl.minimum(tl.maximum(full, start), tl.cdiv(stop, BLOCK) * BLOCK)
    full_stop = tl.maximum(full_stop // BLOCK * BLOCK, full)
    return start, full, full_stop, stop


@triton.jit
def queries_of(rules, j0, shift, queries, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the keys j0 … j0 + COLUMNS - 1: as `keys_of`, the queries that see them."""
    start = tl.zeros((), tl.int32)
    stop = queries
    full = tl.zeros((), tl.int32)
    full_stop = queries
    if rules.after is not None:
        start = tl.maximum(j0 - shift - rules.after, 0) // BLOCK * BLOCK
        full = tl.cdiv(tl.maximum(j0 + COLUMNS - 1 - shift - rules.after, 0), BLOCK) * BLOCK
    if rules.before is not None:
        stop = tl.minimum(queries, tl.maximum(j0 + COLUMNS - shift + rules.before, 0))
        full_stop = tl.minimum(queries, tl.maximum(j0 - shift + rules.before + 1, 0))
    full = tl.minimum(tl.maximum(full, start), tl.cdiv(stop, BLOCK) * BLOCK)
    full_stop = tl.maximum(full_stop // BLOCK * BLOCK, full)
    return start, full, full_stop, stop


@triton.jit
def kept(seed, dropout, pair, i, j, longest_keys):
    """Which cells dropout leaves, the same in every kernel and whatever the tiles."""
    return tl.rand(tl.load(seed) + pair, i * longest_keys + j) >= dropout
