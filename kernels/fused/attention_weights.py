"""The weights of dot-product attention, written once: for pictures and for what reads them.

The definition holds the scores, their exponentials and the weights; here a tile goes from the products to the
weights without leaving the chip. The mass of each row comes from the forward kernel, given narrow values.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._vmap import fold_into_batch
from ._attention_launch import Launch, cells
from ._attention_tiles import dot, extent, load_mass, load_rows, scores
from ._saved import save, saved
from .dot_product_attention import attention, definition

# What `attention` takes besides.
_NOTHING: dict[str, Any] = {
    "key_lengths": None,
    "query_starts": None,
    "key_starts": None,
    "longest": [],
    "dropout": 0.0,
    "seed": None,
}


@triton.jit
def weights_kernel(
    q, k, lse, out, rules, seed, dropout, heads, group, longest_queries, longest_keys,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one head."""
    across = tl.cdiv(longest_keys, COLUMNS)
    tiles = tl.cdiv(longest_queries, ROWS) * across
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = pair // heads, pair % heads
    first_query, first_key, queries, keys, taken = extent(rules, b, longest_queries, longest_keys)
    tile = tl.program_id(0) % tiles
    i = tile // across * ROWS + tl.arange(0, ROWS)
    j = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    query = load_rows(q, b, h, first_query, i, queries, SIZE, BLOCK)
    key = load_rows(k, b, h // group, first_key, j, taken, SIZE, BLOCK)
    s = scores(
        dot(query, tl.trans(key), ACC, PRECISION), rules, b, h, i[:, None], j[None, :], keys - queries,
        queries, taken, SCALE, POWER, True, ACC,
    )  # fmt: skip
    p = tl.exp2(s - load_mass(lse, b, h, first_query, i, queries)[:, None])
    at = out.at + b * out.batch + h * out.head + i[:, None].to(tl.int64) * out.row + j[None, :]
    inside = (i[:, None] < longest_queries) & (j[None, :] < longest_keys)
    tl.store(at, p.to(out.at.dtype.element_ty), mask=inside)


@torch.library.custom_op("lamina::attention_weights", mutates_args=())
def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    coefficients: Tensor | None,
    power: int,
    before: int,
    after: int,
    scale: float,
) -> Tensor:
    """(B, H, Lq, Lk), in the dtype of the query. Arguments as of `attention`."""
    given: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "table": table,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "coefficients": coefficients,
        "power": power,
        "before": before,
        "after": after,
        "scale": scale,
        **_NOTHING,
    }
    narrow = key[..., :8]
    _, lse = attention(query, key, narrow, **given)
    call = Launch.of(query, key, narrow, **given)
    out = query.new_empty(*query.shape[:3], key.shape[2])
    tile = call.tiles("bias")
    programs = triton.cdiv(call.queries, tile.rows) * triton.cdiv(call.keys, tile.columns)
    inputs = call.inputs()[:2]
    call.run(weights_kernel, programs * call.heads * call.batches, tile, *inputs, call.line(lse), cells(out))
    return out


@attention_weights.register_fake
def _(query: Tensor, key: Tensor, *options: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save(ctx, inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The definition's: whoever takes a gradient of the weights has all of them in memory anyway."""
    inputs, _ = saved(ctx)
    wanted = [n for n, needed in enumerate(ctx.needs_input_grad) if needed]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            for n in wanted:
                inputs[n] = inputs[n].detach().requires_grad_()
        query, key, *rest = inputs
        names = ("mask", "bias", "table", "query_positions", "key_positions", "coefficients", "power")
        given = dict(zip((*names, "before", "after", "scale"), rest, strict=True))
        identity = torch.eye(key.shape[2], dtype=query.dtype, device=query.device).expand(*key.shape[:3], -1)
        weights, _ = definition(query, key, identity, **given, **_NOTHING)
        found = iter(
            torch.autograd.grad(weights, [inputs[n] for n in wanted], grad, create_graph=create_graph)
        )
    return tuple(next(found) if n in wanted else None for n in range(len(inputs)))


attention_weights.register_autograd(_backward, setup_context=_setup_context)
fold_into_batch(attention_weights, ["query", "key"], broadcast=["mask", "bias"])
