"""The backward kernels of LSH attention.

A program owns ROWS neighbours of one round, as queries and as keys: it walks over the chunks that they see
and those that see them, which are on both sides of its own. So all of a token's gradients of a round come
from one program, and the products x[i] . x[j] of a tile serve both directions.
"""

import triton
import triton.language as tl

from ._attention_tiles import dot, load_rows
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
def facts_kernel(
    x, out, grad, lse, facts, heads, length,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """What is to be known of a token besides its rows, (B, H, L, 4): one access gets all of it.

    The log mass of its softmax, infinite where it sees none, so that every weight is zero; what a softmax
    takes off the gradients of its scores; one over its length as a key; and that length.
    """
    tiles = tl.cdiv(length, ROWS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = pair // heads, pair % heads
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    i = i.to(tl.int64)
    inside = i < length
    o = load_rows(out, b, h, 0, i, length, V_SIZE, V_BLOCK).to(ACC)
    g = load_rows(grad, b, h, 0, i, length, V_SIZE, V_BLOCK).to(ACC)
    inverse = inverse_length(load_rows(x, b, h, 0, i, length, SIZE, BLOCK), SIZE, ACC)
    mass = tl.load(lse + pair * length + i, mask=inside, other=0.0)
    at = facts + (pair * length + i) * 4
    tl.store(at, tl.where(mass == float("-inf"), float("inf"), mass), mask=inside)
    tl.store(at + 1, tl.sum(o * g, 1), mask=inside)
    tl.store(at + 2, inverse, mask=inside)
    tl.store(at + 3, 1 / inverse, mask=inside)


@triton.jit
def _walk(
    d_own, radial, d_value, own, own_value, own_grad, own_mass, own_delta, own_inverse, own_length, x, v,
    grad, facts, ring, seed, dropout, b, h, pair, r, i, place_i, at_i, chunk_i, label_i, there_i, start, stop,
    real,
    OF_X: tl.constexpr, OF_V: tl.constexpr, AS_QUERIES: tl.constexpr, AS_KEYS: tl.constexpr,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr, REACH: tl.constexpr,
    CIRCULAR: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The places start … stop - 1, which the own tokens may see as queries, or be seen from as keys."""
    for first in range(start, stop, COLUMNS):
        at = first + tl.arange(0, COLUMNS)
        j, place_j, label_j, there_j = whose(ring, pair, r, at, stop, real, CHUNK, CIRCULAR)
        chunk_j = chunk_of(at, REACH, CHUNK)
        of_other = facts + (pair * ring.length + j) * 4
        other = gather(x, b, h, j, there_j, SIZE, BLOCK)
        if AS_QUERIES and OF_X:
            value = gather(v, b, h, j, there_j, V_SIZE, V_BLOCK)
        if AS_KEYS:
            g = gather(grad, b, h, j, there_j, V_SIZE, V_BLOCK)
        products = dot(own, tl.trans(other), ACC, PRECISION)
        pull = tl.zeros_like(products)  # dx[own] is a sum of the others, each times this
        if AS_QUERIES and OF_X:
            inverse = tl.load(of_other + 2, mask=there_j, other=0.0)
            s = scores(
                products, inverse[None, :], ring, pair, i[:, None], chunk_i[:, None], label_i[:, None],
                there_i[:, None], j[None, :], chunk_j[None, :], label_j[None, :], there_j[None, :],
                CHUNK, BACK, AHEAD, CIRCULAR, CAUSAL, WHOLE, SCALE, ACC,
            )  # fmt: skip
            p = tl.exp2(s - own_mass[:, None])
            dp = dot(own_grad, tl.trans(value), ACC, PRECISION)
            if seed is not None:
                keep = kept(
                    seed, dropout, pair, place_i[:, None], chunk_i[:, None], at[None, :], CHUNK, BACK, AHEAD
                )
                dp = tl.where(keep, dp / (1 - dropout), 0.0)
            # In units of the own key's inverse length, as what comes from the keys' side is: near to one.
            pull += p * (dp - own_delta[:, None]) * inverse[None, :] * own_length[:, None]
        if AS_KEYS:
            mass = tl.load(of_other, mask=there_j, other=float("inf"))
            s = scores(
                products, own_inverse[:, None], ring, pair, j[None, :], chunk_j[None, :], label_j[None, :],
                there_j[None, :], i[:, None], chunk_i[:, None], label_i[:, None], there_i[:, None],
                CHUNK, BACK, AHEAD, CIRCULAR, CAUSAL, WHOLE, SCALE, ACC,
            )  # fmt: skip
            p = tl.exp2(s - mass[None, :])
            left = p
            if seed is not None:
                keep = kept(
                    seed, dropout, pair, place_j[None, :], chunk_j[None, :], at_i[:, None], CHUNK, BACK, AHEAD
                )
                left = tl.where(keep, p / (1 - dropout), 0.0)
            if OF_V:
                d_value += dot(left.to(g.dtype), g, ACC, PRECISION)
            if OF_X:
                dp = dot(own_value, tl.trans(g), ACC, PRECISION)
                if seed is not None:
                    dp = tl.where(keep, dp / (1 - dropout), 0.0)
                delta = tl.load(of_other + 1, mask=there_j, other=0.0)
                ds = p * (dp - delta[None, :])
                radial += tl.sum(ds * products, 1)
                pull += ds
        if OF_X:
            d_own += dot(pull.to(other.dtype), other, ACC, PRECISION)
    return d_own, radial, d_value


@triton.jit
def backward_kernel(
    x, v, grad, facts, d_x, d_v, ring, seed, dropout, heads,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr,
    CIRCULAR: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one round gives to the gradients of ROWS neighbours: `d_x` and `d_v`, where they are wanted.

    A key's is that of its unit vector, less the part along the key: all of it is known when the walk ends.
    """
    tiles = tl.cdiv(ring.length, ROWS)
    first = tl.program_id(0) % tiles * ROWS
    r = tl.program_id(0) // tiles % ring.rounds
    pair = (tl.program_id(0) // tiles // ring.rounds).to(tl.int64)
    b, h = pair // heads, pair % heads
    real = taking_part(ring, b)
    at = first + tl.arange(0, ROWS)
    i, place, label, inside = whose(ring, pair, r, at, ring.length, ring.length, CHUNK, CIRCULAR)
    there = at < real
    own = gather(x, b, h, i, there, SIZE, BLOCK)
    own_value = gather(v, b, h, i, there, V_SIZE, V_BLOCK)
    own_grad = gather(grad, b, h, i, there, V_SIZE, V_BLOCK)
    of_own = facts + (pair * ring.length + i) * 4
    mass = tl.load(of_own, mask=there, other=float("inf"))
    delta = tl.load(of_own + 1, mask=there, other=0.0)
    inverse = tl.load(of_own + 2, mask=there, other=0.0)
    norm = tl.load(of_own + 3, mask=there, other=0.0)
    chunk = at // CHUNK
    d_own = tl.zeros((ROWS, BLOCK), ACC)
    radial = tl.zeros((ROWS,), ACC)
    d_value = tl.zeros((ROWS, V_BLOCK), ACC)

    # The own tokens see from BACK chunks before theirs to AHEAD behind, and are seen from AHEAD before to
    # BACK behind. Between what is within one of the two is what is within both.
    NEAR: tl.constexpr = BACK if BACK < AHEAD else AHEAD
    FAR: tl.constexpr = AHEAD if BACK < AHEAD else BACK
    OF_X: tl.constexpr = d_x is not None
    OF_V: tl.constexpr = d_v is not None
    low = first // CHUNK
    high = (tl.minimum(first + ROWS, ring.length) - 1) // CHUNK + 1
    start, near = (low - FAR) * CHUNK, (low - NEAR) * CHUNK
    far, stop = (high + NEAR) * CHUNK, (high + FAR) * CHUNK
    if not CIRCULAR:
        start, near = tl.minimum(tl.maximum(start, 0), real), tl.minimum(tl.maximum(near, 0), real)
        far, stop = tl.minimum(far, real), tl.minimum(stop, real)
    if first < real:
        if (BACK > AHEAD and OF_X) or BACK < AHEAD:
            d_own, radial, d_value = _walk(
                d_own, radial, d_value, own, own_value, own_grad, mass, delta, inverse, norm, x, v, grad,
                facts, ring, seed, dropout, b, h, pair, r, i, place, at, chunk, label, there, start, near,
                real, OF_X, OF_V, BACK > AHEAD, BACK < AHEAD, SIZE, V_SIZE, BLOCK, V_BLOCK, COLUMNS, CHUNK,
                BACK, AHEAD, FAR, CIRCULAR, CAUSAL, WHOLE, SCALE, ACC, PRECISION,
            )  # fmt: skip
        d_own, radial, d_value = _walk(
            d_own, radial, d_value, own, own_value, own_grad, mass, delta, inverse, norm, x, v, grad,
            facts, ring, seed, dropout, b, h, pair, r, i, place, at, chunk, label, there, near, far,
            real, OF_X, OF_V, True, True, SIZE, V_SIZE, BLOCK, V_BLOCK, COLUMNS, CHUNK,
            BACK, AHEAD, FAR, CIRCULAR, CAUSAL, WHOLE, SCALE, ACC, PRECISION,
        )  # fmt: skip
        if (BACK < AHEAD and OF_X) or BACK > AHEAD:
            d_own, radial, d_value = _walk(
                d_own, radial, d_value, own, own_value, own_grad, mass, delta, inverse, norm, x, v, grad,
                facts, ring, seed, dropout, b, h, pair, r, i, place, at, chunk, label, there, far, stop,
                real, OF_X, OF_V, BACK < AHEAD, BACK > AHEAD, SIZE, V_SIZE, BLOCK, V_BLOCK, COLUMNS, CHUNK,
                BACK, AHEAD, FAR, CIRCULAR, CAUSAL, WHOLE, SCALE, ACC, PRECISION,
            )  # fmt: skip
    if OF_X:
        # Read again: rows that are held all the while cost registers. A length is positive: who is there.
        again = gather(x, b, h, i, norm > 0, SIZE, BLOCK)
        d_own -= (inverse * inverse * radial)[:, None] * again.to(ACC)
        scatter(d_x, b, h, r, i, inside, d_own * (SCALE * inverse)[:, None], SIZE, BLOCK)
    if OF_V:
        if r == 0:  # a token that sees no other in any round has itself
            itself = there & (mass == float("inf"))
            own_share = gather(grad, b, h, i, itself, V_SIZE, V_BLOCK).to(ACC)
            if seed is not None:
                keep = kept_alone(seed, dropout, pair, i)
                own_share = tl.where(keep[:, None], own_share / (1 - dropout), 0.0)
            d_value += own_share
        scatter(d_v, b, h, r, i, inside, d_value, V_SIZE, V_BLOCK)
