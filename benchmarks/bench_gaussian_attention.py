"""Attention with a Gaussian prior beside what a user would write, and `torch.nn` with the prior as mask."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from lamina.layers import GaussianAttention
from torch import Tensor, nn

SIZES = {"n512": (4, 512, 512, 8), "n1024": (2, 1024, 512, 8)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prior(layer: GaussianAttention, length: int) -> Tensor:
    """As it stands in the paper."""
    places = torch.arange(length, device=layer.log_sigma.device)
    squared = (places[:, None] - places) ** 2
    return -squared / (2 * layer.log_sigma.exp()[:, None, None] ** 2)


def plain(layer: GaussianAttention, sdpa: bool) -> Callable[[Tensor], Tensor]:
    """softmax(Q Kᵀ / √D + B) V, in three lines or by PyTorch's routine."""

    def attention(x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(linear(x), "b l (h d) -> b h l d", d=layer.head_dim)
            for linear in (layer.query, layer.key, layer.value)
        )
        bias = prior(layer, x.shape[1])
        if sdpa:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            heads = (q @ k.mT * layer.head_dim**-0.5 + bias).softmax(-1) @ v
        return layer.out(rearrange(heads, "b h l d -> b l (h d)"))

    return attention


def torch_twin(layer: GaussianAttention) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """`nn.MultiheadAttention` with the same weights, and with the prior as its `attn_mask`."""
    dim, heads = layer.dim, layer.num_heads
    theirs = nn.MultiheadAttention(dim, heads, batch_first=True).to(DEVICE)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        theirs.out_proj.weight.copy_(layer.out.weight)

    def attention(x: Tensor) -> Tensor:
        mask = prior(layer, x.shape[1]).repeat(len(x), 1, 1)
        return theirs(x, x, x, attn_mask=mask, need_weights=False)[0]

    own = [layer.log_sigma] if layer.log_sigma.requires_grad else []
    return attention, [*theirs.parameters(), *own]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("learnable", [True, False], ids=["learned", "fixed"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "torch.nn", "plain", "plain-sdpa"])
def bench_gaussian_attention(benchmark, benchmark_op, how, sizes, learnable, direction):
    batch, length, dim, heads = sizes
    benchmark.group = f"GaussianAttention {sizes} {'learned' if learnable else 'fixed'} {direction}"
    layer = GaussianAttention(dim, heads, learnable=learnable).to(DEVICE)
    backward = direction == "forward+backward"
    ours: tuple[Callable[[Tensor], Tensor], list[Tensor]] = (layer, list(layer.parameters()))
    if how in ("lamina", "torch.nn"):
        peer = torch_twin(layer)
    else:
        peer = (plain(layer, sdpa=how == "plain-sdpa"), ours[1])
    timed, other = (ours, peer) if how == "lamina" else (peer, ours)
    benchmark_op(
        timed[0],
        [torch.randn(batch, length, dim)],
        backward=backward,
        parameters=timed[1] if backward else (),
        reference=other[0],
        reference_parameters=other[1] if backward else (),
        flops=(6 if backward else 2) * batch * length * (4 * dim**2 + 2 * length * dim),
    )
