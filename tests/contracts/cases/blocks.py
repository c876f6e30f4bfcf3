"""Blocks and their stacks, on attention of each kind and in both norm orders."""

from functools import partial

import torch
from contracts.case import Case
from lamina.blocks import Bottleneck, Decoder, DecoderBlock, Encoder, EncoderBlock, MaskedTokenHead, ResNet
from lamina.layers import AdditiveAttention, FeedForward, Packing, StandardizedConv2d
from torch import nn


def tokens(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 7, 12, dtype=dtype),)


def tokens_and_memory(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 7, 12, dtype=dtype), torch.randn(3, 5, 12, dtype=dtype)


def images(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 2, 19, 17, dtype=dtype),)


def additive(dim: int, num_heads: int, **factory) -> AdditiveAttention:
    return AdditiveAttention(dim, dim, 5, **factory)


def masks(dtype: torch.dtype) -> dict[str, object]:
    return {"key_mask": torch.arange(7) < torch.tensor([[7], [3], [5]]), "is_causal": True}


CASES = [
    Case(
        "MaskedTokenHead",
        lambda **factory: MaskedTokenHead(6, 13, **factory),
        lambda dtype: (torch.randn(3, 5, 6, dtype=dtype), torch.randn(13, 6, dtype=dtype)),
        dynamic=((0, 1), ()),
    ),
    Case(
        "MaskedTokenHead places",
        lambda **factory: MaskedTokenHead(6, 13, activation=nn.Tanh, **factory),
        lambda dtype: (
            torch.randn(3, 5, 6, dtype=dtype),
            torch.randn(13, 6, dtype=dtype),
            torch.tensor([[1, 4], [0, 2], [3, 3]]),
        ),
        dynamic=((0,), (), (0,)),
    ),
    Case("EncoderBlock", lambda **f: EncoderBlock(12, 3, **f), tokens, masks, dynamic=((),)),
    Case(
        "EncoderBlock post-norm",
        lambda **f: EncoderBlock(12, 3, norm_first=False, dropout=0.2, drop_path=0.2, **f),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "EncoderBlock swapped-parts",
        lambda **f: EncoderBlock(
            12,
            attention=additive,
            feed_forward=partial(FeedForward, hidden_dim=5, gated=True),
            norm=nn.RMSNorm,
            **f,
        ),
        tokens,
        dynamic=((0, 1),),
    ),
    Case(
        "DecoderBlock",
        lambda **f: DecoderBlock(12, 3, **f),
        tokens_and_memory,
        lambda dtype: masks(dtype) | {"memory_key_mask": torch.arange(5) < torch.tensor([[5], [3], [1]])},
        dynamic=((), ()),
    ),
    Case(
        "DecoderBlock post-norm",
        lambda **f: DecoderBlock(12, 3, norm_first=False, dropout=0.2, drop_path=0.2, **f),
        tokens_and_memory,
        dynamic=((0, 1), (0, 1)),
    ),
    Case("StandardizedConv2d", lambda **f: StandardizedConv2d(2, 5, 3, stride=2, bias=True, **f), images),
    Case("Bottleneck", lambda **f: Bottleneck(2, 3, stride=2, **f), images),
    Case("ResNet", lambda **f: ResNet((1, 2), in_channels=2, width=3, **f), images),
    Case("Encoder", lambda **f: Encoder(12, 2, 3, drop_path=0.1, **f), tokens, dynamic=((0, 1),)),
    Case(
        "Encoder packed",
        lambda **f: Encoder(12, 2, 3, drop_path=0.1, **f),
        lambda dtype: (torch.randn(7, 12, dtype=dtype),),
        lambda dtype: {"packing": Packing(torch.tensor([0, 3, 7]), 4)},
    ),
    Case("Decoder", lambda **f: Decoder(12, 2, 3, **f), tokens_and_memory, dynamic=((0, 1), (0, 1))),
]
