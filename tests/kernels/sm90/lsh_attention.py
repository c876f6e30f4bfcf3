"""Calls of the kernels of LSH attention and of its hashing, by dtype, head size and feature."""

from functools import partial
from itertools import product

import torch
from lamina.kernels.fused import lsh_attention as fused
from lamina.kernels.fused import lsh_buckets

FEATURES = {
    "causal": {"is_causal": True},
    "wide": {"look_back": 2, "look_ahead": 1, "mask": True},
    "ring": {"circular": True, "is_causal": True},
    "own": {"same_bucket": True},
    "once": {"deduplicate": True, "same_bucket": True, "circular": True},
    "dropout": {"dropout": 0.1},
    "small": {"chunk_size": 24, "is_causal": True},
    "large": {"chunk_size": 256, "is_causal": True},
    "single": {"rounds": 1, "length": 40},
    "buckets": {"buckets": True},
}


def call(dtype: torch.dtype, dim: int, length: int = 1024, rounds: int = 4, **features) -> None:
    batch, heads = 2, 4
    query_key, value = (torch.empty(batch, heads, length, dim, dtype=dtype) for _ in range(2))
    order = torch.zeros(batch, heads, rounds, length, dtype=torch.int64)
    if "buckets" in features:
        rotations = torch.empty(heads, dim, rounds, 64)
        lsh_buckets.lsh_buckets._init_fn(query_key, rotations, [128])
        lsh_buckets.lsh_buckets._init_fn(query_key, rotations, [64, 64])
        return
    dropout = features.get("dropout", 0.0)
    inputs = [
        query_key,
        value,
        order,
        order.short() if "same_bucket" in features else None,
        order.int() if "deduplicate" in features else None,
        torch.ones(batch, length, dtype=torch.bool) if "mask" in features else None,
        features.get("chunk_size", 64),
        features.get("look_back", 1),
        features.get("look_ahead", 0),
        "circular" in features,
        "is_causal" in features,
        1.0,
        dropout,
        torch.zeros(1, dtype=torch.int64) if dropout else None,
    ]
    out, lse = fused.lsh_attention._init_fn(*inputs)
    fused.lsh_attention_backward._init_fn(torch.empty_like(out), out, lse, [True, True], *inputs)
    if dropout:
        fused.kept_weights._init_fn(inputs[-1], dropout, list(order.shape), 64, 1, 0)


CASES = {
    f"{str(dtype).removeprefix('torch.')}-{dim}-{feature}": partial(call, dtype, dim, **FEATURES[feature])
    for dtype, dim, feature in product(
        (torch.float16, torch.bfloat16, torch.float32, torch.float64), (16, 64, 80, 128, 256), FEATURES
    )
}
