"""Triton kernels of `lamina.kernels.additive_scores`, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..additive_scores import additive_scores_reference


@torch.library.custom_op("lamina::additive_scores", mutates_args=())
def additive_scores(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    batch, n_query, hidden = query.shape
    n_key = key.shape[1]
    scores = query.new_empty(batch, n_query, n_key)
    block = 32
    grid = (triton.cdiv(n_query, block), triton.cdiv(n_key, block), batch)
    _forward_kernel[grid](
        query, key, energy, scores, n_query, n_key, hidden, block, _accumulator(query.dtype)
    )
    return scores


@additive_scores.register_fake
def _(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], key.shape[1])


@torch.library.custom_op("lamina::additive_scores_backward", mutates_args=())
def additive_scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, energy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_energy = _one_side(grad, query, key, energy)
    grad_key, _ = _one_side(grad.transpose(1, 2), key, query, energy)
    return grad_query, grad_key, grad_energy


@additive_scores_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(energy)


def _one_side(grad: Tensor, rows: Tensor, columns: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the side that `rows` is on, and of `energy`; the scores are symmetric in the two."""
    batch, n_rows, hidden = rows.shape
    n_columns = columns.shape[1]
    block_rows, block_hidden = 32, 32
    n_blocks = triton.cdiv(n_rows, block_rows)
    grad_rows = torch.empty_like(rows)
    exact = rows.dtype is torch.float64
    grad_energy = energy.new_empty(batch, n_blocks, hidden, dtype=torch.float64 if exact else torch.float32)
    grid = (n_blocks, triton.cdiv(hidden, block_hidden), batch)
    _backward_kernel[grid](
        grad, *grad.stride(), rows, columns, energy, grad_rows, grad_energy,
        n_rows, n_columns, hidden, block_rows, block_hidden, _accumulator(rows.dtype),
    )  # fmt: skip
    return grad_rows, grad_energy.sum((0, 1)).to(energy.dtype)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    inputs = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the reference has
        return torch.autograd.grad(additive_scores_reference(*inputs), inputs, grad, create_graph=True)
    return additive_scores_backward(grad, *inputs)


additive_scores.register_autograd(_backward, setup_context=_save_inputs)


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype is torch.float64 else tl.float32


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _forward_kernel(
    query, key, energy, scores, n_query, n_key, hidden, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """One (BLOCK, BLOCK) tile of scores."""
    batch = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    query += (batch * n_query + i) * hidden
    key += (batch * n_key + j) * hidden
    tile = tl.zeros((BLOCK, BLOCK), ACC)
    for h in range(hidden):
        q = tl.load(query + h, mask=i < n_query, other=0.0).to(ACC)
        k = tl.load(key + h, mask=j < n_key, other=0.0).to(ACC)
        tile += tl.load(energy + h).to(ACC) * _tanh(q[:, None] + k[None, :])
    at = (batch * n_query + i[:, None]) * n_key + j[None, :]
    tl.store(scores + at, tile, mask=(i[:, None] < n_query) & (j[None, :] < n_key))


@triton.jit
def _backward_kernel(
    grad, grad_batch, grad_row, grad_column, rows, columns, energy, grad_rows, grad_energy,
    n_rows, n_columns, hidden, BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_ROWS, BLOCK_HIDDEN) tile of the rows' gradient, and its part of the energy's."""
    batch = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    h = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    tile = (i[:, None] < n_rows) & (h[None, :] < hidden)
    at = (batch * n_rows + i[:, None]) * hidden + h[None, :]
    row = tl.load(rows + at, mask=tile, other=0.0).to(ACC)
    to_rows = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), ACC)
    to_energy = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), ACC)
    for j in range(n_columns):
        column = tl.load(columns + (batch * n_columns + j) * hidden + h, mask=h < hidden, other=0.0)
        g = tl.load(
            grad + batch * grad_batch + i * grad_row + j * grad_column, mask=i < n_rows, other=0.0
        ).to(ACC)[:, None]
        t = _tanh(row + column.to(ACC)[None, :])
        to_rows += g * (1 - t * t)
        to_energy += g * t
    e = tl.load(energy + h, mask=h < hidden, other=0.0).to(ACC)
    tl.store(grad_rows + at, to_rows * e[None, :], mask=tile)
    part = (batch * tl.num_programs(0) + tl.program_id(0)) * hidden + h
    tl.store(grad_energy + part, tl.sum(to_energy, 0), mask=h < hidden)
