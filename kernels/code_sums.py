"""The sums of the vectors of each code: what a codebook that learns by moving averages needs of a batch.

    out[k] = sum of x[n] over all n with index[n] = k

The same as of `index_add_`, which a CPU runs fastest. On a GPU that adds by atomics, in whatever order, and
at one row for all vectors of a code at once; the kernel has the vectors sorted by their codes, and each sum
is made in order by those that own it.
"""

import torch
from torch import Tensor

from .backend import Refusals, choose, forced_backend, operation, triton_refusal


def _refusals(x: Tensor, indices: Tensor, num_codes: int, *, mask: Tensor | None = None) -> Refusals:
    refusals: Refusals = {"torch": "the definition is PyTorch's fastest expression"}
    if (reason := triton_refusal(x, indices)) is not None:
        refusals["triton"] = reason
    elif x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        refusals["triton"] = f"the kernel has no {x.dtype}"
    elif x.dtype is torch.float64 and forced_backend() is None:
        refusals["triton"] = "of float64 the kernel is made for tests"
    return refusals


@operation(_refusals)
def code_sums(x: Tensor, indices: Tensor, num_codes: int, *, mask: Tensor | None = None) -> Tensor:
    """The sum of the vectors that chose each code.

    Time O(N D + K D), and of the kernel a sort of the N indices; memory O(K D), and of the kernel O(N) and a
    partial sum for each 256 vectors. Sums are at least float32. Deterministic on a CPU and in the kernel;
    else on a GPU it follows `torch.use_deterministic_algorithms`. Linear in x, and differentiable any number
    of times; a forward-mode derivative takes the definition.

    Args:
        x: (..., D), of any float dtype.
        indices: (...), int64 or int32, each in [0, num_codes); any number where `mask` is False.
        num_codes: K.
        mask: bool (...), True where a vector takes part. What the others hold has no influence.

    Returns:
        (K, D) in float32 at least; zero where a code has no vector.

    Raises:
        ValueError: x is no float, `indices` or `mask` is not of its shape without channels or has another
            dtype, or `num_codes` is less than one.

    Reference:
        van den Oord, Vinyals, Kavukcuoglu. Neural Discrete Representation Learning. NIPS 2017. Appendix A.1.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> code_sums(x, torch.tensor([2, 0, 2]), 3)
        tensor([[3., 4.],
                [0., 0.],
                [6., 8.]])
    """
    _check(x, indices, num_codes, mask)
    if choose("code_sums", _refusals(x, indices, num_codes, mask=mask)) == "triton":
        from .fused import code_sums as fused

        taken = indices if mask is None else indices.masked_fill(~mask, -1)
        out: Tensor = fused.code_sums(x.reshape(indices.numel(), x.shape[-1]), taken.reshape(-1), num_codes)
        return out
    return code_sums_reference(x, indices, num_codes, mask=mask)


def code_sums_reference(x: Tensor, indices: Tensor, num_codes: int, *, mask: Tensor | None = None) -> Tensor:
    """The definition, in PyTorch: what the kernel is tested against, and the path on a CPU."""
    if mask is not None:
        x, indices = x.masked_fill(~mask.unsqueeze(-1), 0), indices.masked_fill(~mask, 0)
    rows = x.reshape(indices.numel(), x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    return rows.new_zeros(num_codes, rows.shape[-1]).index_add_(0, indices.reshape(-1), rows)


def _check(x: Tensor, indices: Tensor, num_codes: int, mask: Tensor | None) -> None:
    if num_codes < 1:
        raise ValueError(f"num_codes must be at least 1, got {num_codes}")
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x must be (..., D) of floats, got {x.dtype} {tuple(x.shape)}")
    if indices.shape != x.shape[:-1] or indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"indices must be int64 or int32 of shape {tuple(x.shape[:-1])}, as x without its channels, "
            f"got {indices.dtype} {tuple(indices.shape)}"
        )
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype is not torch.bool):
        raise ValueError(
            f"mask must be bool of shape {tuple(x.shape[:-1])}, as x without its channels, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
