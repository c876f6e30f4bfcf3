"""The forward kernel of attention, and one that tells what its dropout leaves."""

import triton
import triton.language as tl

from ._attention_tiles import dot, extent, kept, keys_of, load_rows, scores, store_rows


@triton.jit
def _attend(
    total, peak, mass, q, k, v, rules, seed, dropout, b, h, kv, first_key, i, start, stop, shift, queries,
    taken, longest_keys, pair,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes the keys start … stop - 1 into the running softmax: its weighted sum, greatest score and mass."""
    for j0 in range(start, stop, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        key = load_rows(k, b, kv, first_key, j, taken, SIZE, BLOCK)
        s = scores(
            dot(q, tl.trans(key), ACC, PRECISION), rules, b, h, i[:, None], j[None, :], shift, queries, taken,
            SCALE, POWER, EDGE, ACC,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(peak - safe)
        mass = mass * shrink + tl.sum(p, 1)
        if seed is not None:
            keep = kept(seed, dropout, pair, i[:, None], j[None, :], longest_keys)
            p = tl.where(keep, p / (1 - dropout), 0.0)
        value = load_rows(v, b, kv, first_key, j, taken, V_SIZE, V_BLOCK)
        total = total * shrink[:, None] + dot(p.to(value.dtype), value, ACC, PRECISION)
        peak = higher
    return total, peak, mass


@triton.jit
def forward_kernel(
    q, k, v, out, lse, rules, seed, dropout, heads, group, longest_queries, longest_keys,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head: their outputs, and the logarithms of their softmax's mass."""
    tiles = tl.cdiv(longest_queries, ROWS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = pair // heads, pair % heads
    kv = h // group
    first_query, first_key, queries, keys, taken = extent(rules, b, longest_queries, longest_keys)
    i0 = tl.program_id(0) % tiles * ROWS
    if i0 < queries:
        i = i0 + tl.arange(0, ROWS)
        shift = keys - queries
        query = load_rows(q, b, h, first_query, i, queries, SIZE, BLOCK)
        total = tl.zeros((ROWS, V_BLOCK), ACC)
        peak = tl.full((ROWS,), float("-inf"), ACC)
        mass = tl.zeros((ROWS,), ACC)
        start, full, full_stop, stop = keys_of(rules, i0, shift, taken, ROWS, COLUMNS)
        if rules.before is not None:
            total, peak, mass = _attend(
                total, peak, mass, query, k, v, rules, seed, dropout, b, h, kv, first_key, i, start, full,
                shift, queries, taken, longest_keys, pair, SIZE, V_SIZE, BLOCK, V_BLOCK, COLUMNS, SCALE,
                POWER, True, ACC, PRECISION,
            )  # fmt: skip
        total, peak, mass = _attend(
            total, peak, mass, query, k, v, rules, seed, dropout, b, h, kv, first_key, i, full, full_stop,
            shift, queries, taken, longest_keys, pair, SIZE, V_SIZE, BLOCK, V_BLOCK, COLUMNS, SCALE,
            POWER, False, ACC, PRECISION,
        )  # fmt: skip
        total, peak, mass = _attend(
            total, peak, mass, query, k, v, rules, seed, dropout, b, h, kv, first_key, i, full_stop, stop,
            shift, queries, taken, longest_keys, pair, SIZE, V_SIZE, BLOCK, V_BLOCK, COLUMNS, SCALE,
            POWER, True, ACC, PRECISION,
        )  # fmt: skip
        empty = mass == 0
        total = tl.where(empty[:, None], 0.0, total / tl.where(empty, 1.0, mass)[:, None])
        store_rows(out, b, h, first_query, i, queries, total, V_SIZE, V_BLOCK)
        at = lse.at + b * lse.batch + h * lse.head + first_query + i
        log_mass = tl.where(empty, float("-inf"), peak + tl.log2(tl.where(empty, 1.0, mass)))
        tl.store(at, log_mass, mask=i < queries)


@triton.jit
def kept_kernel(out, seed, dropout, first, queries, keys, longest_keys, BLOCK: tl.constexpr):
    """A tile of the weights that dropout leaves."""
    across = tl.cdiv(keys, BLOCK)
    tiles = tl.cdiv(queries, BLOCK) * across
    pair, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    i = tile // across * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = tile % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    keep = kept(seed, dropout, first + pair, i, j, longest_keys)
    tl.store(out + (pair * queries + i) * keys + j, keep.to(tl.uint8), mask=(i < queries) & (j < keys))
