"""Calls of the kernels of low-rank attention: "bfloat16-64-256" has heads 64 wide and 256 columns."""

from functools import partial

import torch
from lamina.kernels.fused import low_rank_attention as fused
from torch import Tensor


def call(dtype: torch.dtype, dim: int, columns: int, masked: bool = False) -> None:
    def some(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    query, key, value = some(2, 4, 4096, dim), some(2, 4, columns, dim), some(2, 4, columns, dim)
    mask = torch.ones(2, 1, 1, columns, dtype=torch.bool) if masked else None
    inputs = [query, key, value, mask, dim**-0.5]
    out, lse = fused.attention._init_fn(*inputs)
    fused.attention_backward._init_fn(torch.empty_like(out), None, out, lse, [True] * 3, *inputs)


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SIZES = [(32, 64), (64, 64), (64, 128), (64, 256), (80, 60), (80, 100), (128, 64), (128, 128)]
CASES = {
    f"{name}-{dim}-{columns}": partial(call, dtype, dim, columns)
    for name, dtype in DTYPES.items()
    for dim, columns in SIZES
} | {
    "bfloat16-64-200-masked": partial(call, torch.bfloat16, 64, 200, masked=True),
    "float64-64-128": partial(call, torch.float64, 64, 128),
}
