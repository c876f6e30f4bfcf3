"""Packed attention on a CPU as one operation, which loops over the sequences by itself.

So a compiled graph holds it whatever the lengths are, and a sequence costs one call of PyTorch's fused
attention and none of autograd. What that does not take (dropout, shared key heads, values of another width)
goes by tiles.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._score_tiles import wide_dtype
from ._tiled_attention import _attention_backward as tiled_backward
from ._tiled_attention import attention as tiled
from ._tiled_attention import definition as tiled_definition
from .masking import causal_mask


def read_starts(starts: Tensor, tokens: Tensor) -> list[int]:
    """The starts, on the host.

    Raises:
        ValueError: they do not rise from 0 to the number of tokens.
    """
    read: list[int] = starts.tolist()
    if read[:1] != [0] or read[-1] != len(tokens) or any(a > b for a, b in itertools.pairwise(read)):
        raise ValueError(f"starts must rise from 0 to the number of tokens, {len(tokens)}, got {read}")
    return read


@torch.library.custom_op("lamina::packed_attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `packed_attention`, with a seed (1,) where there is dropout.

    The second output is the logarithm of each query's sum of exponentials, (N, H), where the backward pass
    needs it, and else (0, H).
    """
    out = query.new_empty(*query.shape[:2], value.shape[2])
    fused = _fused_takes(query, key, value, seed)
    sums = _unwritten_sums(query, fused)
    for b, rows, columns in _sequences(query, key, query_starts, key_starts):
        q, k, v = _in_heads(query[rows]), _in_heads(key[columns]), _in_heads(value[columns])
        if not (q.numel() and v.numel()):
            found = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3])
            if fused:
                sums[rows] = 0.0
        elif fused:
            found, of_rows = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, scale=scale, **_causality(q, k, is_causal)
            )
            sums[rows] = of_rows[0].T
        else:
            found = tiled(q, k, v, None, None, is_causal, scale, dropout, _seed(seed, b))
        out[rows] = found[0].transpose(0, 1)
    return out, sums


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:2], value.shape[2])
    return out, _unwritten_sums(query, _fused_takes(query, key, value, options[-1]))


@torch.library.custom_op("lamina::packed_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (torch.empty_like(t, memory_format=_ROWS) for t in (query, key, value))
    fused = _fused_takes(query, key, value, seed)
    for b, rows, columns in _sequences(query, key, query_starts, key_starts):
        q, k, v, g = (_in_heads(t) for t in (query[rows], key[columns], value[columns], grad[rows]))
        if not (q.numel() and v.numel()):
            for whole, part in (d_query, rows), (d_key, columns), (d_value, columns):
                whole[part] = 0.0
            continue
        if fused:
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g,
                q,
                k,
                v,
                _in_heads(out[rows]),
                sums[rows].T.unsqueeze(0),
                dropout_p=0.0,
                scale=scale,
                **_causality(q, k, is_causal),
            )
        else:
            options = (None, None, is_causal, scale, dropout, _seed(seed, b))
            found = tiled_backward(g, [True, True, True, False], q, k, v, *options)
        for whole, part, of_part in zip(
            (d_query, d_key, d_value), (rows, columns, columns), found, strict=False
        ):
            whole[part] = of_part[0].transpose(0, 1)
    return d_query, d_key, d_value


@_attention_backward.register_fake
def _(grad: Tensor, out: Tensor, sums: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=_ROWS) for t in inputs[:3])


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """What `attention` gives first, by PyTorch: its derivatives have derivatives. Dropout leaves the same."""
    outputs = [query.new_zeros(0, query.shape[1], value.shape[2])]
    for b, rows, columns in _sequences(query, key, query_starts, key_starts):
        q, k, v = _in_heads(query[rows]), _in_heads(key[columns]), _in_heads(value[columns])
        found = tiled_definition(q, k, v, None, None, is_causal, scale, dropout, _seed(seed, b))
        outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale, ctx.dropout, seed = inputs
    ctx.save_for_backward(*tensors, seed, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed, out, sums = ctx.saved_tensors
    inputs = (*tensors, ctx.is_causal, ctx.scale, ctx.dropout, seed)
    needed = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        wanted = [t for t, is_wanted in zip(tensors, needed, strict=False) if is_wanted]
        given = iter(torch.autograd.grad(definition(*inputs), wanted, grad, create_graph=True))
        found = [next(given) if is_wanted else None for is_wanted in needed]
    else:
        found = list(_attention_backward(grad, out, sums, *inputs))
    return *found, None, None, None, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)

_ROWS = torch.contiguous_format


def _fused_takes(query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None) -> bool:
    return seed is None and query.shape[1] == key.shape[1] and query.shape[2] == value.shape[2]


def _unwritten_sums(query: Tensor, fused: bool) -> Tensor:
    # Not `len`: a compiler may know the number of tokens as a symbol alone.
    return query.new_empty(query.shape[0] if fused else 0, query.shape[1], dtype=wide_dtype(query))


def _sequences(
    query: Tensor, key: Tensor, query_starts: Tensor, key_starts: Tensor
) -> Iterator[tuple[int, slice, slice]]:
    """The number of each sequence, and where its queries and its keys stand."""
    of_queries, of_keys = read_starts(query_starts, query), read_starts(key_starts, key)
    ends = zip(itertools.pairwise(of_queries), itertools.pairwise(of_keys), strict=True)
    for b, (rows, columns) in enumerate(ends):
        yield b, slice(*rows), slice(*columns)


def _in_heads(tokens: Tensor) -> Tensor:
    """(L, H, D) -> (1, H, L, D), a head's channels side by side, as PyTorch's routine wants them."""
    tokens = tokens if tokens.stride(2) == 1 else tokens.contiguous()
    return tokens.transpose(0, 1).unsqueeze(0)


def _causality(q: Tensor, k: Tensor, is_causal: bool) -> dict[str, Any]:
    """As PyTorch's routine takes it, whose own `is_causal` aligns the first query with the first key."""
    if not is_causal or q.shape[2] == k.shape[2]:
        return {"is_causal": is_causal}
    taking_part = causal_mask(q.shape[2], k.shape[2])
    mask = torch.where(taking_part, q.new_zeros(()), -torch.inf)
    return {"is_causal": False, "attn_mask": mask[None, None]}


def _seed(seed: Tensor | None, b: int) -> Tensor | None:
    return None if seed is None else seed + b
