"""Calls of the kernels of additive attention, a case for every tile and dtype: "bfloat16-document", and for
the whole of attention "bfloat16-attention-64", whose values are 64 wide."""

from functools import partial

import torch
from lamina.kernels.fused import additive_attention as whole
from lamina.kernels.fused import additive_scores as fused
from torch import Tensor

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Of which each takes another tile: batch, queries, keys.
SIZES = {"step": (32, 1, 50), "translation": (32, 50, 50), "page": (8, 128, 256), "document": (8, 512, 512)}


def some(dtype: torch.dtype, batch: int, queries: int, keys: int) -> list[Tensor]:
    shapes = (batch, queries, 512), (batch, keys, 512), (512,)
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def scores(dtype: torch.dtype, *sizes: int) -> None:
    inputs = some(dtype, *sizes)
    out = fused.additive_scores._init_fn(*inputs)
    fused.additive_scores_backward._init_fn(torch.empty_like(out), [True] * 3, *inputs)


def attention(dtype: torch.dtype, width: int, queries: int = 50, masked: bool = False) -> None:
    inputs, value = some(dtype, 32, queries, 50), torch.empty(32, 50, width, dtype=dtype)
    mask = torch.ones(32, 1, 50, dtype=torch.bool) if masked else None
    bias = torch.empty(1, queries, 50, dtype=dtype) if masked else None
    whole.additive_attention._init_fn(*inputs, value, mask, bias, masked, masked)


CASES = {}
for name, dtype in DTYPES.items():
    for size, sizes in SIZES.items():
        CASES[f"{name}-{size}"] = partial(scores, dtype, *sizes)
    for width in (64, 100, 256):
        CASES[f"{name}-attention-{width}"] = partial(attention, dtype, width)
    CASES[f"{name}-attention-step"] = partial(attention, dtype, 256, 1)
    CASES[f"{name}-attention-masked"] = partial(attention, dtype, 256, masked=True)
