"""Triton kernels of `lamina.kernels.low_rank_attention`, forward and backward: their registration.

All columns of a head are on chip in the forward pass and for the gradient of the queries, which thus read
them once for many tiles of queries. The gradients of the columns are sums over all queries: programs share
these out in parts, whose sums are written down and added up after, always in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .._score_tiles import like_tokens
from .._vmap import fold_into_batch
from ._attention_launch import Launch, Tiles, cells
from ._low_rank_kernels import column_kernel, forward_kernel, query_kernel
from ._saved import save, saved
from .dot_product_attention import definition as attention_definition

# By kernel, bits of a number and greatest head size: queries of a tile, columns at most, warps and stages.
# Chosen from what the compiler reports for sm_90 (test_fused_low_rank_attention.py), the largest that spill
# nothing; which is the fastest, a GPU has yet to tell.
_TILES = {
    "forward": {
        16: {64: Tiles(128, 256, 8, 2), 128: Tiles(128, 128, 8, 2)},
        32: {64: Tiles(32, 128, 8, 1), 128: Tiles(16, 64, 8, 1)},
    },
    "query": {
        16: {64: Tiles(128, 128, 8, 2), 128: Tiles(128, 64, 8, 1)},
        32: {64: Tiles(16, 64, 8, 1), 128: Tiles(16, 64, 8, 1)},
    },
    "column": {
        16: {64: Tiles(64, 128, 8, 2), 128: Tiles(64, 128, 8, 1)},
        32: {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1)},
    },
}

# Programs that fill a GPU of some hundred multiprocessors several times; above, each takes more queries.
_PROGRAMS = 512
_TILES_EACH = 8
_PARTS = 64


def tiles(kernel: str, dtype: torch.dtype, head_dim: int, queries: int, columns: int) -> Tiles:
    """The configuration of a kernel: a table, never tuned at run time. float64 is for tests."""
    by_size = _TILES[kernel][min(torch.finfo(dtype).bits, 32)]
    found = by_size[next(size for size in by_size if head_dim <= size)]
    rows = min(found.rows, max(16, triton.next_power_of_2(queries)))
    return found._replace(rows=rows, columns=min(found.columns, max(16, triton.next_power_of_2(columns))))


@torch.library.custom_op("lamina::low_rank_attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output (B, H, Lq, Dv), and the logarithm to base 2 of each softmax's mass, (B, H, Lq).

    Args:
        query: (B, H, Lq, D).
        key: (B, G, k, D).
        value: (B, G, k, Dv).
        mask: bool, (1 or B, 1, 1, 1 or k).
        scale: of the products.
    """
    call = _launch(query, key, value, scale)
    out, lse = like_tokens(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=call.wide)
    tile, programs, each = _by_queries(call, "forward")
    taken = None if mask is None else cells(mask)
    call.run(
        forward_kernel, programs, tile, *call.inputs(), call.rows(out), call.line(lse), taken,
        own=(each, mask is None and call.keys == tile.columns),
    )  # fmt: skip
    return out, lse


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return like_tokens(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.custom_op("lamina::low_rank_attention_backward", mutates_args=())
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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; of the columns nothing to read where neither is `needed`."""
    call = _launch(query, key, value, scale)
    taken = None if mask is None else cells(mask)
    _, of_key, of_value = needed
    d_query, delta = like_tokens(query, query.shape[3]), torch.empty_like(lse)
    tile, programs, each = _by_queries(call, "query")
    lines = (call.line(lse), call.line(delta))
    call.run(
        query_kernel, programs, tile, *call.inputs(), call.rows(out), call.rows(grad), lines[0],
        None if grad_lse is None else call.line(grad_lse), lines[1], call.rows(d_query), taken,
        own=(each, mask is None and call.keys % tile.columns == 0, triton.cdiv(call.keys, tile.columns)),
    )  # fmt: skip
    if not (of_key or of_value):
        return d_query, query.new_empty(0), query.new_empty(0)
    tile = tiles("column", query.dtype, _head_dim(call), call.queries, call.keys)
    programs = triton.cdiv(call.keys, tile.columns) * call.key_heads * call.batches
    n_tiles = triton.cdiv(call.queries, tile.rows)
    parts = max(1, min(n_tiles, _PARTS, _PROGRAMS // max(1, programs)))
    shapes = [(parts * call.batches, call.key_heads, *t.shape[2:]) for t in (key, value)]
    d_key, d_value = (torch.zeros(s, dtype=call.wide, device=query.device) for s in shapes)
    call.run(
        column_kernel, programs * parts, tile, *call.inputs(), call.rows(grad), *lines, call.rows(d_key),
        call.rows(d_value), taken,
        own=(parts, triton.cdiv(n_tiles, parts) * tile.rows, mask is None and call.keys % tile.columns == 0),
    )  # fmt: skip
    in_parts = (d.view(parts, call.batches, *d.shape[1:]) for d in (d_key, d_value))
    of_columns = [d.sum(0).to(t.dtype) for d, t in zip(in_parts, (key, value), strict=True)]
    return d_query, of_columns[0], of_columns[1]


@attention_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needed: Sequence[bool], *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = inputs[:3]
    d_query = like_tokens(query, query.shape[3])
    if not any(needed[1:]):
        return d_query, query.new_empty(0), query.new_empty(0)
    return d_query, key.new_empty(key.shape), value.new_empty(value.shape)


def definition(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What `attention` gives, in PyTorch: its derivatives have derivatives."""
    return attention_definition(
        query, key, value, mask, None, None, None, None, None, 0, None, None, None, [], -1, -1, scale, 0.0,
        None,
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save(ctx, inputs, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (out, lse) = saved(ctx)
    needed = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        given = zip(definition(*inputs), (grad, grad_lse), strict=True)
        outputs = [(o, g) for o, g in given if g is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in outputs],
                [t for t, wanted in zip(inputs, needed, strict=False) if wanted],
                [g for _, g in outputs],
                create_graph=True,
                materialize_grads=True,
            )
        )
        return *(next(found) if wanted else None for wanted in needed), None, None
    grad = torch.zeros_like(out) if grad is None else grad
    gradients = attention_backward(grad, grad_lse, out, lse, needed, *inputs)
    return *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), None, None


attention.register_autograd(_backward, setup_context=_setup_context)
fold_into_batch(attention, ["query", "key", "value"], broadcast=["mask"])


def _launch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Launch:
    return Launch.of(
        query, key, value, None, None, None, None, None, None, 0, None, None, None, [], -1, -1, scale, 0.0,
        None,
    )  # fmt: skip


def _by_queries(call: Launch, kernel: str) -> tuple[Tiles, int, int]:
    """Of a kernel that holds all columns: its configuration, programs, and how many tiles each takes."""
    tile = tiles(kernel, call.query.dtype, _head_dim(call), call.queries, call.keys)
    n_tiles, pairs = triton.cdiv(call.queries, tile.rows), call.heads * call.batches
    each = max(1, min(_TILES_EACH, n_tiles * pairs // _PROGRAMS))
    return tile, triton.cdiv(n_tiles, each) * pairs, each


def _head_dim(call: Launch) -> int:
    return max(call.query.shape[3], call.value.shape[3])
