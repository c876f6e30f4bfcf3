"""Low-rank attention, its projections over the length, and attention with a Gaussian prior."""

import torch
from contracts.case import Case
from lamina.layers import GaussianAttention, LengthProjection, LowRankAttention, RotaryPositions


def tokens(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 7, 12, dtype=dtype),)


def two_sequences(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 7, 12, dtype=dtype), torch.randn(3, 5, 12, dtype=dtype)


def heads(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 2, 7, 5, dtype=dtype),)


def padding(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"key_mask": torch.tensor([[True] * 5 + [False] * 2, [True] * 7, [False] * 7])}


def masks(dtype: torch.dtype) -> dict[str, object]:
    return {**padding(dtype), "bias": torch.randn(2, 7, 7, dtype=dtype), "is_causal": True}


CASES = [
    *(
        Case(
            f"LengthProjection {kind}",
            lambda kind=kind, **factory: LengthProjection(11, 3, heads=2, kind=kind, **factory),
            heads,
            dynamic=((0, 2),),
        )
        for kind in ("linear", "mean", "max", "conv")
    ),
    Case(
        "LengthProjection masked",
        lambda **factory: LengthProjection(11, 3, **factory),
        heads,
        padding,
        dynamic=((),),
    ),
    Case(
        "LowRankAttention",
        lambda **factory: LowRankAttention(12, 3, max_length=11, rank=5, **factory),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "LowRankAttention cross",
        lambda **factory: LowRankAttention(12, 3, max_length=11, rank=4, share="heads", **factory),
        two_sequences,
        dynamic=((0, 1), (0, 1)),
    ),
    Case(
        "LowRankAttention by-head",
        lambda **factory: LowRankAttention(
            12, 4, max_length=11, rank=5, share="none", num_kv_heads=2, dropout=0.3, **factory
        ),
        tokens,
        padding,
        dynamic=((),),
    ),
    *(
        Case(
            f"LowRankAttention {kind}",
            lambda kind=kind, **factory: LowRankAttention(
                12, 3, max_length=11, rank=5, projection=kind, share="none", **factory
            ),
            tokens,
            padding,
            dynamic=((),),
        )
        for kind in ("mean", "max", "conv")
    ),
    Case(
        "GaussianAttention",
        lambda **factory: GaussianAttention(12, 3, **factory),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "GaussianAttention cross-fixed",
        lambda **factory: GaussianAttention(12, 3, learnable=False, windows=(1, 2), **factory),
        two_sequences,
        dynamic=((0, 1), (0, 1)),
    ),
    Case(
        "GaussianAttention masked",
        lambda **factory: GaussianAttention(
            12, 2, num_kv_heads=1, dropout=0.3, rotary=RotaryPositions(6), **factory
        ),
        tokens,
        masks,
        dynamic=((),),
    ),
]
