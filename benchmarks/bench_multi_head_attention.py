"""The whole layer, with its projections, beside `torch.nn.MultiheadAttention` holding the same weights."""

import pytest
import torch
from lamina.layers import AdditiveAttention, MultiHeadAttention
from torch import nn

SIZES = {"digits-17": (64, 17, 64, 4), "vit-197": (4, 197, 768, 12), "bert-512": (2, 512, 768, 12)}


def twins(dim: int, heads: int) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    ours, theirs = MultiHeadAttention(dim, heads), nn.MultiheadAttention(dim, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.out_proj.weight.copy_(ours.out.weight)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ours.to(device), theirs.to(device)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "torch.nn"])
def bench_multi_head_attention(benchmark, benchmark_op, how, sizes, direction):
    batch, length, dim, heads = sizes
    benchmark.group = f"MultiHeadAttention {sizes} {direction}"
    ours, theirs = twins(dim, heads)

    def peer(x):
        return theirs(x, x, x, need_weights=False)[0]

    backward = direction == "forward+backward"
    timed, other = ((ours, ours), (peer, theirs)) if how == "lamina" else ((peer, theirs), (ours, ours))
    benchmark_op(
        timed[0],
        [torch.randn(batch, length, dim)],
        backward=backward,
        parameters=list(timed[1].parameters()) if backward else (),
        reference=other[0],
        reference_parameters=list(other[1].parameters()) if backward else (),
        flops=(2 if not backward else 6) * batch * length * (4 * dim**2 + 2 * length * dim),
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_additive_attention(benchmark, benchmark_op, direction):
    """A decoder's attention over a sentence: no library has the layer, so it stands alone."""
    benchmark.group = f"AdditiveAttention {direction}"
    layer = AdditiveAttention(256, 512, 256).to("cuda" if torch.cuda.is_available() else "cpu")
    backward = direction == "forward+backward"
    parameters = list(layer.parameters()) if backward else ()
    benchmark_op(
        layer, [torch.randn(32, 20, 256), torch.randn(32, 30, 512)], backward=backward, parameters=parameters
    )
