"""Attention that sees a part of the sequence: by hash, or by place."""

import torch
from contracts.case import Case
from lamina.layers import LocalAttention, LSHAttention, RotaryPositions


def tokens(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 11, 12, dtype=dtype),)


def masks(dtype: torch.dtype) -> dict[str, object]:
    return {
        "key_mask": torch.tensor([[True] * 5 + [False] * 6, [True] * 11, [False] * 11]),
        "is_causal": True,
    }


CASES = [
    Case(
        "LSHAttention",
        lambda **factory: LSHAttention(12, 3, chunk_size=4, **factory),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "LSHAttention masked",
        lambda **factory: LSHAttention(
            12, 2, chunk_size=3, num_hashes=2, num_buckets=(4, 2), bias=True, dropout=0.3, **factory
        ),
        tokens,
        masks,
        dynamic=((),),
    ),
    Case(
        "LSHAttention as-in-the-paper",
        lambda **factory: LSHAttention(
            12, 2, chunk_size=4, num_hashes=3, num_buckets=4, same_bucket=True, deduplicate=True, **factory
        ),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "LSHAttention as-in-the-original",
        lambda **factory: LSHAttention(
            12,
            2,
            chunk_size=4,
            num_hashes=2,
            circular=True,
            look_ahead=1,
            deduplicate=True,
            redraw=True,
            **factory,
        ),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "LSHAttention in-one-chunk",
        lambda **factory: LSHAttention(12, 2, head_dim=5, scale=0.5, **factory),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "LocalAttention",
        lambda **factory: LocalAttention(12, 3, window=4, **factory),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "LocalAttention masked",
        lambda **factory: LocalAttention(
            12, 2, window=3, look_back=2, dropout=0.3, rotary=RotaryPositions(6), **factory
        ),
        tokens,
        masks,
        dynamic=((),),
    ),
    Case(
        "LocalAttention in-one-window",
        lambda **factory: LocalAttention(12, 2, head_dim=5, bias=False, **factory),
        tokens,
        dynamic=((0, 1),),
    ),
]
