"""The kernels of additive attention, which spend their time on one reciprocal for each hidden unit of a pair.

    tanh(a + b) = 1 - 2 r,   r = 1 / (1 + e^2a e^2b),   and its derivative is 4 r (1 - r)

The exponentials belong to one token each. A first kernel writes them down; what is left of a tanh is a
product and a reciprocal, and of two reciprocals one: 1/x + 1/y = (x + y) / (x y). That holds where no product
overflows, and loses digits where all tanh are near zero. Each program looks at the largest numbers of its
tokens, and takes the other form, a tanh in full, where it does not.
"""

import triton
import triton.language as tl

from ._attention_tiles import INTERPRETED, LOG2E

# Exponentials are multiplied where the largest |a| and |b| add up to no less and no more. Above, the product
# of two pairs' would near the end of float32; below, all tanh are small, with digits that 1 - 2 r has not.
LEAST = tl.constexpr(1.0)
MOST = tl.constexpr(20.0)
UNITS = tl.constexpr(4)  # hidden units in a step of the walk, by twos


@triton.jit
def _reciprocal(x):
    if INTERPRETED or x.dtype == tl.float64:
        r = 1.0 / x
    else:  # 1 / x is the same instruction and four more, for numbers that are not here
        r = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return r


@triton.jit
def _tanh(x):
    """Of any number. Near zero by its series, as 1 - 2 r would round to few digits there."""
    near: tl.constexpr = 0.02 if x.dtype == tl.float64 else 0.35
    y = x * x
    series = 62.0 / 2835 + y * (-1382.0 / 155925 + y * (21844.0 / 6081075))
    series = x + x * y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * series)))
    return tl.where(tl.abs(x) < near, series, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))


@triton.jit
def _is_factored(of_rows, of_columns):
    bound = of_rows + of_columns
    return (bound > LEAST) & (bound <= MOST)


@triton.jit
def spread_kernel(
    x, raised, plain, peaks, length, in_memory, hidden, units, of_batch, of_token, of_unit,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of TOKENS tokens of x (B, L, H): e^2x and x itself, laid out by strides, and the largest |x|.

    There are `in_memory` tokens of `units` hidden units, no fewer than in x: those beyond are as of x = 0.
    `plain` is left out where it is None.
    """
    tiles = tl.cdiv(in_memory, TOKENS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    peak = tl.zeros((TOKENS,), ACC)
    for h0 in range(0, units, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        at = (b * length + token[:, None]) * hidden + h[None, :]
        inside = (token[:, None] < length) & (h[None, :] < hidden)
        given = tl.load(x + at, mask=inside, other=0.0).to(ACC)
        peak = tl.maximum(peak, tl.max(tl.abs(given), 1))
        to = b * of_batch + token[:, None].to(tl.int64) * of_token + h[None, :].to(tl.int64) * of_unit
        inside = (token[:, None] < in_memory) & (h[None, :] < units)
        tl.store(raised + to, _raised(given, ACC), mask=inside)
        if plain is not None:
            tl.store(plain + to, given, mask=inside)
    tl.store(peaks + b * length + token, peak, mask=token < length)


@triton.jit
def _raised(x, ACC: tl.constexpr):
    """e^2x. 2 x log2(e) is taken in two parts: as one, its rounding would show in the exponential times x."""
    log2e: tl.constexpr = 2.8853900817779268
    if tl.float64 == ACC:
        raised = tl.exp2(x * log2e)
    else:
        leading: tl.constexpr = 2.88671875  # has ten bits, and the head of x twelve: their product is exact
        head = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        rest = (x - head) * log2e + head * (log2e - leading)
        raised = tl.exp2(head * leading) * tl.exp2(rest)
    return raised


@triton.jit
def walk_hidden(
    query, key, of_query, of_key, energy, i, j, b, queries, hidden, units,
    FACTORED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The scores of the pairs (i, j), from (B, units, L): of exponentials if FACTORED, else of the tokens.

    `of_query` and `of_key` are their lengths in memory, multiples of 16: a mask that ended at an odd place
    would keep a thread from reading four numbers at once.
    """
    query += b * units * of_query + i
    key += b * units * of_key + j
    # Zeros, as no key is before -queries. But a thread gets neighbouring columns of what seems to be read,
    # and reads their keys at once; left to itself the compiler gives it one column, and four times the reads.
    never = (i[:, None] < queries) & (j[None, :] < -queries)
    total = tl.load(key[None, :] + i[:, None] * of_key, mask=never, other=0.0)
    sum_energy = tl.zeros((), ACC)
    for h0 in range(0, units, UNITS):
        for n in tl.static_range(0, UNITS, 2):
            e0 = tl.load(energy + h0 + n, mask=h0 + n < hidden, other=0.0).to(ACC)
            e1 = tl.load(energy + h0 + n + 1, mask=h0 + n + 1 < hidden, other=0.0).to(ACC)
            q0 = tl.load(query, mask=i < of_query, other=1.0)[:, None]
            q1 = tl.load(query + of_query, mask=i < of_query, other=1.0)[:, None]
            k0 = tl.load(key, mask=j < of_key, other=1.0)[None, :]
            k1 = tl.load(key + of_key, mask=j < of_key, other=1.0)[None, :]
            query += 2 * of_query
            key += 2 * of_key
            if FACTORED:
                x0 = q0 * k0 + 1
                x1 = q1 * k1 + 1
                total += (e0 * x1 + e1 * x0) * _reciprocal(x0 * x1)
                sum_energy += e0 + e1
            else:
                total += e0 * _tanh(q0 + k0) + e1 * _tanh(q1 + k1)
    return sum_energy - 2 * total if FACTORED else total


@triton.jit
def scores_of(query, key, energy, i, j, b, queries, keys, hidden, units, peak, ACC: tl.constexpr):
    """The scores of the pairs (i, j). `peak` is the largest number of the queries i."""
    of_key = tl.max(tl.load(key.peaks + b * keys + j, mask=j < keys, other=0.0), 0)
    if _is_factored(peak, of_key):
        s = walk_hidden(
            query.raised, key.raised, query.length, key.length, energy, i, j, b, queries, hidden, units, True,
            ACC,
        )  # fmt: skip
    else:
        s = walk_hidden(
            query.plain, key.plain, query.length, key.length, energy, i, j, b, queries, hidden, units, False,
            ACC,
        )  # fmt: skip
    return s


@triton.jit
def scores_kernel(
    query, key, energy, scores, queries, keys, hidden, units,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One (ROWS, COLUMNS) tile of scores."""
    across = tl.cdiv(keys, COLUMNS)
    tiles = tl.cdiv(queries, ROWS) * across
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles // across * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    peak = tl.max(tl.load(query.peaks + b * queries + i, mask=i < queries, other=0.0), 0)
    s = scores_of(query, key, energy, i, j, b, queries, keys, hidden, units, peak, ACC)
    at = (b * queries + i[:, None]) * keys + j[None, :]
    tl.store(scores + at, s, mask=(i[:, None] < queries) & (j[None, :] < keys))


@triton.jit
def _walk_columns(
    row, column, grad, columns, hidden, h, inside, grad_column,
    FACTORED: tl.constexpr, ENERGY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over the columns of grad times tanh', and of grad times tanh if ENERGY."""
    d_row = tl.zeros(row.shape, ACC)
    d_energy = tl.zeros(row.shape, ACC)
    for _ in range(columns):
        # Beyond the hidden units r is 1 / 2, whatever is made of it.
        c = tl.load(column, mask=h < hidden, other=1.0).to(ACC)[None, :]
        g = tl.load(grad, mask=inside, other=0.0).to(ACC)[:, None]
        if FACTORED:
            r = _reciprocal(row * c + 1)
            d_row += g * (r - r * r)
            if ENERGY:
                d_energy += g * (1 - 2 * r)
        else:
            t = _tanh(row + c)
            d_row += g * (1 - t * t)
            if ENERGY:
                d_energy += g * t
        column += hidden
        grad += grad_column
    if FACTORED:
        d_row *= 4
    return d_row, d_energy


@triton.jit
def backward_kernel(
    grad, grad_batch, grad_row, grad_column, rows, columns, energy, d_rows, d_energy, n_rows, n_columns,
    hidden, ROWS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS tokens in a block of hidden units, and its part of the energy's.

    The two sides are alike: rows are queries and columns keys, or the other way round. `d_energy` is None
    for one of them.
    """
    tiles = tl.cdiv(n_rows, ROWS)
    across = tl.cdiv(hidden, UNITS)
    h = tl.program_id(0) % across * UNITS + tl.arange(0, UNITS)
    tile = tl.program_id(0) // across % tiles
    b = (tl.program_id(0) // across // tiles).to(tl.int64)
    i = tile * ROWS + tl.arange(0, ROWS)
    own = (i[:, None] < n_rows) & (h[None, :] < hidden)
    at = (b * n_rows + i[:, None]) * hidden + h[None, :]
    of_rows = tl.max(tl.load(rows.peaks + b * n_rows + i, mask=i < n_rows, other=0.0), 0)
    peak = tl.zeros((COLUMNS,), ACC)
    for j0 in range(0, n_columns, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        peak = tl.maximum(peak, tl.load(columns.peaks + b * n_columns + j, mask=j < n_columns, other=0.0))
    grad += b * grad_batch + i.to(tl.int64) * grad_row
    first = b * n_columns * hidden + h
    if _is_factored(of_rows, tl.max(peak, 0)):
        d_row, d_unit = _walk_columns(
            tl.load(rows.raised + at, mask=own, other=1.0), columns.raised + first, grad, n_columns, hidden,
            h, i < n_rows, grad_column, True, d_energy is not None, ACC,
        )  # fmt: skip
    else:
        d_row, d_unit = _walk_columns(
            tl.load(rows.plain + at, mask=own, other=0.0).to(ACC), columns.plain + first, grad, n_columns,
            hidden, h, i < n_rows, grad_column, False, d_energy is not None, ACC,
        )  # fmt: skip
    e = tl.load(energy + h, mask=h < hidden, other=0.0).to(ACC)
    tl.store(d_rows + at, d_row * e[None, :], mask=own)
    if d_energy is not None:
        part = (b * tiles + tile) * hidden + h
        tl.store(d_energy + part, tl.sum(d_unit, 0), mask=h < hidden)
