"""Triton kernels of `lamina.kernels.dot_product_attention`, forward and backward: their registration.

The forward pass saves its inputs, the output and the logarithm of each row's softmax mass; the backward pass
computes the weights again, tile by tile. No tensor of (Lq, Lk) is made but the gradient of a bias that has
one, once for all batches and heads that share it.

All operations take what `attention` takes, in its order.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .._score_tiles import like_tokens
from .._vmap import fold_into_batch
from ..masking import band_mask, combine_masks, mask_of_lengths, masked_softmax
from ..score_bias import DistanceBias, TableBias
from ._attention_backward import bias_kernel, key_kernel, query_kernel
from ._attention_forward import forward_kernel, kept_kernel
from ._attention_launch import Launch, cells, per_head
from ._saved import save, saved


@torch.library.custom_op("lamina::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    coefficients: Tensor | None,
    power: int,
    key_lengths: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    longest: Sequence[int],
    before: int,
    after: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, Lq, Dv), and the logarithm to base 2 of each softmax's mass, (B, H, Lq).

    Args:
        query: (B, H, Lq, D).
        key: (B, G, Lk, D).
        value: (B, G, Lk, Dv).
        mask: bool, four-dimensional, broadcast to (B, H, Lq, Lk).
        bias: float, likewise, but (…, Lk).
        table: (1 or H, R), added at `query_positions[i] - key_positions[j]`.
        query_positions: (Lq,) of int32.
        key_positions: (Lk,) of int32.
        coefficients: (H,), times |i + Lk - Lq - j| to the power `power`, which is 0 without them.
        power: 1 or 2.
        key_lengths: (B,), keys that take part.
        query_starts: (B + 1,), of sequences that lie one after the other in a batch of one.
        key_starts: likewise.
        longest: the most queries and keys of a sequence that has starts; else empty.
        before: keys that are seen before a query's own place, i + Lk - Lq; -1 for all.
        after: keys that are seen after it; -1 for all.
        scale: of the products.
        dropout: probability with which a weight is dropped.
        seed: (1,) of int64, where dropout is not 0.
    """
    call = Launch.of(
        query, key, value, mask, bias, table, query_positions, key_positions, coefficients, power,
        key_lengths, query_starts, key_starts, longest, before, after, scale, dropout, seed,
    )  # fmt: skip
    out, lse = like_tokens(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=call.wide)
    tile = call.tiles("forward")
    programs = triton.cdiv(call.queries, tile.rows) * call.heads * call.batches
    call.run(forward_kernel, programs, tile, *call.inputs(), call.rows(out), call.line(lse))
    return out, lse


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    return like_tokens(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.custom_op("lamina::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needed: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    coefficients: Tensor | None,
    power: int,
    key_lengths: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    longest: Sequence[int],
    before: int,
    after: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias, table, coefficients: of what is not `needed`, nothing to read."""
    call = Launch.of(
        query, key, value, mask, bias, table, query_positions, key_positions, coefficients, power,
        key_lengths, query_starts, key_starts, longest, before, after, scale, dropout, seed,
    )  # fmt: skip
    _, of_key, of_value, of_bias, of_table, of_coefficients = needed
    d_query, d_key, d_value = (like_tokens(t, t.shape[3]) for t in (query, key, value))
    delta = torch.empty_like(lse)
    shape = (call.batches, call.heads, call.queries, call.keys)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=call.wide, device=query.device)

    # A bias gets its gradient from the kernel that has its cells or their sums at hand, or from its own.
    by_key = of_bias and bias is not None and bias.shape[2] == 1
    by_cell = of_bias and bias is not None and not by_key and bias.shape[:2] == shape[:2]
    d_cells, d_columns = zeros(*shape) if by_cell else None, zeros(*shape[:2], shape[3]) if by_key else None

    tile = call.tiles("query")
    n_tiles = triton.cdiv(call.queries, tile.rows)
    d_coefficients = zeros(*shape[:2], n_tiles) if power else None
    lines = (call.line(lse), call.line(delta))
    call.run(
        query_kernel, n_tiles * call.heads * call.batches, tile, *call.inputs(), call.rows(out),
        call.rows(grad), lines[0], None if grad_lse is None else call.line(grad_lse), lines[1],
        call.rows(d_query), None if d_cells is None else cells(d_cells),
        None if d_coefficients is None else per_head(d_coefficients),
    )  # fmt: skip
    if of_key or of_value or by_key:
        tile = call.tiles("key")
        call.run(
            key_kernel, triton.cdiv(call.keys, tile.columns) * call.key_heads * call.batches, tile,
            *call.inputs(), call.rows(grad), *lines, call.rows(d_key), call.rows(d_value),
            None if d_columns is None else per_head(d_columns),
        )  # fmt: skip

    def shared(batches: int, heads: int) -> Tensor:
        """dS, summed over what is shared by a bias that has so many batches and heads of its own."""
        tile = call.tiles("bias")
        n_tiles = triton.cdiv(call.queries, tile.rows) * triton.cdiv(call.keys, tile.columns)
        sharing = (call.batches // batches) * (call.heads // heads)
        # Parts, summed after, where there would be too few programs to fill a GPU.
        parts = max(1, min(sharing, 512 // max(1, n_tiles * batches * heads)))
        summed = zeros(parts, batches, heads, *shape[2:])
        call.run(
            bias_kernel, n_tiles * batches * heads * parts, tile, *call.inputs(), call.rows(grad), *lines,
            summed, own=(batches, heads, parts),
        )  # fmt: skip
        return summed.sum(0)

    d_bias, d_table = query.new_empty(0), query.new_empty(0)
    if of_bias and bias is not None:
        if d_columns is not None:
            full = d_columns.unsqueeze(2)
        elif d_cells is not None:
            full = d_cells
        else:
            full = shared(bias.shape[0], bias.shape[1])
        d_bias = full.sum_to_size(bias.shape).to(bias.dtype)
    if of_table and table is not None and query_positions is not None and key_positions is not None:
        by_place = shared(1, table.shape[0])[0]
        at = query_positions[: call.queries, None] - key_positions[None, : call.keys]
        # Accumulated in sorted order: of `index_add_` on a GPU no two runs would be the same.
        d_table = zeros(table.shape[1], table.shape[0])
        d_table.index_put_((at.flatten(),), by_place.flatten(1).t(), accumulate=True)
        d_table = d_table.t().to(table.dtype).contiguous()
    of_heads = query.new_empty(0)
    if of_coefficients and coefficients is not None and d_coefficients is not None:
        of_heads = d_coefficients.sum((0, 2)).to(coefficients.dtype)
    return d_query, d_key, d_value, d_bias, d_table, of_heads


@attention_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needed: Sequence[bool], *inputs: Any
) -> tuple[Tensor, ...]:
    query, key, value, _, bias, table, _, _, coefficients = inputs[:9]
    of_tokens = (like_tokens(t, t.shape[3]) for t in (query, key, value))
    rest = zip(needed[3:], (bias, table, coefficients), strict=True)
    return (*of_tokens, *(t.new_empty(t.shape) if wanted else query.new_empty(0) for wanted, t in rest))


@torch.library.custom_op("lamina::attention_kept", mutates_args=())
def kept_weights(seed: Tensor, dropout: float, shape: Sequence[int], longest_keys: int, first: int) -> Tensor:
    """Which weights dropout leaves, bool (B, H, Lq, Lk), of the pairs of batch and head from `first` on."""
    out = torch.empty(tuple(shape), dtype=torch.bool, device=seed.device)
    batch, heads, queries, keys = shape
    tile = triton.cdiv(queries, 32) * triton.cdiv(keys, 32)
    if out.numel():
        with torch.cuda.device_of(seed):
            kept_kernel[(tile * batch * heads,)](
                out.view(torch.uint8), seed, dropout, first, queries, keys, longest_keys, BLOCK=32
            )
    return out


@kept_weights.register_fake
def _(seed: Tensor, dropout: float, shape: Sequence[int], longest_keys: int, first: int) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.bool, device=seed.device)


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    coefficients: Tensor | None,
    power: int,
    key_lengths: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    longest: Sequence[int],
    before: int,
    after: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    *,
    first_pair: int = 0,
) -> tuple[Tensor, Tensor]:
    """What `attention` gives, in PyTorch: its derivatives have derivatives. Dropout leaves what it leaves."""
    if query_starts is not None and key_starts is not None:
        outputs, ends = [], zip(query_starts.tolist(), key_starts.tolist(), strict=True)
        for n, ((i, j), (i_end, j_end)) in enumerate(itertools.pairwise(ends)):
            of_mask, of_bias = (_of_sequence(cell, n, i_end - i, j_end - j) for cell in (mask, bias))
            of_sequence = definition(
                query[:, :, i:i_end], key[:, :, j:j_end], value[:, :, j:j_end], of_mask, of_bias, table,
                query_positions, key_positions, coefficients, power,
                None if key_lengths is None else key_lengths[n : n + 1], None, None, [0, longest[1]],
                before, after, scale, dropout, seed, first_pair=n * query.shape[1],
            )  # fmt: skip
            outputs.append(of_sequence)
        out, lse = (torch.cat(parts, 2) for parts in zip(*outputs, strict=True))
        return out, lse
    batch, heads, queries, _ = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) * scale) @ key.to(wide).repeat_interleave(groups, 1).mT
    if bias is not None:
        scores = scores + bias
    if table is not None and query_positions is not None and key_positions is not None:
        scores = scores + TableBias(table, query_positions, key_positions).dense(queries, keys)
    if coefficients is not None:
        scores = scores + DistanceBias(coefficients, 2 if power == 2 else 1).dense(queries, keys)
    bounds = (None if bound < 0 else bound for bound in (before, after))
    band = band_mask(queries, keys, *bounds, device=query.device)
    within = None if key_lengths is None else mask_of_lengths(key_lengths, keys)[:, None, None]
    finite = None if bias is None else bias != -torch.inf
    visible = combine_masks(mask, finite, band, within)
    weights = masked_softmax(scores, visible)
    lse = (scores if visible is None else scores.masked_fill(~visible, -torch.inf)).logsumexp(-1) / math.log(
        2
    )
    if seed is not None:
        longest_keys = longest[1] if longest else keys
        left = kept_weights(seed, dropout, (batch, heads, queries, keys), longest_keys, first_pair)
        weights = weights * left / (1 - dropout)
    out = weights @ value.to(wide).repeat_interleave(groups, 1)
    return out.to(query.dtype), lse


def _of_sequence(cells: Tensor | None, n: int, queries: int, keys: int) -> Tensor | None:
    """Of mask or bias, what is for sequence n."""
    if cells is None:
        return None
    one = cells if cells.shape[0] == 1 else cells[n : n + 1]
    return (one if one.shape[2] == 1 else one[:, :, :queries])[..., :keys]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save(ctx, inputs, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (out, lse) = saved(ctx)
    gradients: list[Tensor | None] = [None] * len(inputs)
    differentiable = [0, 1, 2, 4, 5, 8]  # query, key, value, bias, table, coefficients
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        wanted = [n for n in differentiable if ctx.needs_input_grad[n]]
        outputs = [
            (o, g) for o, g in zip(definition(*inputs), (grad, grad_lse), strict=True) if g is not None
        ]
        found = torch.autograd.grad(
            [o for o, _ in outputs],
            [inputs[n] for n in wanted],
            [g for _, g in outputs],
            create_graph=True,
            materialize_grads=True,
        )
        for place, gradient in zip(wanted, found, strict=True):
            gradients[place] = gradient
        return tuple(gradients)
    grad = torch.zeros_like(out) if grad is None else grad
    needed = [ctx.needs_input_grad[n] for n in differentiable]
    found = attention_backward(grad, grad_lse, out, lse, needed, *inputs)
    for place, gradient in zip(differentiable, found, strict=True):
        if ctx.needs_input_grad[place]:
            gradients[place] = gradient
    return tuple(gradients)


attention.register_autograd(_backward, setup_context=_setup_context)
fold_into_batch(
    attention,
    ["query", "key", "value", "key_lengths"],
    broadcast=["mask", "bias"],
    alone=["query_starts", "key_starts", "seed"],
)
