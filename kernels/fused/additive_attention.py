"""The Triton kernel of `lamina.kernels.additive_attention`, and its backward pass.

One kernel goes from the tokens to the output: scores, their softmax as it runs, its sum of the values. For a
backward pass it writes the scores down: there are H times fewer of them than there were tanh to take, and
with them the softmax's part of that pass is some products of matrices, which PyTorch does. The part through
the tanh is the backward pass of `additive_scores`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._vmap import fold_into_batch
from ..additive_scores import additive_scores_reference
from ..masking import masked_softmax, resolve_mask
from ._additive_kernels import scores_of
from ._additive_launch import accumulator, by_unit, units_of
from ._attention_launch import cells
from ._attention_tiles import LOG2E, dot, load_cells
from ._saved import save, saved
from .additive_scores import additive_scores_backward


@triton.jit
def attention_kernel(
    query, key, energy, value, mask, bias, out, lse, scores, queries, keys, hidden, units, v_size, shift,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, V_BLOCK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS queries: outputs, logarithms of the softmax's mass, and scores unless `scores` is None."""
    tiles = tl.cdiv(queries, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i0 = tl.program_id(0) % tiles * ROWS
    i = i0 + tl.arange(0, ROWS)
    d = tl.arange(0, V_BLOCK)
    of_rows = tl.max(tl.load(query.peaks + b * queries + i, mask=i < queries, other=0.0), 0)
    total = tl.zeros((ROWS, V_BLOCK), ACC)
    peak = tl.full((ROWS,), float("-inf"), ACC)
    mass = tl.zeros((ROWS,), ACC)
    stop = keys
    if IS_CAUSAL:
        stop = tl.minimum(keys, tl.maximum(i0 + ROWS + shift, 0))
    for j0 in range(0, stop, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        inside = (i[:, None] < queries) & (j[None, :] < keys)
        s = scores_of(query, key, energy, i, j, b, queries, keys, hidden, units, of_rows, ACC)
        if bias is not None:
            s += load_cells(bias, b, 0, i[:, None], j[None, :], inside).to(ACC)
        taken = inside
        if IS_CAUSAL:
            taken = taken & (j[None, :] <= i[:, None] + shift)
        if mask is not None:
            taken = taken & (load_cells(mask, b, 0, i[:, None], j[None, :], inside) != 0)
        s = tl.where(taken, s, float("-inf"))
        if scores is not None:
            tl.store(scores + (b * queries + i[:, None]) * keys + j[None, :], s, mask=inside)
        higher = tl.maximum(peak, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
        p = tl.exp2((s - safe[:, None]) * LOG2E)
        shrink = tl.exp2((peak - safe) * LOG2E)
        mass = mass * shrink + tl.sum(p, 1)
        at = (b * keys + j[:, None]) * v_size + d[None, :]
        v = tl.load(value + at, mask=(j[:, None] < keys) & (d[None, :] < v_size), other=0.0)
        if ROWS < 16:  # too few for a product of matrices
            found = tl.sum(tl.trans(p) * v.to(ACC), 0)[None, :]
        else:
            found = dot(p.to(v.dtype), v, ACC, PRECISION)
        total = total * shrink[:, None] + found
        peak = higher
    if scores is not None and IS_CAUSAL:  # of keys that no query here has seen
        for j0 in range(tl.cdiv(stop, COLUMNS) * COLUMNS, keys, COLUMNS):
            j = j0 + tl.arange(0, COLUMNS)
            inside = (i[:, None] < queries) & (j[None, :] < keys)
            nothing = tl.full((ROWS, COLUMNS), float("-inf"), ACC)
            tl.store(scores + (b * queries + i[:, None]) * keys + j[None, :], nothing, mask=inside)
    empty = mass == 0
    some = tl.where(empty, 1.0, mass)
    total = tl.where(empty[:, None], 0.0, total / some[:, None])
    at = (b * queries + i[:, None]) * v_size + d[None, :]
    tl.store(out + at, total, mask=(i[:, None] < queries) & (d[None, :] < v_size))
    log_mass = tl.where(empty, float("inf"), peak + tl.log2(some) / LOG2E)
    tl.store(lse + b * queries + i, log_mass, mask=i < queries)


@torch.library.custom_op("lamina::additive_attention", mutates_args=())
def additive_attention(
    query: Tensor,
    key: Tensor,
    energy: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, Lq, Dv), the natural logarithm of each softmax's mass, and the scores (B, Lq, Lk).

    The mass of nothing is infinite here, so that the weights made from it are zero.

    Args:
        query: (B, Lq, H), dense, as are the next three.
        key: (B, Lk, H).
        energy: (H,).
        value: (B, Lk, Dv).
        mask: bool, (1 or B, 1 or Lq, 1 or Lk).
        bias: float, likewise.
        is_causal: query i sees the keys up to i + Lk - Lq.
        keep: whether the scores are wanted; else there is nothing in them.
    """
    batch, queries, hidden = query.shape
    keys, v_size = value.shape[1:]
    wide, acc = accumulator(query.dtype)
    out, lse = value.new_empty(batch, queries, v_size), query.new_empty(batch, queries, dtype=wide)
    scores = query.new_empty(batch, queries, keys, dtype=wide) if keep else query.new_empty(0, dtype=wide)
    rows = 1 if queries == 1 or acc is tl.float64 else 16  # of float64, which is for tests, no product fits
    programs = batch * triton.cdiv(queries, rows)
    if programs:
        of_query, of_key = by_unit(query), by_unit(key)
        given = (None if t is None else cells(t.unsqueeze(1)) for t in (mask, bias))
        with torch.cuda.device_of(query):
            attention_kernel[(programs,)](
                of_query, of_key, energy, value, *given, out, lse, scores if keep else None, queries, keys,
                hidden, units_of(hidden), v_size, keys - queries, ROWS=rows,
                COLUMNS=32 if v_size > 128 else 64, V_BLOCK=max(16, triton.next_power_of_2(v_size)),
                IS_CAUSAL=is_causal, ACC=acc, num_warps=4, num_stages=2,
                PRECISION="tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3",
            )  # fmt: skip
    return out, lse, scores


@additive_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    energy: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, queries = query.shape[:2]
    shape = (batch, queries, key.shape[1]) if keep else (0,)
    out, lse = value.new_empty(batch, queries, value.shape[2]), query.new_empty(batch, queries, dtype=wide)
    return out, lse, query.new_empty(shape, dtype=wide)


@torch.library.custom_op("lamina::additive_attention_backward", mutates_args=())
def additive_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    scores: Tensor,
    needed: Sequence[bool],
    query: Tensor,
    key: Tensor,
    energy: Tensor,
    value: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, energy, value, bias: of what is not `needed`, nothing to read."""
    wide = scores.dtype
    of_value, of_bias = needed[3:]
    weights, wide_grad = (scores - lse.unsqueeze(-1)).exp_(), grad.to(wide)
    d_value = d_bias = None
    if of_value:
        d_value = (weights.mT @ wide_grad).to(value.dtype)
    d_scores = wide_grad @ value.to(wide).mT
    d_scores -= (wide_grad * out).sum(-1, keepdim=True)
    d_scores *= weights
    if of_bias and bias is not None:
        d_bias = d_scores.sum_to_size(bias.shape).to(bias.dtype)
        d_bias = d_bias.clone() if d_bias is d_scores else d_bias
    through = additive_scores_backward(d_scores, needed[:3], query, key, energy)
    return *through, *(query.new_empty(0) if d is None else d for d in (d_value, d_bias))


@additive_attention_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, scores: Tensor, needed: Sequence[bool], *inputs: Any
) -> tuple[Tensor, ...]:
    given = zip(needed, inputs, strict=True)
    return tuple(t.new_empty(t.shape) if wanted else inputs[0].new_empty(0) for wanted, t in given)


def definition(
    query: Tensor,
    key: Tensor,
    energy: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """The output of `additive_attention`, in PyTorch: its derivatives have derivatives."""
    scores = additive_scores_reference(query, key, energy)
    scores = scores if bias is None else scores + bias
    visible = resolve_mask(mask, bias, is_causal, query.shape[1], key.shape[1], query.device)
    return masked_softmax(scores, visible).to(value.dtype) @ value


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save(ctx, inputs, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *of_no_use: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (out, lse, scores) = saved(ctx)
    gradients: list[Tensor | None] = [None] * len(inputs)
    differentiable = [0, 1, 2, 3, 5]  # query, key, energy, value, bias
    wanted = [n for n in differentiable if ctx.needs_input_grad[n]]
    if grad is None:
        return tuple(gradients)
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        given = [inputs[n] for n in wanted]
        found = torch.autograd.grad(
            definition(*inputs[:7]), given, grad, create_graph=True, materialize_grads=True
        )
    else:
        needed = [n in wanted for n in differentiable]
        every = additive_attention_backward(
            grad, out, lse, scores, needed, *(inputs[n] for n in differentiable)
        )
        found = tuple(g for g, is_wanted in zip(every, needed, strict=True) if is_wanted)
    for place, gradient in zip(wanted, found, strict=True):
        gradients[place] = gradient
    return tuple(gradients)


additive_attention.register_autograd(_backward, setup_context=_setup_context)
fold_into_batch(additive_attention, ["query", "key", "value"], broadcast=["mask", "bias"])
