"""Linformer's blocks beside those of `linformer`, with the same weights.

lamina       `Encoder` on `LowRankAttention`, pre-norm, as the package has it
linformer    `Linformer` of the package: one E and one F a layer
full         the same blocks on attention of all pairs: what the length costs without the projection
"""

from functools import partial

import pytest
import torch
from lamina.blocks import Encoder, EncoderBlock
from lamina.layers import LowRankAttention, MultiHeadAttention
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Batch, length, dim, heads, rank; two blocks.
SIZES = {"n1024": (4, 1024, 256, 4, 128), "n4096": (1, 4096, 512, 8, 256)}
DEPTH = 2


def stack(dim: int, heads: int, attention) -> Encoder:
    return Encoder(dim, DEPTH, heads, block=partial(EncoderBlock, attention=attention), norm=None).to(DEVICE)


def ours_and_theirs(length: int, dim: int, heads: int, rank: int) -> tuple[Encoder, nn.Module]:
    linformer = pytest.importorskip("linformer")
    torch.manual_seed(0)
    ours = stack(dim, heads, partial(LowRankAttention, max_length=length, rank=rank, share="heads"))
    theirs = linformer.Linformer(dim, length, DEPTH, k=rank, heads=heads).to(DEVICE)
    for block, (attention, feed_forward) in zip(ours.blocks, theirs.net.layers, strict=True):
        block.attention_norm.load_state_dict(attention.norm.state_dict())
        block.feed_forward_norm.load_state_dict(feed_forward.norm.state_dict())
        block.feed_forward.up.load_state_dict(feed_forward.fn.w1.state_dict())
        block.feed_forward.down.load_state_dict(feed_forward.fn.w2.state_dict())
        mine, other = block.attention, attention.fn
        mine.out.load_state_dict(other.to_out.state_dict())
        with torch.no_grad():
            for linear, of in (
                (mine.query, other.to_q),
                (mine.key, other.to_k),
                (mine.value, other.to_v),
            ):
                linear.weight.copy_(of.weight)
            mine.key_projection.weight[0].copy_(other.proj_k.T)
            mine.value_projection.weight[0].copy_(other.proj_v.T)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "linformer", "full"])
def bench_linformer(benchmark, benchmark_op, how, sizes, direction):
    batch, length, dim, heads, rank = sizes
    benchmark.group = f"Linformer {sizes} {direction}"
    backward = direction != "forward"
    tokens = [torch.randn(batch, length, dim)]
    if how == "full":
        full = stack(dim, heads, MultiHeadAttention).eval()
        benchmark_op(full, tokens, backward=backward, parameters=list(full.parameters()) if backward else ())
        return
    ours, theirs = ours_and_theirs(length, dim, heads, rank)
    timed, other = (ours, theirs) if how == "lamina" else (theirs, ours)

    benchmark_op(
        timed,
        tokens,
        backward=backward,
        parameters=list(timed.parameters()) if backward else (),
        reference=other,
        reference_parameters=list(other.parameters()) if backward else (),
        flops=(6 if backward else 2) * DEPTH * batch * length * (12 * dim**2 + 4 * rank * dim),
    )
