"""Scaled dot-product attention (Vaswani et al., 2017, eq. 1), with any mask, a bias and grouped queries.

    out[b, h, i] = sum_j softmax_j( scale * query[b, h, i] . key[b, h, j] + bias[b, h, i, j] ) value[b, h, j]

where j runs over the keys that take part. A query with none of them gives zero, and passes no gradient.

No kernel of its own yet: the definition and PyTorch's `scaled_dot_product_attention` share the work.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Refusals, choose, forced_backend, forward_derivatives, operation
from .checks import check_bias, check_dropout, check_mask
from .masking import masked_softmax, resolve_mask

# Up to this length a CPU is faster with two plain matrix products than with SDPA's tiles; a causal forward
# of 48 alone measured slower so (docs/benchmarks.md). Eager only: compiled, the branch would pin the length.
SHORT = 48


def _refusals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Refusals:
    refusals: Refusals = {"triton": "there is no fused kernel of this operation yet"}
    if forward_derivatives(query, key, value, *(() if bias is None else (bias,))):
        refusals["torch"] = (
            "forward-mode derivatives are taken, which PyTorch's fused attention does not have"
        )
    elif key.shape[-2] == 0:
        refusals["torch"] = "there is no key"
    elif (
        forced_backend() is None  # a preference, which gives way to a wish
        and not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and max(query.shape[-2], key.shape[-2]) <= SHORT
    ):
        refusals["torch"] = f"up to {SHORT} tokens two matrix products are faster on a CPU"
    return refusals


@operation(_refusals)
def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each query's mean of the values, weighted by the softmax of its scaled dot products with the keys.

    Time O(Lq Lk D). Memory O(Lq Lk) in the definition and O(Lq + Lk) in PyTorch's fused paths. The definition
    is differentiable twice, and forward-mode; PyTorch's fused paths once. Where a second one is wanted,
    run under `use_backend("reference")`. Deterministic on a CPU; on a GPU as PyTorch's paths are, whose
    backward follows `torch.use_deterministic_algorithms`.

    Args:
        query: (B, H, Lq, D).
        key: (B, G, Lk, D), where G divides H: each key head serves H / G neighbouring query heads.
        value: (B, G, Lk, Dv).
        mask: bool, broadcastable to (B, H, Lq, Lk), True where a key takes part.
        bias: float, broadcastable to (B, H, Lq, Lk), added to the scores, differentiable; -inf excludes.
        is_causal: query i sees only the keys up to i + Lk - Lq: the last query sees the last key.
        scale: of the dot products; 1 / sqrt(D) where it is not given.
        dropout: probability with which a weight is dropped; drawn whenever it is not 0, so pass 0 to
            evaluate.

    Returns:
        (B, H, Lq, Dv).

    Raises:
        ValueError: a shape or dtype does not fit the others, a mask is not boolean, a bias is not a float, or
            dropout is not in [0, 1).
    """
    _check(query, key, value, mask, bias, dropout)
    if choose("dot_product_attention", _refusals(query, key, value, bias=bias)) == "torch":
        return _torch_path(query, key, value, mask, bias, is_causal, scale, dropout)
    return dot_product_attention_reference(
        query, key, value, mask=mask, bias=bias, is_causal=is_causal, scale=scale, dropout=dropout
    )


def dot_product_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The definition, in PyTorch: what every other path is tested against. Arguments as of the operation."""
    weights = attention_weights(query, key, mask=mask, bias=bias, is_causal=is_causal, scale=scale)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights.to(value.dtype) @ _repeat_heads(value, query.shape[1])


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The weights of `dot_product_attention`, (B, H, Lq, Lk): a row sums to one, or to zero with no key."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ _repeat_heads(key, query.shape[1]).transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return masked_softmax(
        scores, resolve_mask(mask, bias, is_causal, query.shape[-2], key.shape[-2], query.device)
    )


def _torch_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    grouped = own_causal = False  # by branches: SDPA takes no symbolic truth, as dynamic shapes compare to
    if query.shape[1] != key.shape[1]:
        grouped = True
    # SDPA's own is_causal aligns the first query with the first key, which is ours only for equal lengths.
    if is_causal and mask is None and bias is None and n_queries == n_keys:
        own_causal = True
    taking_part = None if own_causal else resolve_mask(mask, None, is_causal, n_queries, n_keys, query.device)
    added: Tensor | None = taking_part
    if bias is not None:
        added = bias.to(query.dtype)
        added = added if taking_part is None else added.masked_fill(~taking_part, -torch.inf)
    if added is not None:
        # Always in four dimensions: given three, PyTorch 2.13 leaves its fused path on a CPU.
        added = added.expand(n_queries, n_keys) if added.ndim < 2 else added
        added = added.view(*[1] * (4 - added.ndim), *added.shape)
    empty: Tensor | None = None
    if added is not None and not _zeroes_empty_rows(query):
        # Rows with no key see all keys, and are zeroed after.
        empty = ~(added if bias is None else added != -torch.inf).any(-1, keepdim=True)
        added = added | empty if bias is None else added.masked_fill(empty, 0.0)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=added,
        dropout_p=dropout,
        is_causal=own_causal,
        scale=scale,
        enable_gqa=grouped,
    )
    return out if empty is None else out.masked_fill(empty, 0.0)


def _zeroes_empty_rows(query: Tensor) -> bool:
    """Whether SDPA itself gives zero to a query with no key: tested on a CPU, on a GPU up to the backend."""
    return query.device.type == "cpu"


def _repeat_heads(keys: Tensor, heads: int) -> Tensor:
    groups = keys.shape[1]
    return keys if groups == heads else keys.repeat_interleave(heads // groups, dim=1)


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, dropout: float
) -> None:
    fits = query.ndim == key.ndim == value.ndim == 4
    if not fits or not (
        query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[-1] == key.shape[-1]
    ):
        raise ValueError(
            "expected query (B, H, Lq, D), key (B, G, Lk, D) and value (B, G, Lk, Dv), got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"the query's heads must be a multiple of the key's, got {query.shape[1]} and {key.shape[1]}"
        )
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    check_dropout(dropout)
    scores = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    check_mask("mask", mask, scores)
    check_bias(bias, scores)
