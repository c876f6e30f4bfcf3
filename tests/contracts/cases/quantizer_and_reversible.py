"""The quantiser, reversible layers, and the feed-forward network in chunks."""

from typing import Any

import torch
from contracts.case import Case
from lamina.layers import (
    ChunkedFeedForward,
    FeedForward,
    MultiHeadAttention,
    Reversible,
    ReversibleBlock,
    VectorQuantizer,
)
from torch import Tensor, nn


def tokens(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(3, 7, 6, dtype=dtype),)


def two_streams(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.randn(3, 7, 6, dtype=dtype), torch.randn(3, 7, 6, dtype=dtype)


def image(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(2, 6, 3, 5, dtype=dtype),)


def masks(dtype: torch.dtype) -> dict[str, object]:
    return {"key_mask": torch.tensor([[True] * 5 + [False] * 2, [True] * 7, [False] * 7]), "is_causal": True}


def block(**factory: Any) -> ReversibleBlock:
    return ReversibleBlock(
        MultiHeadAttention(6, 2, dropout=0.2, **factory), FeedForward(6, 11, dropout=0.2, **factory)
    )


CASES = [
    Case(
        "ChunkedFeedForward",
        lambda **factory: ChunkedFeedForward(6, 11, chunk_size=4, **factory),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "ChunkedFeedForward gated-dropout",
        lambda **factory: ChunkedFeedForward(
            6, 11, chunk_size=4, gated=True, activation=nn.SiLU, dropout=0.2, bias=False, **factory
        ),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "ChunkedFeedForward kept",
        lambda **factory: ChunkedFeedForward(6, 11, chunk_size=4, recompute=False, **factory),
        tokens,
        dynamic=((0, 1),),
    ),
    Case("ReversibleBlock", block, two_streams, dynamic=((0, 1), (0, 1))),
    Case(
        "Reversible",
        lambda **factory: Reversible([block(**factory) for _ in range(2)]),
        two_streams,
        dynamic=((0, 1), (0, 1)),
    ),
    Case(
        "Reversible masked",
        lambda **factory: Reversible([block(**factory) for _ in range(2)]),
        tokens,
        masks,
        dynamic=((),),
    ),
    Case("VectorQuantizer", lambda **factory: VectorQuantizer(5, 6, **factory), tokens, dynamic=((0, 1),)),
    Case(
        "VectorQuantizer averages",
        lambda **factory: VectorQuantizer(5, 6, ema_decay=0.9, restart_below=0.95, **factory),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "VectorQuantizer masked",
        lambda **factory: VectorQuantizer(5, 6, restart_below=0.95, **factory),
        tokens,
        lambda dtype: {"mask": torch.rand(3, 7) < 0.7},
        dynamic=((),),
    ),
    Case(
        "VectorQuantizer image",
        lambda **factory: VectorQuantizer(5, 6, channel_dim=1, **factory),
        image,
        dynamic=((0, 2, 3),),
    ),
]
