"""Calls of the kernels of `code_sums`, by dtype and channels: "float32-64"."""

from functools import partial
from itertools import product

import torch
from lamina.kernels.fused.code_sums import code_sums


def call(dtype: torch.dtype, dim: int, codes: int = 100) -> None:
    code_sums._init_fn(torch.zeros(1000, dim, dtype=dtype), torch.zeros(1000, dtype=torch.int64), codes)


CASES = {
    f"{str(dtype).removeprefix('torch.')}-{dim}": partial(call, dtype, dim)
    for dtype, dim in product((torch.float16, torch.bfloat16, torch.float32, torch.float64), (3, 64, 300))
}
CASES["one code"] = partial(call, torch.float32, 64, 1)  # which Triton makes a constant
