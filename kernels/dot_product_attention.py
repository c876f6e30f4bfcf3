"""Scaled dot-product attention (Vaswani et al., 2017, eq. 1), with any mask, a bias and grouped queries.

    out[b, h, i] = sum_j softmax_j( scale * query[b, h, i] . key[b, h, j] + bias[b, h, i, j] ) value[b, h, j]

where j runs over the keys that take part. A query with none of them gives zero, and passes no gradient.

Three paths share the work, and `_refusals` alone says which takes a call. PyTorch's fused attention takes
what it is made for: plain, causal and grouped. On a GPU the Triton kernel takes what that refuses or
writes out: a trained bias, any mask, a window, lengths, a bias of few parameters. The definition takes what
is left.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import as_autocast
from ._second_order import twice_differentiable
from .backend import (
    Refusals,
    choose,
    forced_backend,
    forward_derivatives,
    operation,
    transformed,
    triton_refusal,
)
from .checks import check_bias, check_dropout, check_key_lengths, check_mask, check_window
from .masking import band_mask, combine_masks, mask_of_lengths, masked_softmax, resolve_mask
from .score_bias import DistanceBias, ScoreBias, check_score_bias

# Up to so many tokens two plain matrix products are faster on a CPU than SDPA's tiles (docs/benchmarks.md):
# with a backward pass, with that and a mask, and in a forward pass alone, where with a mask SDPA always is.
SHORT, _SHORT_MASKED, _SHORT_FORWARD = 48, 20, 32
_WIDE = 64  # channels of a head that cost more to copy than that saves: heads of one row of tokens are copied

# From so many scores on, a CPU is faster by tiles where SDPA writes all of them out: with dropout, in forward
# alone and with a backward pass; and with a bias that takes a gradient (docs/benchmarks.md).
_TILED_DROPOUT, _TILED_TRAINING, _TILED_BIAS = 2**17, 2**21, 2**23

Window = tuple[int | None, int | None]  # keys before a query's own place, and after it; None for all


def _refusals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    score_bias: ScoreBias | None = None,
    key_lengths: Tensor | None = None,
    window: Window | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Refusals:
    """By shapes, dtypes and devices alone: what a tensor holds, a GPU would have to be waited for."""
    refusals: Refusals = {}
    tensors = [query, key, value, *(t for t in (bias, _parameters(score_bias)) if t is not None)]
    preferring = forced_backend() is None  # a preference gives way to a wish
    special = [mask, bias, score_bias, key_lengths, window]
    masked = is_causal or any(option is not None for option in special)
    short = _short(query, key, value, bias, masked)
    if (reason := kernel_refusal(query, value, *tensors)) is not None:
        refusals["triton"] = reason
    elif preferring and all(option is None for option in special):
        refusals["triton"] = (
            "plain, causal and grouped attention is what PyTorch's own kernels are fastest at"
        )
    if forward_derivatives(*tensors):
        refusals["torch"] = (
            "forward-mode derivatives are taken, which PyTorch's fused attention does not have"
        )
    elif key.shape[-2] == 0:
        refusals["torch"] = "there is no key"
    elif preferring and short is not None and max(query.shape[-2], key.shape[-2]) <= short:
        refusals["torch"] = f"up to {short} tokens two matrix products are faster on a CPU"
    elif preferring and dropout and query.is_cpu and not _tiles_do(query, key, value, bias, dropout):
        refusals["torch"] = "with dropout PyTorch writes all scores out on a CPU, as the definition does"
    return refusals


def kernel_refusal(query: Tensor, value: Tensor, *tensors: Tensor) -> str | None:
    """Why the attention kernel does not run, whatever the options; `tensors` are all that have gradients."""
    width = max(query.shape[-1], value.shape[-1])
    if (reason := triton_refusal(*tensors)) is not None:
        return reason
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"the kernel has no {query.dtype}"
    if width > 256:
        return f"heads are at most 256 wide in the kernel, these {width}"
    if forced_backend() is None and query.dtype is torch.float64:
        return "of float64 the kernel is made for tests, in small tiles"
    if forced_backend() is None and query.dtype is torch.float32 and width > 128:
        return "float32 heads wider than 128 overflow the registers in the kernel"
    return None


@operation(_refusals)
def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    score_bias: ScoreBias | None = None,
    key_lengths: Tensor | None = None,
    window: Window | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each query's mean of the values, weighted by the softmax of its scaled dot products with the keys.

    Time O(Lq Lk D). Memory O(Lq Lk) in the definition, and O(Lq + Lk) in PyTorch's fused paths and in the
    kernel, which needs a (Lq, Lk) only for the gradient of a bias of that size, once for all batches that
    share it. PyTorch's paths write `score_bias`, `window` and `key_lengths` out as a bias and a mask; the
    kernel never does, and skips what a window, a length or causality leaves out. On a CPU, tiles with a
    backward pass of their own take dropout, and a bias that takes a gradient, from sizes on where they are
    faster: they keep no (Lq, Lk) either.

    Every path is differentiable twice: the second derivatives of PyTorch's, of the tiles and of the kernel
    are the definition's. PyTorch's with dropout are as PyTorch has them. A forward-mode derivative takes the
    definition. On a CPU all is deterministic, and the kernel is; on a GPU PyTorch's paths follow
    `torch.use_deterministic_algorithms`.

    Args:
        query: (B, H, Lq, D).
        key: (B, G, Lk, D), where G divides H: each key head serves H / G neighbouring query heads.
        value: (B, G, Lk, Dv).
        mask: bool, broadcastable to (B, H, Lq, Lk), True where a key takes part.
        bias: float, broadcastable to (B, H, Lq, Lk), added to the scores, differentiable; -inf excludes.
        score_bias: a `DistanceBias` or `TableBias`, added too; differentiable in its parameters.
        key_lengths: integers (B,): the first so many keys take part.
        window: (before, after): how many keys a query sees before its own place, i + Lk - Lq, and after it;
            None for all.
        is_causal: query i sees only the keys up to i + Lk - Lq: the last query sees the last key.
        scale: of the dot products; 1 / sqrt(D) where it is not given.
        dropout: probability with which a weight is dropped; drawn whenever it is not 0, so pass 0 to
            evaluate.

    Returns:
        (B, H, Lq, Dv).

    Raises:
        ValueError: a shape or dtype does not fit the others, a mask is not boolean, a bias is not a float, a
            bound of the window is negative, or dropout is not in [0, 1).
    """
    _check(query, key, value, mask, bias, score_bias, key_lengths, window, dropout)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not torch.compiler.is_compiling() and query.shape[-2] == 1:
        is_causal = False  # the last query sees every key: a step of decoding has no mask to build
    refusals = _refusals(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        score_bias=score_bias,
        key_lengths=key_lengths,
        window=window,
        is_causal=is_causal,
        dropout=dropout,
    )
    path = choose("dot_product_attention", refusals)
    if path == "triton":
        return _triton_path(
            query, key, value, mask, bias, score_bias, key_lengths, window, is_causal, scale, dropout
        )
    mask, bias = written_out(query, key, mask, bias, score_bias, key_lengths, window)

    def definition(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return dot_product_attention_reference(
            query, key, value, mask=mask, bias=bias, is_causal=is_causal, scale=scale, dropout=dropout
        )

    def pytorch(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return _torch_path(query, key, value, mask, bias, is_causal, scale, dropout)

    if path == "reference":
        return definition(query, key, value, bias)
    if _tiles_do(query, key, value, bias, dropout):
        from ._tiled_attention import tiled_attention

        return tiled_attention(query, key, value, mask, bias, is_causal, scale, dropout)
    if dropout:  # the definition would drop others
        return pytorch(query, key, value, bias)
    # One node of autograd, where PyTorch neither repeats heads nor pads them, and `_torch_path` adds nothing.
    trained = bias is not None and bias.requires_grad
    alone = query.is_cpu or (mask is None and bias is None and query.shape[-1] % 8 == 0)
    node = "ScaledDotProduct" if alone and not trained and query.shape[1] == key.shape[1] else ""
    return twice_differentiable(pytorch, definition, query, key, value, bias, node=node)


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
    weights = attention_weights_reference(query, key, mask=mask, bias=bias, is_causal=is_causal, scale=scale)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights.to(value.dtype) @ _repeat_heads(value, query.shape[1])


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    score_bias: ScoreBias | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The weights of `dot_product_attention`, (B, H, Lq, Lk): a row sums to one, or to zero with no key.

    On a GPU a kernel writes them once; elsewhere they are the definition's. The gradient is its, too.
    """
    refusals = _refusals(query, key, key, mask=mask, bias=bias, score_bias=score_bias, window=(None, None))
    refusals["torch"] = "PyTorch's fused attention gives no weights"
    if forced_backend() != "torch" and choose("attention_weights", refusals) == "triton":
        from .fused.attention_weights import attention_weights as fused

        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query, key = as_autocast(query, key)
        mask, bias = _in_four_dimensions(mask, bias, key.shape[-2])
        return fused(query, key, mask, bias, *kernel_bias(score_bias), -1, 0 if is_causal else -1, scale)
    bias = with_score_bias(bias, score_bias, query, key.shape[-2])
    return attention_weights_reference(query, key, mask=mask, bias=bias, is_causal=is_causal, scale=scale)


def attention_weights_reference(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The definition of `attention_weights`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ _repeat_heads(key, query.shape[1]).transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return masked_softmax(
        scores, resolve_mask(mask, bias, is_causal, query.shape[-2], key.shape[-2], query.device)
    )


def _short(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, masked: bool) -> int | None:
    """Up to which length the definition is faster. Eager only: compiled, a branch would pin the length."""
    if not query.is_cpu or torch.compiler.is_compiling():
        return None
    if query.shape[-1] >= _WIDE and not (query.is_contiguous() and key.is_contiguous()):
        return None
    if not _takes_gradients(query, key, value, bias):
        return None if masked else _SHORT_FORWARD
    trained = bias is not None and bias.requires_grad  # of which SDPA has no fused path
    return _SHORT_MASKED if masked and not trained else SHORT


def _takes_gradients(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _tiles_do(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> bool:
    """Whether on a CPU tiles with a backward pass of their own are faster than what SDPA does there."""
    if not query.is_cpu or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or transformed():
        return False
    training = _takes_gradients(query, key, value, bias)
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    if dropout:
        return scores >= (_TILED_TRAINING if training else _TILED_DROPOUT)
    return training and bias is not None and bias.requires_grad and scores >= _TILED_BIAS


def written_out(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    score_bias: ScoreBias | None,
    key_lengths: Tensor | None,
    window: Window | None,
) -> tuple[Tensor | None, Tensor | None]:
    """All that excludes but causality as one mask, and all that is added as one bias."""
    queries, keys = query.shape[-2], key.shape[-2]
    band = None if window is None else band_mask(queries, keys, *window, device=query.device)
    within = None if key_lengths is None else mask_of_lengths(key_lengths, keys)[:, None, None]
    return combine_masks(mask, band, within), with_score_bias(bias, score_bias, query, keys)


def with_score_bias(
    bias: Tensor | None, score_bias: ScoreBias | None, query: Tensor, keys: int
) -> Tensor | None:
    """`bias` and what `score_bias` writes out, in the dtype of the scores."""
    if score_bias is None:
        return bias
    batch, heads, queries, _ = query.shape
    check_bias(bias, (batch, heads, queries, keys))
    check_score_bias(score_bias, (heads, queries, keys))
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    made = score_bias.dense(queries, keys)
    if dtype is torch.float16:  # a far key must not become -inf, which would exclude it
        made = made.clamp(min=torch.finfo(dtype).min / 2)
    return made.to(dtype) if bias is None else bias + made.to(dtype)


def _triton_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    score_bias: ScoreBias | None,
    key_lengths: Tensor | None,
    window: Window | None,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    from .fused.dot_product_attention import attention

    query, key, value = as_autocast(query, key, value)
    mask, bias = _in_four_dimensions(mask, bias, key.shape[-2])
    before, after = (-1 if bound is None else bound for bound in window or (None, None))
    return attention(
        query,
        key,
        value,
        mask,
        bias,
        *kernel_bias(score_bias),
        key_lengths,
        None,
        None,
        [],
        before,
        0 if is_causal else after,
        scale,
        dropout,
        torch.randint(2**62, (1,), device=query.device) if dropout else None,
    )[0]


def kernel_bias(
    score_bias: ScoreBias | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]:
    """As the kernel takes it: table, positions of queries and keys, coefficients, and their power."""
    if score_bias is None:
        return None, None, None, None, 0
    if isinstance(score_bias, DistanceBias):
        return None, None, None, score_bias.coefficients.contiguous(), score_bias.power
    of_queries = score_bias.query_positions.to(torch.int32).contiguous()
    of_keys = score_bias.key_positions.to(torch.int32).contiguous()
    return score_bias.table.contiguous(), of_queries, of_keys, None, 0


def _in_four_dimensions(
    mask: Tensor | None, bias: Tensor | None, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """The bias as wide as the keys are many: so the kernel's gradient of it is."""
    if bias is not None:
        bias = bias.expand(keys) if bias.ndim == 0 else bias.expand(*bias.shape[:-1], keys)
    mask, bias = (None if t is None else t.view(*[1] * (4 - t.ndim), *t.shape) for t in (mask, bias))
    return mask, bias


def _parameters(score_bias: ScoreBias | None) -> Tensor | None:
    if score_bias is None:
        return None
    return score_bias.coefficients if isinstance(score_bias, DistanceBias) else score_bias.table


def _torch_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    score_bias: ScoreBias | None,
    key_lengths: Tensor | None,
    window: Window | None,
    dropout: float,
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
    check_score_bias(score_bias, scores[1:])
    check_key_lengths(key_lengths, query.shape[0])
    check_window(window)
