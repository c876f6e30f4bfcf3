"""Layers that sample a few places of what they look at."""

import torch
from contracts.case import Case
from lamina.layers import DeformableAttention, GlimpseNetwork, GlimpseSensor
from torch import Tensor

SHAPES = [(3, 5), (2, 1)]


def pyramid(width: int, *, coordinates: int = 2, levels: tuple[int, ...] = (2,)):
    """Query, reference points and values; the places are drawn inside, so that every parameter matters."""

    def args(dtype: torch.dtype) -> tuple[object, ...]:
        references = 0.3 + 0.4 * torch.rand(3, 7, *levels, coordinates, dtype=dtype)
        return torch.randn(3, 7, 12, dtype=dtype), references, torch.randn(3, 17, width, dtype=dtype), SHAPES

    return args


def padding(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"key_mask": torch.tensor([[True] * 17, [True] * 11 + [False] * 6, [False] * 17])}


def images(*places: int):
    def args(dtype: torch.dtype) -> tuple[Tensor, ...]:
        locations = 2 * torch.rand(3, *places, 2, dtype=dtype) - 1
        return torch.randn(3, 2, 7, 11, dtype=dtype), locations

    return args


CASES = [
    Case(
        "DeformableAttention",
        lambda **factory: DeformableAttention(12, 3, num_levels=2, num_points=2, **factory),
        pyramid(12),
        dynamic=((0, 1), (0, 1), (0,)),
    ),
    Case(
        "DeformableAttention boxes",
        lambda **factory: DeformableAttention(12, 2, num_levels=2, value_dim=10, bias=False, **factory),
        pyramid(10, coordinates=4, levels=()),
        dynamic=((0, 1), (0, 1), (0,)),
    ),
    Case(
        "DeformableAttention masked",
        lambda **factory: DeformableAttention(12, 3, num_levels=2, num_points=1, **factory),
        pyramid(12),
        padding,
        dynamic=((), (), ()),
    ),
    Case("GlimpseSensor", lambda **factory: GlimpseSensor(3), images(), dynamic=((0, 2, 3), (0,))),
    Case(
        "GlimpseSensor scales",
        lambda **factory: GlimpseSensor(2, num_scales=3),
        images(5),
        dynamic=((0, 2, 3), (0, 1)),
    ),
    Case(
        "GlimpseNetwork",
        lambda **factory: GlimpseNetwork(2, 3, num_scales=2, hidden_dim=5, location_dim=4, dim=6, **factory),
        images(),
        dynamic=((0, 2, 3), (0,)),
    ),
]
