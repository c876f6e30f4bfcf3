"""The kernels of low-rank attention: rows are queries, and the columns are all there are, or a block of them.

With P the weights and dP = dO V^T: dS = P (dP - delta), where delta is the sum of dO O over a row. Then
dQ = dS K, dK = dS^T Q, dV = P^T dO. Scores are in units of log 2, so that the exponential is the hardware's.
"""

import triton
import triton.language as tl

from ._attention_tiles import LOG2E, dot, load_line, load_mass, load_rows, store_rows


@triton.jit
def _place(heads, queries, tiles_each, ROWS: tl.constexpr):
    """Of a program that takes `tiles_each` tiles of one head: batch, head, its first query, and the end."""
    strips = tl.cdiv(queries, ROWS * tiles_each)
    pair = (tl.program_id(0) // strips).to(tl.int64)
    first = tl.program_id(0) % strips * tiles_each * ROWS
    return pair // heads, pair % heads, first, tl.minimum(first + tiles_each * ROWS, queries)


@triton.jit
def _takes_part(mask, b, at, columns):
    """Which of the columns `at` take part."""
    inside = at < columns
    if mask is not None:
        inside = tl.load(mask.at + b * mask.batch + at * mask.column, mask=inside, other=0) != 0
    return inside


@triton.jit
def forward_kernel(
    q, k, v, out, lse, mask, rules, seed, dropout, batches, heads, group, queries, columns, tiles_each,
    FULL: tl.constexpr,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some tiles of queries against all columns: outputs, and the logarithms of their softmax's mass."""
    b, h, first, stop = _place(heads, queries, tiles_each, ROWS)
    start = tl.zeros((), tl.int64)
    j = tl.arange(0, COLUMNS)
    key = load_rows(k, b, h // group, start, j, columns, SIZE, BLOCK)
    value = load_rows(v, b, h // group, start, j, columns, V_SIZE, V_BLOCK)
    taken = _takes_part(mask, b, j[None, :], columns)
    for i0 in range(first, stop, ROWS):
        i = i0 + tl.arange(0, ROWS)
        query = load_rows(q, b, h, start, i, queries, SIZE, BLOCK)
        s = dot(query, tl.trans(key), ACC, PRECISION) * (SCALE * LOG2E)
        if not FULL:
            s = tl.where(taken, s, float("-inf"))
        peak = tl.max(s, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)  # a row in which no column takes part
        p = tl.exp2(s - peak[:, None])
        mass = tl.sum(p, 1)
        empty = mass == 0
        some = tl.where(empty, 1.0, mass)
        total = dot(p.to(value.dtype), value, ACC, PRECISION)
        store_rows(out, b, h, start, i, queries, total / some[:, None], V_SIZE, V_BLOCK)
        log_mass = tl.where(empty, float("-inf"), peak + tl.log2(some))
        tl.store(lse.at + b * lse.batch + h * lse.head + i, log_mass, mask=i < queries)


@triton.jit
def query_kernel(
    q, k, v, out, grad, lse, d_lse, delta, d_q, mask, rules, seed, dropout, batches, heads, group, queries,
    columns, tiles_each, FULL: tl.constexpr, BLOCKS: tl.constexpr,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some tiles of queries against all columns, which are BLOCKS times COLUMNS: delta and dQ."""
    b, h, first, stop = _place(heads, queries, tiles_each, ROWS)
    start = tl.zeros((), tl.int64)
    keys, values = (), ()
    for n in tl.static_range(BLOCKS):
        j = n * COLUMNS + tl.arange(0, COLUMNS)
        key = load_rows(k, b, h // group, start, j, columns, SIZE, BLOCK)
        value = load_rows(v, b, h // group, start, j, columns, V_SIZE, V_BLOCK)
        keys = keys + (key,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
    for i0 in range(first, stop, ROWS):
        i = i0 + tl.arange(0, ROWS)
        d_out = load_rows(grad, b, h, start, i, queries, V_SIZE, V_BLOCK)
        output = load_rows(out, b, h, start, i, queries, V_SIZE, V_BLOCK)
        row_delta = tl.sum(output.to(ACC) * d_out.to(ACC), 1)
        if d_lse is not None:
            row_delta -= load_line(d_lse, b, h, start, i, queries, 0.0).to(ACC) * LOG2E
        tl.store(delta.at + b * delta.batch + h * delta.head + i, row_delta, mask=i < queries)
        query = load_rows(q, b, h, start, i, queries, SIZE, BLOCK)
        mass = load_mass(lse, b, h, start, i, queries)
        d_query = tl.zeros((ROWS, BLOCK), ACC)
        for n in tl.static_range(BLOCKS):
            s = dot(query, tl.trans(keys[n]), ACC, PRECISION) * (SCALE * LOG2E)
            if not FULL:  # read again, since registers are short
                taken = _takes_part(mask, b, n * COLUMNS + tl.arange(0, COLUMNS)[None, :], columns)
                s = tl.where(taken, s, float("-inf"))
            d_p = dot(d_out, tl.trans(values[n]), ACC, PRECISION)
            d_s = tl.exp2(s - mass[:, None]) * (d_p - row_delta[:, None])
            d_query += dot(d_s.to(query.dtype), keys[n], ACC, PRECISION)
        store_rows(d_q, b, h, start, i, queries, d_query * SCALE, SIZE, BLOCK)


@triton.jit
def column_kernel(
    q, k, v, grad, lse, delta, d_k, d_v, mask, rules, seed, dropout, batches, heads, group, queries, columns,
    parts, queries_each, FULL: tl.constexpr,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one head: dK and dV, from one part of the queries of all heads that it serves."""
    across = tl.cdiv(columns, COLUMNS)
    j = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    part, rest = tl.program_id(0) // across % parts, (tl.program_id(0) // across // parts).to(tl.int64)
    b, kv = rest // (heads // group), rest % (heads // group)
    start = tl.zeros((), tl.int64)
    key = load_rows(k, b, kv, start, j, columns, SIZE, BLOCK)
    value = load_rows(v, b, kv, start, j, columns, V_SIZE, V_BLOCK)
    taken = _takes_part(mask, b, j[:, None], columns)
    d_key = tl.zeros((COLUMNS, BLOCK), ACC)
    d_value = tl.zeros((COLUMNS, V_BLOCK), ACC)
    for h in range(kv * group, kv * group + group):
        for i0 in range(part * queries_each, tl.minimum((part + 1) * queries_each, queries), ROWS):
            i = i0 + tl.arange(0, ROWS)
            query = load_rows(q, b, h, start, i, queries, SIZE, BLOCK)
            s = dot(key, tl.trans(query), ACC, PRECISION) * (SCALE * LOG2E)
            if not FULL:
                s = tl.where(taken, s, float("-inf"))
            p = tl.exp2(s - load_mass(lse, b, h, start, i, queries)[None, :])
            d_out = load_rows(grad, b, h, start, i, queries, V_SIZE, V_BLOCK)
            d_value += dot(p.to(d_out.dtype), d_out, ACC, PRECISION)
            d_p = dot(value, tl.trans(d_out), ACC, PRECISION)
            d_s = p * (d_p - load_line(delta, b, h, start, i, queries, 0.0)[None, :])
            d_key += dot(d_s.to(query.dtype), query, ACC, PRECISION)
    own = part * batches + b
    store_rows(d_k, own, kv, start, j, columns, d_key * SCALE, SIZE, BLOCK)
    store_rows(d_v, own, kv, start, j, columns, d_value, V_SIZE, V_BLOCK)
