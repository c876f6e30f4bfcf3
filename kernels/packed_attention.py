"""Dot-product attention of sequences that lie one after the other, without padding.

    out[i] = dot_product_attention of i's own sequence

Padding costs as much as tokens do: of sequences of any lengths, packed rows are all the work there is.
No kernel of its own: that of dot-product attention takes packed rows, in one launch; elsewhere each sequence
is one call, on a CPU within one operation.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from ._autocast import as_autocast
from .backend import Refusals, choose, forward_derivatives, operation, transformed
from .checks import check_dropout, check_window
from .dot_product_attention import (
    Window,
    dot_product_attention,
    dot_product_attention_reference,
    kernel_bias,
    kernel_refusal,
    written_out,
)
from .score_bias import DistanceBias


def _refusals(query: Tensor, key: Tensor, value: Tensor, *starts: Tensor, **options: Any) -> Refusals:
    refusals: Refusals = {}
    score_bias = options.get("score_bias")
    tensors = [query, key, value, *([] if score_bias is None else [score_bias.coefficients])]
    if (reason := kernel_refusal(query, value, *tensors)) is not None:
        refusals["triton"] = reason
    return refusals


@operation(_refusals)
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor | None = None,
    *,
    longest: tuple[int, int] | None = None,
    score_bias: DistanceBias | None = None,
    window: Window | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`dot_product_attention` within each of several sequences, whose tokens stand in one row.

    Time O(sum of Lq Lk D), memory as `dot_product_attention`. The kernel is one launch, and never looks at
    the starts on the host where `longest` is given; the other paths read them, for which a GPU is waited for,
    and call `dot_product_attention` once a sequence. On a CPU a compiled graph holds it whole, for sequences
    of any lengths, without `window` and `score_bias`. Derivatives and determinism are as there.

    Args:
        query: (N, H, D), of all sequences' queries.
        key: (M, G, D), where G divides H.
        value: (M, G, Dv).
        query_starts: integers (B + 1,), from 0 to N: sequence b starts at the b-th and ends before the next.
            Elsewhere they are called `cu_seqlens`.
        key_starts: likewise of the keys, from 0 to M; `query_starts` where they are not given.
        longest: the most queries and the most keys of a sequence, or more; read from the starts where it is
            not given.
        score_bias: a `DistanceBias`, within each sequence.
        window: (before, after), within each sequence, as of `dot_product_attention`.
        is_causal: within each sequence its last query sees its last key.
        scale: of the dot products; 1 / sqrt(D) where it is not given.
        dropout: probability with which a weight is dropped; drawn whenever it is not 0.

    Returns:
        (N, H, Dv).

    Raises:
        ValueError: a shape or dtype does not fit the others, or as `dot_product_attention`. That the starts
            rise from 0 to N is looked at where they are read.

    Reference:
        Vaswani et al. Attention Is All You Need. NIPS 2017. Section 3.2.1. The packed form is that of
        FlashAttention's code: Dao et al. NeurIPS 2022.

    Example:
        >>> tokens = torch.randn(7, 2, 8)  # of a sequence of three and one of four
        >>> packed_attention(tokens, tokens, tokens, torch.tensor([0, 3, 7]), is_causal=True).shape
        torch.Size([7, 2, 8])
    """
    key_starts = query_starts if key_starts is None else key_starts
    _check(query, key, value, query_starts, key_starts, score_bias, window, dropout)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    path = choose("packed_attention", _refusals(query, key, value, score_bias=score_bias))
    if path == "triton":
        longest = longest or (_longest(query_starts), _longest(key_starts))
        return _triton_path(
            query,
            key,
            value,
            query_starts,
            key_starts,
            longest,
            score_bias,
            window,
            is_causal,
            scale,
            dropout,
        )
    if path == "torch" and score_bias is None and window is None and _in_one(query, key, value):
        return _cpu_path(query, key, value, query_starts, key_starts, is_causal, scale, dropout)
    from ._packed_sequences import read_starts

    outputs = []
    ends = list(zip(read_starts(query_starts, query), read_starts(key_starts, key), strict=True))
    for (i, j), (i_end, j_end) in itertools.pairwise(ends):
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query[i:i_end], key[j:j_end], value[j:j_end]))
        if path == "torch":
            out = dot_product_attention(
                q,
                k,
                v,
                score_bias=score_bias,
                window=window,
                is_causal=is_causal,
                scale=scale,
                dropout=dropout,
            )
        else:
            mask, bias = written_out(q, k, None, None, score_bias, None, window)
            out = dot_product_attention_reference(
                q, k, v, mask=mask, bias=bias, is_causal=is_causal, scale=scale, dropout=dropout
            )
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs) if outputs else query.new_zeros(0, query.shape[1], value.shape[2])


def _triton_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest: tuple[int, int],
    score_bias: DistanceBias | None,
    window: Window | None,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    from .fused.dot_product_attention import attention

    query, key, value = as_autocast(query, key, value)
    before, after = (-1 if bound is None else bound for bound in window or (None, None))
    out, _ = attention(
        *(t.transpose(0, 1).unsqueeze(0) for t in (query, key, value)),
        None,
        None,
        *kernel_bias(score_bias),
        None,
        query_starts.to(torch.int32).contiguous(),
        key_starts.to(torch.int32).contiguous(),
        list(longest),
        before,
        0 if is_causal else after,
        scale,
        dropout,
        torch.randint(2**62, (1,), device=query.device) if dropout else None,
    )
    return out.squeeze(0).transpose(0, 1)


def _in_one(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether it is one operation, which autograd and the compiler know, and transforms do not."""
    if torch.compiler.is_compiling():
        return query.is_cpu
    return query.is_cpu and not transformed() and not forward_derivatives(query, key, value)


def _cpu_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    from ._packed_sequences import attention

    query, key, value = as_autocast(query, key, value)
    seed = torch.randint(2**62, (1,)) if dropout else None
    out: Tensor = attention(query, key, value, query_starts, key_starts, is_causal, scale, dropout, seed)[0]
    return out


def _longest(starts: Tensor) -> int:
    return int(starts.diff().max()) if len(starts) > 1 else 0


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    score_bias: DistanceBias | None,
    window: Window | None,
    dropout: float,
) -> None:
    fits = query.ndim == key.ndim == value.ndim == 3
    if not fits or not (
        key.shape[:2] == value.shape[:2]
        and query.shape[-1] == key.shape[-1]
        and key.shape[1]
        and query.shape[1] % key.shape[1] == 0
    ):
        raise ValueError(
            "expected query (N, H, D), key (M, G, D) and value (M, G, Dv) where G divides H, got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    for name, starts in ("query_starts", query_starts), ("key_starts", key_starts):
        if (
            starts.shape != query_starts.shape
            or starts.ndim != 1
            or starts.dtype not in (torch.int32, torch.int64)
        ):
            found = f"{tuple(starts.shape)} of {starts.dtype}"
            raise ValueError(f"{name} must be (B + 1,) of int32 or int64, got {found}")
    if score_bias is not None and not isinstance(score_bias, DistanceBias):
        raise ValueError(f"score_bias must be a DistanceBias, got {type(score_bias).__name__}")
    if score_bias is not None and len(score_bias.coefficients) != query.shape[1]:
        raise ValueError(
            f"score_bias must have {query.shape[1]} coefficients, one a head, "
            f"got {len(score_bias.coefficients)}"
        )
    check_window(window)
    check_dropout(dropout)
