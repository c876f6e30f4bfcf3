"""Additive attention (Bahdanau et al., 2015, section 3.1): a mean of the values, weighted by additive scores.

    out[b, i] = sum_j softmax_j( score[b, i, j] + bias[b, i, j] ) value[b, j]
    score[b, i, j] = sum_h energy[h] tanh(query[b, i, h] + key[b, j, h])

where j runs over the keys that take part. A query with none of them gives zero, and passes no gradient.

A score is as many tanh as there are hidden units, so that the softmax and the sum of the values are little
beside it. What one kernel for all saves is a handful of launches, which is much where a decoder takes a step
at a time, and reading and writing the scores several times, which is much where hidden units are few.
"""

import torch
from torch import Tensor

from .additive_scores import additive_scores, additive_scores_reference, check_tokens, in_one_dtype
from .additive_scores import refusals as scores_refusals
from .backend import Refusals, choose, operation, triton_refusal
from .checks import check_bias, check_mask
from .masking import masked_softmax, resolve_mask

_WIDEST = 256  # values, of which the kernel holds the sums of sixteen queries


def _refusals(
    query: Tensor,
    key: Tensor,
    energy: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> Refusals:
    refusals = scores_refusals(query, key, energy)
    floats = [t for t in (query, key, energy, value, bias) if t is not None]
    if (reason := triton_refusal(*floats)) is not None:
        refusals["triton"] = reason
    elif value.dtype != query.dtype:
        refusals["triton"] = (
            f"the kernel has one dtype, the values have {value.dtype}; that of additive_scores runs"
        )
    elif value.shape[-1] > _WIDEST:
        refusals["triton"] = (
            f"values are at most {_WIDEST} wide in the kernel, these {value.shape[-1]}; "
            "that of additive_scores runs"
        )
    return refusals


@operation(_refusals)
def additive_attention(
    query: Tensor,
    key: Tensor,
    energy: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Each query's mean of the values, weighted by the softmax of its `additive_scores` with the keys.

    Time O(Lq Lk (H + Dv)). Memory O(Lq + Lk) H in the kernel, and O(Lq Lk) more where a gradient is taken;
    O(Lq Lk) in PyTorch's path, O(Lq Lk H) in the definition. All paths are deterministic, and twice
    differentiable (the kernel through the definition); a forward-mode derivative takes the definition.

    Args:
        query: (B, Lq, H), already projected.
        key: (B, Lk, H), already projected.
        energy: (H,), what each hidden unit adds to a score.
        value: (B, Lk, Dv).
        mask: bool, broadcastable to (B, Lq, Lk), True where a key takes part.
        bias: float, broadcastable to (B, Lq, Lk), added to the scores, differentiable; -inf excludes.
        is_causal: query i sees only the keys up to i + Lk - Lq: the last query sees the last key.

    Returns:
        (B, Lq, Dv), in the dtype of the values.

    Raises:
        ValueError: a shape or dtype does not fit the others, a mask is not boolean, or a bias is no float.

    Reference:
        Bahdanau, Cho, Bengio. Neural Machine Translation by Jointly Learning to Align and Translate. ICLR
        2015. Section 3.1 and appendix A.1.2.

    Example:
        >>> query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 4)
        >>> additive_attention(query, key, torch.randn(8), value).shape
        torch.Size([2, 3, 4])
    """
    query, key, energy = in_one_dtype(query, key, energy)
    if torch.is_autocast_enabled(query.device.type):  # under which a product of matrices would cast them
        value = value.to(query.dtype)
    _check(query, key, energy, value, mask, bias)
    refusals = _refusals(query, key, energy, value, mask=mask, bias=bias)
    path = choose("additive_attention", refusals)
    if path == "triton":
        from .fused.additive_attention import additive_attention as fused

        trained = any(t is not None and t.requires_grad for t in (query, key, energy, value, bias))
        dense = (t.contiguous() for t in (query, key, energy, value))
        cells = (_in_three_dimensions(t) for t in (mask, bias))
        out: Tensor = fused(*dense, *cells, is_causal, trained and torch.is_grad_enabled())[0]
        return out
    scores = (additive_scores_reference if path == "reference" else additive_scores)(query, key, energy)
    if bias is not None:
        scores = scores + bias
    visible = resolve_mask(mask, bias, is_causal, query.shape[1], key.shape[1], query.device)
    return masked_softmax(scores, visible).to(value.dtype) @ value


def _in_three_dimensions(cells: Tensor | None) -> Tensor | None:
    return None if cells is None else cells.view(*[1] * (3 - cells.ndim), *cells.shape)


def _check(
    query: Tensor, key: Tensor, energy: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None
) -> None:
    check_tokens(query, key, energy)
    if value.ndim != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"value must be (B, Lk, Dv) = ({key.shape[0]}, {key.shape[1]}, Dv), got {tuple(value.shape)}"
        )
    scores = (query.shape[0], query.shape[1], key.shape[1])
    check_mask("mask", mask, scores)
    check_bias(bias, scores)
