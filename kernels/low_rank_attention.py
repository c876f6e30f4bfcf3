"""Attention to a few columns: what is left of Linformer's (Wang et al., 2020, eq. 7) after its projections.

    out[b, h, i] = sum_c softmax_c( scale * query[b, h, i] . key[b, h, c] ) value[b, h, c]

where the k columns key = E K and value = F V, some hundreds, stand in for all keys and values. These two are
products of matrices, at which PyTorch is fastest; a sum over the whole length stands between them and the
softmax, so that one kernel for all would have to wait in its middle for every other program.

The softmax is over columns that all fit on chip. The kernel reads them once for many queries, and takes the
softmax in one pass: no running maximum, and nothing to scale again when it rises.
"""

import torch
from torch import Tensor

from ._autocast import as_autocast
from .backend import Refusals, choose, forced_backend, operation, triton_refusal
from .checks import check_dropout, check_key_mask
from .dot_product_attention import _refusals as attention_refusals
from .dot_product_attention import dot_product_attention, dot_product_attention_reference

# The most columns that the kernel holds, by bytes of a number and the greatest width of a head.
MOST_COLUMNS = {2: {64: 256, 128: 128}, 4: {64: 128, 128: 64}, 8: {64: 128, 128: 64}}

# From so many queries on, each column that is read serves enough of them. A guess: no GPU has timed it yet.
_QUERIES = 1024


def _refusals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Refusals:
    mask = None if key_mask is None else key_mask[:, None, None]
    refusals = attention_refusals(query, key, value, mask=mask, scale=scale, dropout=dropout)
    refusals.pop("triton", None)
    preferring = forced_backend() is None  # a preference gives way to a wish
    head_dim = max(query.shape[-1], value.shape[-1])
    if (reason := triton_refusal(query, key, value)) is not None:
        refusals["triton"] = reason
    elif query.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        refusals["triton"] = f"the kernel has no {query.dtype}"
    elif dropout:
        refusals["triton"] = "weights are dropped, which the kernel of dot_product_attention does"
    elif head_dim > 128:
        refusals["triton"] = f"heads are at most 128 wide in the kernel, these {head_dim}"
    elif preferring and query.dtype.itemsize != 2:
        refusals["triton"] = (
            "the kernel is made for half precision; that it would be the faster is unmeasured"
        )
    elif key.shape[-2] > (most := most_columns(query.dtype, head_dim)):
        refusals["triton"] = f"of heads {head_dim} wide {most} columns fit on chip, here are {key.shape[-2]}"
    elif preferring and query.shape[-2] < _QUERIES:
        refusals["triton"] = (
            f"below {_QUERIES} queries reading the columns once for several tiles of them is thought to gain "
            "nothing, which is unmeasured"
        )
    return refusals


def most_columns(dtype: torch.dtype, head_dim: int) -> int:
    """How many columns the kernel holds of heads so wide, which are at most 128."""
    by_size = MOST_COLUMNS[dtype.itemsize]
    return by_size[next(size for size in by_size if head_dim <= size)]


@operation(_refusals)
def low_rank_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each query's mean of the value columns, weighted by the softmax of its products with the key columns.

    It is `dot_product_attention` for many queries and few keys: k columns that a projection over the length
    has made, such as `LengthProjection`. What the kernel does not take goes there.

    Time O(Lq k D). Memory O(Lq + k) beside the output; the backward pass of the kernel adds the gradients of
    the columns once for each of at most 64 groups of queries. The kernel is deterministic, forward and
    backward: the groups' sums are added up in order, without atomics. Every path is differentiable twice,
    the kernel through the definition; a forward-mode derivative takes the definition. On a GPU PyTorch's
    paths follow `torch.use_deterministic_algorithms`.

    Args:
        query: (B, H, Lq, D).
        key: (B, G, k, D), columns of the keys, where G divides H: each serves H / G neighbouring query heads.
        value: (B, G, k, Dv), the same columns of the values.
        key_mask: (B, k) of bool, True where a column takes part.
        scale: of the dot products; 1 / sqrt(D) where it is not given.
        dropout: probability with which a weight is dropped; drawn whenever it is not 0, so pass 0 to
            evaluate.

    Returns:
        (B, H, Lq, Dv); zero where no column takes part.

    Raises:
        ValueError: a shape or dtype does not fit the others, or dropout is not in [0, 1).

    Reference:
        Wang, Li, Khabsa, Fang, Ma. Linformer: Self-Attention with Linear Complexity. arXiv:2006.04768, 2020.
        Section 4.

    Example:
        >>> query, columns = torch.randn(2, 4, 1000, 16), torch.randn(2, 4, 64, 16)
        >>> low_rank_attention(query, columns, columns).shape
        torch.Size([2, 4, 1000, 16])
    """
    _check(query, key, value, key_mask, dropout)
    mask = None if key_mask is None else key_mask[:, None, None]
    refusals = _refusals(query, key, value, key_mask=key_mask, scale=scale, dropout=dropout)
    if choose("low_rank_attention", refusals) != "triton":
        return dot_product_attention(query, key, value, mask=mask, scale=scale, dropout=dropout)
    from .fused.low_rank_attention import attention

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = attention(*as_autocast(query, key, value), mask, scale)[0]
    return out


def low_rank_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition, in PyTorch: that of `dot_product_attention`. Arguments as of the operation."""
    mask = None if key_mask is None else key_mask[:, None, None]
    return dot_product_attention_reference(query, key, value, mask=mask, scale=scale)


def _check(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float) -> None:
    fits = query.ndim == key.ndim == value.ndim == 4
    if not fits or not (
        query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[-1] == key.shape[-1]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
    ):
        raise ValueError(
            "expected query (B, H, Lq, D), key (B, G, k, D) and value (B, G, k, Dv) with G a divisor of H, "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    check_dropout(dropout)
    check_key_mask(key_mask, (key.shape[0], key.shape[2]), "(B, k)")
