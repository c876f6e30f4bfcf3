"""Attention layers."""

import torch
from contracts.case import Case
from lamina.layers import AdditiveAttention, MultiHeadAttention, Packing, RotaryPositions
from torch import nn


def self_attention(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 7, 12, dtype=dtype),)


def cross_attention(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 7, 12, dtype=dtype), torch.randn(3, 5, 10, dtype=dtype)


def masks(dtype: torch.dtype) -> dict[str, object]:
    return {
        "key_mask": torch.tensor([[True] * 5 + [False] * 2, [True] * 7, [False] * 7]),
        "bias": torch.randn(2, 7, 7, dtype=dtype),
        "is_causal": True,
    }


def packed(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(7, 12, dtype=dtype),)


def packing(dtype: torch.dtype) -> dict[str, object]:
    return {"packing": Packing(torch.tensor([0, 3, 3, 7]), 4), "is_causal": True}


CASES = [
    Case(
        "MultiHeadAttention",
        lambda **factory: MultiHeadAttention(12, 3, **factory),
        self_attention,
        dynamic=((0, 1),),
    ),
    Case(
        "MultiHeadAttention cross",
        lambda **factory: MultiHeadAttention(12, 3, key_dim=10, **factory),
        cross_attention,
        dynamic=((0, 1), (0, 1)),
    ),
    Case(
        "MultiHeadAttention masked",
        lambda **factory: MultiHeadAttention(12, 2, dropout=0.3, **factory),
        self_attention,
        masks,
        dynamic=((),),
    ),
    Case(
        "MultiHeadAttention grouped-rotary-normalised",
        lambda **factory: MultiHeadAttention(
            12, 2, num_kv_heads=1, rotary=RotaryPositions(6), qk_norm=nn.RMSNorm, bias=False, **factory
        ),
        self_attention,
        dynamic=((0, 1),),
    ),
    Case(
        "MultiHeadAttention wide-values",
        lambda **factory: MultiHeadAttention(12, 3, head_dim=5, value_head_dim=7, **factory),
        self_attention,
        dynamic=((0, 1),),
    ),
    Case(
        "MultiHeadAttention packed", lambda **factory: MultiHeadAttention(12, 3, **factory), packed, packing
    ),
    Case(
        "MultiHeadAttention packed-grouped-rotary",
        lambda **factory: MultiHeadAttention(
            12, 2, num_kv_heads=1, rotary=RotaryPositions(6), qk_norm=nn.RMSNorm, dropout=0.3, **factory
        ),
        packed,
        packing,
    ),
    Case(
        "AdditiveAttention",
        lambda **factory: AdditiveAttention(12, 10, 5, dropout=0.3, **factory),
        cross_attention,
        dynamic=((0, 1), (0, 1)),
    ),
    Case(
        "AdditiveAttention masked",
        lambda **factory: AdditiveAttention(12, 12, 5, **factory),
        self_attention,
        lambda dtype: {**masks(dtype), "bias": torch.randn(7, 7, dtype=dtype)},
        dynamic=((),),
    ),
]
