"""Patches, positions, feed-forward networks, stochastic depth and norms."""

from collections.abc import Callable

import torch
from contracts.case import Case
from lamina.layers import (
    DropPath,
    FeedForward,
    LayerNorm2d,
    LearnedPositions,
    LearnedPositions2d,
    PatchEmbedding,
    PixelNorm,
    RotaryPositions,
    ScaleNorm,
    SinusoidalPositions,
    SinusoidalPositions2d,
)
from torch import Tensor, nn


def of(*shape: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    return lambda dtype: (torch.randn(shape, dtype=dtype),)


def on(rows: int, cols: int, prefix: int = 0) -> Callable[[torch.dtype], tuple[Tensor, tuple[int, int]]]:
    return lambda dtype: (torch.randn(2, prefix + rows * cols, 6, dtype=dtype), (rows, cols))


TOKENS, GRID, HEADS, IMAGE = of(2, 7, 6), of(2, 15, 6), of(2, 3, 5, 6), of(2, 3, 7, 11)

CASES = [
    Case("DropPath", lambda **factory: DropPath(0.3), TOKENS, dynamic=((0, 1),)),
    Case(
        "FeedForward", lambda **factory: FeedForward(6, 11, dropout=0.1, **factory), TOKENS, dynamic=((0, 1),)
    ),
    Case(
        "FeedForward gated",
        lambda **factory: FeedForward(6, 11, gated=True, activation=nn.SiLU, bias=False, **factory),
        TOKENS,
        dynamic=((0, 1),),
    ),
    Case("LayerNorm2d", lambda **factory: LayerNorm2d(3, **factory), IMAGE, dynamic=((0, 2, 3),)),
    Case("LearnedPositions", lambda **factory: LearnedPositions(7, 6, **factory), TOKENS),
    Case(
        "LearnedPositions interpolated",
        lambda **factory: LearnedPositions(5, 6, interpolate=True, **factory),
        TOKENS,
    ),
    Case("LearnedPositions2d", lambda **factory: LearnedPositions2d((3, 5), 6, **factory), GRID),
    Case(
        "LearnedPositions2d bilinear",
        lambda **factory: LearnedPositions2d((2, 3), 6, num_prefix_tokens=2, **factory),
        on(3, 5, prefix=2),
    ),
    Case(
        "LearnedPositions2d bicubic",
        lambda **factory: LearnedPositions2d((4, 3), 6, interpolation="bicubic", **factory),
        on(3, 5),
    ),
    Case(
        "PatchEmbedding", lambda **factory: PatchEmbedding(5, (2, 4), **factory), IMAGE, dynamic=((0, 2, 3),)
    ),
    Case(
        "PatchEmbedding overlapping",
        lambda **factory: PatchEmbedding(5, 3, stride=2, norm=nn.LayerNorm, flatten=False, **factory),
        IMAGE,
        dynamic=((0, 2, 3),),
    ),
    Case("PixelNorm", lambda **factory: PixelNorm(), IMAGE, dynamic=((0, 2, 3),)),
    Case("RotaryPositions", lambda **factory: RotaryPositions(6, **factory), HEADS, dynamic=((0, 2),)),
    Case(
        "RotaryPositions interleaved",
        lambda **factory: RotaryPositions(6, interleaved=True, **factory),
        HEADS,
        lambda dtype: {"offset": 3, "positions": torch.randint(0, 17, (2, 1, 5))},
    ),
    Case("ScaleNorm", lambda **factory: ScaleNorm(6, **factory), TOKENS, dynamic=((0, 1),)),
    Case(
        "SinusoidalPositions", lambda **factory: SinusoidalPositions(6, **factory), TOKENS, dynamic=((0, 1),)
    ),
    Case("SinusoidalPositions2d", lambda **factory: SinusoidalPositions2d(6, **factory), on(3, 5)),
]
