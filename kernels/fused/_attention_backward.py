"""The backward kernels of attention. Each owns what it writes: without atomics, every run gives the same.

With P the weights and dP = dO V^T: dS = P (dP - delta), where delta is the sum of dO O over a row. Then
dQ = dS K, dK = dS^T Q, dV = P^T dO, and the gradient of a bias is dS, summed where the bias broadcasts.
"""

import triton
import triton.language as tl

from ._attention_tiles import (
    LOG2E,
    distance,
    dot,
    extent,
    kept,
    keys_of,
    load_line,
    load_mass,
    load_rows,
    queries_of,
    scores,
    store_rows,
)


@triton.jit
def _walk_keys(
    d_query, d_coefficient, query, grad, mass, delta, k, v, d_cells, rules, seed, dropout, b, h, kv,
    first_key, i, start, stop, shift, queries, taken, longest_keys, pair,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for j0 in range(start, stop, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        key = load_rows(k, b, kv, first_key, j, taken, SIZE, BLOCK)
        s = scores(
            dot(query, tl.trans(key), ACC, PRECISION), rules, b, h, i[:, None], j[None, :], shift, queries,
            taken, SCALE, POWER, EDGE, ACC,
        )  # fmt: skip
        p = tl.exp2(s - mass[:, None])
        value = load_rows(v, b, kv, first_key, j, taken, V_SIZE, V_BLOCK)
        d_p = dot(grad, tl.trans(value), ACC, PRECISION)
        if seed is not None:
            keep = kept(seed, dropout, pair, i[:, None], j[None, :], longest_keys)
            d_p = tl.where(keep, d_p / (1 - dropout), 0.0)
        d_s = p * (d_p - delta[:, None])
        d_query += dot(d_s.to(key.dtype), key, ACC, PRECISION)
        if d_cells is not None:
            at = b * d_cells.batch + h * d_cells.head + i[:, None].to(tl.int64) * d_cells.row + j[None, :]
            tl.store(d_cells.at + at, d_s, mask=(i[:, None] < queries) & (j[None, :] < taken))
        if POWER > 0:
            d_coefficient += tl.sum(d_s * distance(i[:, None], j[None, :], shift, POWER, ACC), 1)
    return d_query, d_coefficient


@triton.jit
def query_kernel(
    q, k, v, out, grad, lse, d_lse, delta, d_q, d_cells, d_coefficients, rules, seed, dropout, heads, group,
    longest_queries, longest_keys,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head: delta, dQ, dS where a bias is as large, their part of the coefficient's."""
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
        d_out = load_rows(grad, b, h, first_query, i, queries, V_SIZE, V_BLOCK)
        output = load_rows(out, b, h, first_query, i, queries, V_SIZE, V_BLOCK)
        row_delta = tl.sum(output.to(ACC) * d_out.to(ACC), 1)
        if d_lse is not None:
            row_delta -= load_line(d_lse, b, h, first_query, i, queries, 0.0).to(ACC) * LOG2E
        tl.store(delta.at + b * delta.batch + h * delta.head + first_query + i, row_delta, mask=i < queries)
        mass = load_mass(lse, b, h, first_query, i, queries)
        d_query = tl.zeros((ROWS, BLOCK), ACC)
        d_coefficient = tl.zeros((ROWS,), ACC)
        start, full, full_stop, stop = keys_of(rules, i0, shift, taken, ROWS, COLUMNS)
        if rules.before is not None:
            d_query, d_coefficient = _walk_keys(
                d_query, d_coefficient, query, d_out, mass, row_delta, k, v, d_cells, rules, seed, dropout, b,
                h, kv, first_key, i, start, full, shift, queries, taken, longest_keys, pair, SIZE, V_SIZE,
                BLOCK, V_BLOCK, COLUMNS, SCALE, POWER, True, ACC, PRECISION,
            )  # fmt: skip
        d_query, d_coefficient = _walk_keys(
            d_query, d_coefficient, query, d_out, mass, row_delta, k, v, d_cells, rules, seed, dropout, b,
            h, kv, first_key, i, full, full_stop, shift, queries, taken, longest_keys, pair, SIZE, V_SIZE,
            BLOCK, V_BLOCK, COLUMNS, SCALE, POWER, False, ACC, PRECISION,
        )  # fmt: skip
        d_query, d_coefficient = _walk_keys(
            d_query, d_coefficient, query, d_out, mass, row_delta, k, v, d_cells, rules, seed, dropout, b,
            h, kv, first_key, i, full_stop, stop, shift, queries, taken, longest_keys, pair, SIZE, V_SIZE,
            BLOCK, V_BLOCK, COLUMNS, SCALE, POWER, True, ACC, PRECISION,
        )  # fmt: skip
        store_rows(d_q, b, h, first_query, i, queries, d_query * SCALE, SIZE, BLOCK)
        if POWER > 0:
            at = d_coefficients.at + b * d_coefficients.batch + h * d_coefficients.head
            tl.store(at + i0 // ROWS, tl.sum(tl.where(i < queries, d_coefficient, 0.0), 0))


@triton.jit
def _walk_queries(
    d_key, d_value, d_column, key, value, q, grad, lse, delta, rules, seed, dropout, b, h, first_query, j,
    start, stop, shift, queries, taken, longest_keys, pair,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_walk_keys`, of the transposed tile: keys are its rows."""
    for i0 in range(start, stop, ROWS):
        i = i0 + tl.arange(0, ROWS)
        query = load_rows(q, b, h, first_query, i, queries, SIZE, BLOCK)
        s = scores(
            dot(key, tl.trans(query), ACC, PRECISION), rules, b, h, i[None, :], j[:, None], shift, queries,
            taken, SCALE, POWER, EDGE, ACC,
        )  # fmt: skip
        p = tl.exp2(s - load_mass(lse, b, h, first_query, i, queries)[None, :])
        d_out = load_rows(grad, b, h, first_query, i, queries, V_SIZE, V_BLOCK)
        d_p = dot(value, tl.trans(d_out), ACC, PRECISION)
        left = p
        if seed is not None:
            keep = kept(seed, dropout, pair, i[None, :], j[:, None], longest_keys)
            left = tl.where(keep, p / (1 - dropout), 0.0)
            d_p = tl.where(keep, d_p / (1 - dropout), 0.0)
        d_value += dot(left.to(d_out.dtype), d_out, ACC, PRECISION)
        d_s = p * (d_p - load_line(delta, b, h, first_query, i, queries, 0.0)[None, :])
        d_key += dot(d_s.to(query.dtype), query, ACC, PRECISION)
        d_column += tl.sum(d_s, 1)
    return d_key, d_value, d_column


@triton.jit
def key_kernel(
    q, k, v, grad, lse, delta, d_k, d_v, d_columns, rules, seed, dropout, heads, group, longest_queries,
    longest_keys,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """COLUMNS keys of one head: dK and dV, of all heads of queries that it serves, and sums of dS by key."""
    tiles = tl.cdiv(longest_keys, COLUMNS)
    rest = (tl.program_id(0) // tiles).to(tl.int64)
    b, kv = rest // (heads // group), rest % (heads // group)
    first_query, first_key, queries, keys, taken = extent(rules, b, longest_queries, longest_keys)
    j0 = tl.program_id(0) % tiles * COLUMNS
    if j0 < keys:
        j = j0 + tl.arange(0, COLUMNS)
        shift = keys - queries
        key = load_rows(k, b, kv, first_key, j, taken, SIZE, BLOCK)
        value = load_rows(v, b, kv, first_key, j, taken, V_SIZE, V_BLOCK)
        d_key = tl.zeros((COLUMNS, BLOCK), ACC)
        d_value = tl.zeros((COLUMNS, V_BLOCK), ACC)
        start, full, full_stop, stop = queries_of(rules, j0, shift, queries, COLUMNS, ROWS)
        stop = tl.where(j0 < taken, stop, start)
        full, full_stop = tl.minimum(full, stop), tl.minimum(full_stop, stop)
        for h in range(kv * group, kv * group + group):
            pair = b * heads + h
            d_column = tl.zeros((COLUMNS,), ACC)
            if rules.after is not None:
                d_key, d_value, d_column = _walk_queries(
                    d_key, d_value, d_column, key, value, q, grad, lse, delta, rules, seed, dropout, b, h,
                    first_query, j, start, full, shift, queries, taken, longest_keys, pair, SIZE, V_SIZE,
                    BLOCK, V_BLOCK, ROWS, SCALE, POWER, True, ACC, PRECISION,
                )  # fmt: skip
            d_key, d_value, d_column = _walk_queries(
                d_key, d_value, d_column, key, value, q, grad, lse, delta, rules, seed, dropout, b, h,
                first_query, j, full, full_stop, shift, queries, taken, longest_keys, pair, SIZE, V_SIZE,
                BLOCK, V_BLOCK, ROWS, SCALE, POWER, False, ACC, PRECISION,
            )  # fmt: skip
            d_key, d_value, d_column = _walk_queries(
                d_key, d_value, d_column, key, value, q, grad, lse, delta, rules, seed, dropout, b, h,
                first_query, j, full_stop, stop, shift, queries, taken, longest_keys, pair, SIZE, V_SIZE,
                BLOCK, V_BLOCK, ROWS, SCALE, POWER, True, ACC, PRECISION,
            )  # fmt: skip
            if d_columns is not None:
                at = d_columns.at + b * d_columns.batch + h * d_columns.head + j
                tl.store(at, tl.where(j < taken, d_column, 0.0), mask=j < keys)
        # Beyond the keys that take part the sums are of whatever a tile held there.
        d_key = tl.where(j[:, None] < taken, d_key * SCALE, 0.0)
        d_value = tl.where(j[:, None] < taken, d_value, 0.0)
        store_rows(d_k, b, kv, first_key, j, keys, d_key, SIZE, BLOCK)
        store_rows(d_v, b, kv, first_key, j, keys, d_value, V_SIZE, V_BLOCK)


@triton.jit
def bias_kernel(
    q, k, v, grad, lse, delta, d_cells, rules, seed, dropout, batches, heads, group, longest_queries,
    longest_keys, own_batches, own_heads, parts,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a bias's gradient: dS of all pairs (batch, head) that share it, or of one of their `parts`.

    `own_batches` and `own_heads` say how many the bias has of its own, 1 where it is shared.
    """
    across = tl.cdiv(longest_keys, COLUMNS)
    tiles = tl.cdiv(longest_queries, ROWS) * across
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    part, rest = rest % parts, rest // parts
    own_h, own_b = rest % own_heads, rest // own_heads
    i0, j0 = tile // across * ROWS, tile % across * COLUMNS
    i, j = i0 + tl.arange(0, ROWS), j0 + tl.arange(0, COLUMNS)
    shared_heads = heads // own_heads
    shared = (batches // own_batches) * shared_heads
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for n in range(part * shared // parts, (part + 1) * shared // parts):
        b = (n // shared_heads + own_b).to(tl.int64)  # one of the two is 0
        h = (n % shared_heads + own_h).to(tl.int64)
        first_query, first_key, queries, keys, taken = extent(rules, b, longest_queries, longest_keys)
        shift = keys - queries
        seen = (i0 < queries) & (j0 < taken)
        if rules.before is not None:
            seen = seen & (j0 + COLUMNS - 1 >= i0 + shift - rules.before)
        if rules.after is not None:
            seen = seen & (j0 <= i0 + ROWS - 1 + shift + rules.after)
        if seen:
            kv = h // group
            query = load_rows(q, b, h, first_query, i, queries, SIZE, BLOCK)
            key = load_rows(k, b, kv, first_key, j, taken, SIZE, BLOCK)
            s = scores(
                dot(query, tl.trans(key), ACC, PRECISION), rules, b, h, i[:, None], j[None, :], shift,
                queries, taken, SCALE, POWER, True, ACC,
            )  # fmt: skip
            p = tl.exp2(s - load_mass(lse, b, h, first_query, i, queries)[:, None])
            d_out = load_rows(grad, b, h, first_query, i, queries, V_SIZE, V_BLOCK)
            value = load_rows(v, b, kv, first_key, j, taken, V_SIZE, V_BLOCK)
            d_p = dot(d_out, tl.trans(value), ACC, PRECISION)
            if seed is not None:
                keep = kept(seed, dropout, b * heads + h, i[:, None], j[None, :], longest_keys)
                d_p = tl.where(keep, d_p / (1 - dropout), 0.0)
            total += p * (d_p - load_line(delta, b, h, first_query, i, queries, 0.0)[:, None])
    at = ((part * own_batches + own_b).to(tl.int64) * own_heads + own_h) * longest_queries + i[:, None]
    inside = (i[:, None] < longest_queries) & (j[None, :] < longest_keys)
    tl.store(d_cells + at * longest_keys + j[None, :], total, mask=inside)
