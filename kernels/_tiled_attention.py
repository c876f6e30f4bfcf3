"""Dot-product attention on a CPU by tiles that stay in its cache, with a backward pass of its own.

For what PyTorch's fused attention leaves to matrix products of all scores at once: a bias that takes a
gradient, and dropout. A tile is some heads, some of their queries, and the keys that these see. The backward
pass computes the weights again; the gradient of a bias is summed as the bias is shaped. What else is as large
as all scores is a bias with its mask in it, where PyTorch's forward pass is given both.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._score_tiles import Drops, blocks, like_tokens, strike_out, wide_dtype
from .masking import causal_mask, combine_masks, masked_softmax, resolve_mask


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """`dot_product_attention` on a CPU, deterministic, and differentiable twice.

    Args:
        query: (B, H, Lq, D).
        key: (B, G, Lk, D), where G divides H.
        value: (B, G, Lk, Dv).
        mask: bool, broadcastable to (B, H, Lq, Lk), True where a key takes part.
        bias: float, broadcastable likewise; -inf excludes.
        is_causal: query i sees only the keys up to i + Lk - Lq.
        scale: of the dot products.
        dropout: probability with which a weight is dropped, to the nearest 2^-32.

    Returns:
        (B, H, Lq, Dv), in whose memory the heads of a token lie side by side.
    """
    seed = torch.randint(2**62, (1,)) if dropout else None
    mask, bias = (None if t is None else t.view(*[1] * (4 - t.ndim), *t.shape) for t in (mask, bias))
    out: Tensor = attention(query, key, value, mask, bias, is_causal, scale, dropout, seed)
    return out


@torch.library.custom_op("lamina::tiled_attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """As `tiled_attention`, with mask and bias in four dimensions, and a seed (1,) where there is dropout."""
    out = like_tokens(query, value.shape[3])
    if _fused_takes(query, key, value, mask, bias, is_causal, seed):
        added = _added(query, key, mask, bias, is_causal)
        last = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return out.copy_(fused(*last, attn_mask=added, scale=scale)[0])
    drops = None if seed is None else Drops(seed, dropout)
    for tiles in blocks(query, key, is_causal):
        keys, values = tiles[0].keys_of(key), tiles[0].keys_of(value)
        for tile in tiles:
            weights, blind = tile.weights(tile.rows_of(query) * scale, keys, mask, bias, is_causal)
            if drops is not None:
                strike_out(weights, drops.draw(weights.shape))
            outputs = torch.bmm(weights, values[:, : tile.n_keys])
            if drops is not None:
                outputs /= drops.share
            tile.write(out, outputs if blind is None else outputs.masked_fill_(blind, 0.0))
    return out if key.shape[2] else out.zero_()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return like_tokens(query, value.shape[3])


@torch.library.custom_op("lamina::tiled_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    needed: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; of what is not `needed`, nothing to read."""
    of_query, of_key, of_value, of_bias = needed
    d_query, d_key, d_value = (like_tokens(t, t.shape[3]) for t in (query, key, value))
    d_bias = (
        torch.zeros_like(bias, dtype=wide_dtype(query))
        if bias is not None and of_bias
        else query.new_empty(0)
    )
    drops = None if seed is None else Drops(seed, dropout)
    for tiles in blocks(query, key, is_causal):
        keys, values = tiles[0].keys_of(key), tiles[0].keys_of(value)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        for tile in tiles:
            queries, n = tile.rows_of(query) * scale, tile.n_keys
            weights, blind = tile.weights(queries, keys, mask, bias, is_causal)
            d_outputs = tile.rows_of(grad)
            if blind is not None:
                d_outputs = d_outputs.masked_fill(blind, 0.0)
            left = weights
            if drops is not None:
                d_outputs, kept = d_outputs / drops.share, drops.draw(weights.shape)
                left = strike_out(weights.clone(), kept)
            if of_value:
                d_values[:, :n].baddbmm_(left.mT, d_outputs)
            d_weights = torch.bmm(d_outputs, values[:, :n].mT)
            if drops is not None:
                strike_out(d_weights, kept)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if of_query:
                tile.write(d_query, torch.bmm(d_scores, keys[:, :n]).mul_(scale))
            if of_key:
                d_keys[:, :n].baddbmm_(d_scores.mT, queries)
            if of_bias:
                cells = tile.cells_of(d_bias)
                cells += tile.in_four(d_scores).sum_to_size(cells.shape)
        tiles[0].write_keys(d_key, d_keys)
        tiles[0].write_keys(d_value, d_values)
    if not grad.numel() or not key.shape[2]:
        d_query, d_key, d_value = (t.zero_() for t in (d_query, d_key, d_value))
    return d_query, d_key, d_value, d_bias if bias is None else d_bias.to(bias.dtype)


@_attention_backward.register_fake
def _(grad: Tensor, needed: Sequence[bool], *inputs: Any) -> tuple[Tensor, ...]:
    query, key, value, _, bias = inputs[:5]
    d_query, d_key, d_value = (like_tokens(t, t.shape[3]) for t in (query, key, value))
    return d_query, d_key, d_value, torch.empty_like(bias) if needed[3] else query.new_empty(0)


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """What `attention` gives, by PyTorch: its derivatives have derivatives. Dropout leaves the same."""
    wide, groups = wide_dtype(query), query.shape[1] // key.shape[1]
    scores = (query.to(wide) * scale) @ key.to(wide).repeat_interleave(groups, 1).mT
    if bias is not None:
        scores = scores + bias.to(wide)
    visible = resolve_mask(mask, bias, is_causal, query.shape[2], key.shape[2], query.device)
    weights = masked_softmax(scores, visible)
    if seed is not None:
        drops = Drops(seed, dropout)
        left = torch.zeros_like(weights)
        for tile in itertools.chain(*blocks(query, key, is_causal)):
            cells = tile.cells_of(left)
            cells.copy_(drops.draw(cells.shape) != 0)
        weights = weights * left / drops.share
    return (weights @ value.to(wide).repeat_interleave(groups, 1)).to(query.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal, ctx.scale, ctx.dropout, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    inputs = (*tensors, ctx.is_causal, ctx.scale, ctx.dropout, seed)
    needed = [ctx.needs_input_grad[n] for n in (0, 1, 2, 4)]
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        wanted = [inputs[n] for n in (0, 1, 2, 4) if ctx.needs_input_grad[n]]
        found = iter(torch.autograd.grad(definition(*inputs), wanted, grad, create_graph=True))
    else:
        gradients = _attention_backward(grad, needed, *inputs)
        found = (g for g, is_wanted in zip(gradients, needed, strict=True) if is_wanted)
    query, key, value, bias = (next(found) if is_wanted else None for is_wanted in needed)
    return query, key, value, None, bias, None, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)


def _fused_takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    seed: Tensor | None,
) -> bool:
    """Whether PyTorch's fused forward pass can, with a mask and a bias that need no more cells together."""
    shapes = [t.shape for t in (mask, bias) if t is not None]
    if is_causal:
        shapes.append(torch.Size((1, 1, query.shape[2], key.shape[2])))
    joint = math.prod(torch.broadcast_shapes(*shapes)) <= max((math.prod(s) for s in shapes), default=1)
    fits = query.shape[3] == value.shape[3] and query.dtype is wide_dtype(query)
    return joint and fits and seed is None and 0 not in (*query.shape, *key.shape)


def _added(
    query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool
) -> Tensor | None:
    causal = causal_mask(query.shape[2], key.shape[2])[None, None] if is_causal else None
    taking_part = combine_masks(mask, causal)
    if bias is not None:
        bias = bias.to(query.dtype).contiguous()
    if taking_part is None:
        return bias
    zero = query.new_zeros(())
    return torch.where(taking_part, zero if bias is None else bias, -torch.inf)
