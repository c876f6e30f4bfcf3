"""Triton kernels of `lamina.kernels.additive_scores`, forward and backward: their registration.

Nothing is kept but the inputs: the backward pass walks over all pairs again, once for each side.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .._vmap import fold_into_batch
from ..additive_scores import additive_scores_reference
from ._additive_kernels import backward_kernel, scores_kernel
from ._additive_launch import Tokens, accumulator, by_token, by_unit, tiles, units_of


@torch.library.custom_op("lamina::additive_scores", mutates_args=())
def additive_scores(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    """(B, Lq, Lk), in the dtype of the query. The inputs are as of the public operation, and dense."""
    batch, queries, hidden = query.shape
    keys = key.shape[1]
    scores = query.new_empty(batch, queries, keys)
    tile = tiles(batch, queries, keys)
    programs = batch * triton.cdiv(queries, tile.rows) * triton.cdiv(keys, tile.columns)
    if programs:
        of_query, of_key = by_unit(query), by_unit(key)
        with torch.cuda.device_of(query):
            scores_kernel[(programs,)](
                of_query, of_key, energy, scores, queries, keys, hidden,
                units_of(hidden), ROWS=tile.rows, COLUMNS=tile.columns,
                ACC=accumulator(query.dtype)[1], num_warps=tile.warps,
            )  # fmt: skip
    return scores


@additive_scores.register_fake
def _(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], key.shape[1])


@torch.library.custom_op("lamina::additive_scores_backward", mutates_args=())
def additive_scores_backward(
    grad: Tensor, needed: Sequence[bool], query: Tensor, key: Tensor, energy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and energy: of what is not `needed`, nothing to read."""
    d_query, d_key, d_energy = (query.new_empty(0) for _ in range(3))
    if not any(needed):
        return d_query, d_key, d_energy
    of_query, of_key = by_token(query), by_token(key)
    if needed[1]:
        d_key, d_energy = _one_side(grad.mT, of_key, of_query, energy, needed[2] and not needed[0])
    if needed[0] or not needed[1]:  # either side has the energy's gradient with its own
        of_tokens, d_energy = _one_side(grad, of_query, of_key, energy, needed[2])
        d_query = of_tokens if needed[0] else d_query
    return d_query, d_key, d_energy


@additive_scores_backward.register_fake
def _(grad: Tensor, needed: Sequence[bool], query: Tensor, key: Tensor, energy: Tensor) -> tuple[Tensor, ...]:
    given = zip(needed, (query, key, energy), strict=True)
    return tuple(t.new_empty(t.shape) if wanted else query.new_empty(0) for wanted, t in given)


def _one_side(
    grad: Tensor, rows: Tokens, columns: Tokens, energy: Tensor, of_energy: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of `rows`, and of the energy where it is wanted: summed by tiles, then over the tiles."""
    batch, n_rows, hidden = rows.plain.shape
    n_columns = columns.plain.shape[1]
    # Rows, hidden units and warps: eight elements a thread.
    block, units, warps = 16, 64, 4
    n_tiles = triton.cdiv(n_rows, block)
    wide, acc = accumulator(rows.plain.dtype)
    d_rows = torch.empty_like(rows.plain)
    d_energy = energy.new_empty(batch, n_tiles, hidden, dtype=wide) if of_energy else None
    programs = batch * n_tiles * triton.cdiv(hidden, units)
    if programs:
        with torch.cuda.device_of(energy):
            backward_kernel[(programs,)](
                grad, *grad.stride(), rows, columns, energy, d_rows, d_energy, n_rows, n_columns, hidden,
                ROWS=block, UNITS=units, COLUMNS=256, ACC=acc, num_warps=warps,
            )  # fmt: skip
    if d_energy is None:
        return d_rows, energy.new_empty(0)
    return d_rows, d_energy.sum((0, 1)).to(energy.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
        out = additive_scores_reference(*inputs)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
    gradients = additive_scores_backward(grad, list(ctx.needs_input_grad), *inputs)
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=True))


additive_scores.register_autograd(_backward, setup_context=_setup_context)
fold_into_batch(additive_scores, ["query", "key"])
