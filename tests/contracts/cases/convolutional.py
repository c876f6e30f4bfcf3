"""Spectral and token norms, frozen batch norm, squeeze-excitation, pixel shuffle, augmentation."""

from collections.abc import Callable

import torch
from contracts.case import Case
from lamina.layers import (
    DifferentiableAugmentation,
    FrozenBatchNorm2d,
    PixelShuffleUpsample,
    SpectralConv2d,
    SpectralLinear,
    SqueezeExcitation,
    TokenNorm,
)
from torch import Tensor, nn


def of(*shape: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    return lambda dtype: (torch.randn(shape, dtype=dtype),)


TOKENS, IMAGE = of(3, 7, 6), of(2, 3, 7, 11)


def padding(dtype: torch.dtype) -> dict[str, object]:
    return {"key_mask": torch.tensor([[True] * 5 + [False] * 2, [True] * 7, [False] * 7])}


CASES = [
    Case(
        "DifferentiableAugmentation",
        lambda **factory: DifferentiableAugmentation(),
        IMAGE,
        dynamic=((0, 2, 3),),
    ),
    Case(
        "FrozenBatchNorm2d",
        lambda **factory: FrozenBatchNorm2d(3, **factory),
        IMAGE,
        dynamic=((0, 2, 3),),
    ),
    Case("PixelShuffleUpsample", lambda **factory: PixelShuffleUpsample(2), of(2, 9, 12), dynamic=((0, 1),)),
    Case(
        "PixelShuffleUpsample oblong",
        lambda **factory: PixelShuffleUpsample(3),
        lambda dtype: (torch.randn(2, 10, 18, dtype=dtype), (2, 5)),
    ),
    Case("SpectralLinear", lambda **factory: SpectralLinear(6, 5, **factory), TOKENS, dynamic=((0, 1),)),
    Case(
        "SpectralConv2d",
        lambda **factory: SpectralConv2d(3, 5, 3, padding=1, power_iterations=2, **factory),
        IMAGE,
        dynamic=((0, 2, 3),),
    ),
    Case(
        "SqueezeExcitation",
        lambda **factory: SqueezeExcitation(3, 5, **factory),
        IMAGE,
        dynamic=((0, 2, 3),),
    ),
    Case(
        "SqueezeExcitation hard",
        lambda **factory: SqueezeExcitation(3, 2, activation=nn.SiLU, gate=nn.Hardsigmoid, **factory),
        IMAGE,
    ),
    Case("TokenNorm", lambda **factory: TokenNorm(6, **factory), TOKENS, dynamic=((0, 1),)),
    Case(
        "TokenNorm masked",
        lambda **factory: TokenNorm(6, affine=True, **factory),
        TOKENS,
        padding,
        dynamic=((1,),),
    ),
]
