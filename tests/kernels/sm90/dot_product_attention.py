"""Calls of the attention kernels, a case for every dtype, head size and feature: "bfloat16-64-mask"."""

from functools import partial
from itertools import product

import torch
from lamina.kernels.fused import dot_product_attention as fused
from lamina.kernels.fused.attention_weights import attention_weights
from torch import Tensor

FEATURES = {
    "plain": {},
    "bias": {"bias": True, "after": 0},
    "table": {"table": True},
    "Gaussian": {"power": 2, "after": 0},
    "mask": {"mask": True, "lengths": True, "before": 100, "after": 100},
    "dropout": {"mask": True, "dropout": 0.1},
    "windows": {"table": True, "length": 64},
    "packed": {"packed": True, "after": 0},
    "weights": {"bias": True, "weights": True},
}


def call(dtype: torch.dtype, dim: int, length: int = 1024, **features) -> None:
    def some(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    batch, heads = 2, 4
    packed = features.get("packed", False)
    query, key, value = (some(1 if packed else batch, heads, length, dim) for _ in range(3))
    places = torch.arange(length, dtype=torch.int32)
    table = features.get("table", False)
    dropout = features.get("dropout", 0.0)
    starts = torch.tensor([0, length // 2, length], dtype=torch.int32) if packed else None
    inputs = [
        query,
        key,
        value,
        torch.ones(batch, 1, length, length, dtype=torch.bool) if "mask" in features else None,
        some(1, heads, length, length) if "bias" in features else None,
        some(heads, 2 * length) if table else None,
        places + length - 1 if table else None,
        places if table else None,
        torch.zeros(heads) if "power" in features else None,
        features.get("power", 0),
        torch.full((batch,), length) if "lengths" in features else None,
        starts,
        starts,
        [length, length] if packed else [],
        features.get("before", -1),
        features.get("after", -1),
        dim**-0.5,
        dropout,
        torch.zeros(1, dtype=torch.int64) if dropout else None,
    ]
    if "weights" in features:  # of the value, the lengths and the dropout it has none
        attention_weights._init_fn(*inputs[:2], *inputs[3:10], *inputs[14:17])
        return
    out, lse = fused.attention._init_fn(*inputs)
    fused.attention_backward._init_fn(torch.empty_like(out), None, out, lse, [True] * 6, *inputs)


CASES = {
    f"{str(dtype).removeprefix('torch.')}-{dim}-{feature}": partial(call, dtype, dim, **FEATURES[feature])
    for dtype, dim, feature in product(
        (torch.float16, torch.bfloat16, torch.float32, torch.float64), (8, 32, 64, 80, 128, 256), FEATURES
    )
}


def many_lengths() -> None:
    for length in range(129, 149):
        call(torch.bfloat16, 64, length, after=0)


CASES["twenty lengths"] = many_lengths
