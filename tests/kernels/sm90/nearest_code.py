"""Calls of the nearest code's kernels: "float32-64-whole", or "-parts" where several share the codes."""

from functools import partial
from itertools import product

import torch
from lamina.kernels.fused.nearest_code import nearest_code

COUNTS = {"whole": 40_000, "parts": 1000}
DTYPES = {
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "mixed": (torch.bfloat16, torch.float32),
}


def call(dtypes: tuple[torch.dtype, torch.dtype], dim: int, count: int) -> None:
    nearest_code._init_fn(torch.empty(count, dim, dtype=dtypes[0]), torch.empty(4096, dim, dtype=dtypes[1]))


CASES = {
    f"{name}-{dim}-{how}": partial(call, DTYPES[name], dim, COUNTS[how])
    for name, dim, how in product(DTYPES, (3, 64, 100, 128, 256, 320, 512), COUNTS)
}
