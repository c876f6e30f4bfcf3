"""Attention over grids, relative position biases, axial positions."""

import torch
from contracts.case import Case
from lamina.layers import (
    AxialAttention,
    AxialPositions,
    RelativePositionBias,
    RelativePositionBias2d,
    RotaryPositions,
    WindowAttention,
)


def grid_of(rows: int, cols: int):
    return lambda dtype: (torch.randn(3, rows * cols, 12, dtype=dtype),)


def key_mask(dtype: torch.dtype) -> dict[str, object]:
    mask = torch.ones(3, 35, dtype=torch.bool)
    mask[1, 20:] = mask[2] = False
    return {"grid": (5, 7), "key_mask": mask}


CASES = [
    Case(
        "WindowAttention",
        lambda **factory: WindowAttention(12, 3, window=2, grid=(4, 6), **factory),
        grid_of(4, 6),
    ),
    Case(
        "WindowAttention shifted-padded",
        lambda **factory: WindowAttention(
            12, 2, window=(3, 2), shift=(1, 1), grid=(5, 7), dropout=0.3, **factory
        ),
        grid_of(5, 7),
    ),
    Case(
        "WindowAttention masked",
        lambda **factory: WindowAttention(12, 3, window=3, shift=1, bias=False, **factory),
        grid_of(5, 7),
        key_mask,
        dynamic=((),),
    ),
    Case(
        "WindowAttention without-bias",
        lambda **factory: WindowAttention(12, 2, window=2, shift=1, relative_bias=False, **factory),
        grid_of(4, 4),
    ),
    Case("AxialAttention", lambda **factory: AxialAttention(12, 3, grid=(5, 7), **factory), grid_of(5, 7)),
    Case(
        "AxialAttention masked",
        lambda **factory: AxialAttention(
            12, 2, axes=["width"], dropout=0.3, rotary=RotaryPositions(6), bias=False, **factory
        ),
        grid_of(5, 7),
        lambda dtype: {**key_mask(dtype), "is_causal": True},
        dynamic=((),),
    ),
    Case(
        "AxialPositions",
        lambda **factory: AxialPositions((5, 3, 2), 12, **factory),
        grid_of(5, 5),
        dynamic=((0,),),
    ),
    Case(
        "AxialPositions concatenated-dropped",
        lambda **factory: AxialPositions((7, 5), 12, dims=(5, 7), dropout=0.3, **factory),
        grid_of(5, 7),
        dynamic=((0, 1),),
    ),
    Case(
        "RelativePositionBias",
        lambda **factory: RelativePositionBias(3, max_distance=4, **factory),
        lambda dtype: (7, 5),
        dynamic=((),),
    ),
    Case(
        "RelativePositionBias buckets",
        lambda **factory: RelativePositionBias(3, num_buckets=8, max_distance=11, **factory),
        lambda dtype: (19, 23),
        dynamic=((),),
    ),
    Case(
        "RelativePositionBias one-direction",
        lambda **factory: RelativePositionBias(
            3, num_buckets=5, max_distance=11, bidirectional=False, **factory
        ),
        lambda dtype: (17, 13),
        dynamic=((),),
    ),
    Case(
        "RelativePositionBias2d",
        lambda **factory: RelativePositionBias2d(3, (3, 5), **factory),
        lambda dtype: (),
        dynamic=((),),
    ),
]
