"""Low-rank attention beside `linformer` and the paper's equation in einsum, with the same weights.

`bench_columns` is what remains after the projections, attention to k columns: ours (`fused` where there is a
GPU), its definition, and PyTorch's routine on the same columns.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from lamina.kernels import low_rank_attention, use_backend
from lamina.kernels.low_rank_attention import low_rank_attention_reference
from lamina.layers import LowRankAttention
from torch import Tensor, nn

# batch, length, dim, heads, rank
SIZES = {
    "n512-k128": (4, 512, 768, 12, 128),
    "n1024-k128": (4, 1024, 512, 8, 128),
    "n4096-k256": (4, 4096, 512, 8, 256),
}
# B, H, Lq, k, D
COLUMNS = {"n1024-k128": (4, 8, 1024, 128, 64), "n4096-k256": (4, 8, 4096, 256, 64)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float32]


def twins(dim: int, heads: int, length: int, rank: int) -> tuple[LowRankAttention, nn.Module]:
    linformer = pytest.importorskip("linformer")
    ours = LowRankAttention(dim, heads, max_length=length, rank=rank, share="heads")
    theirs = linformer.LinformerSelfAttention(dim, length, k=rank, heads=heads)
    with torch.no_grad():
        theirs.to_q.weight.copy_(ours.query.weight)
        theirs.to_k.weight.copy_(ours.key.weight)
        theirs.to_v.weight.copy_(ours.value.weight)
        theirs.to_out.load_state_dict(ours.out.state_dict())
        theirs.proj_k.copy_(ours.key_projection.weight[0].T)
        theirs.proj_v.copy_(ours.value_projection.weight[0].T)
    return ours.to(DEVICE), theirs.to(DEVICE)


def in_einsum(layer: LowRankAttention) -> Callable[[Tensor], Tensor]:
    """The paper's equation as it stands there: project to keys and values, then over the length."""

    def attention(x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(linear(x), "b l (h d) -> b h l d", d=layer.head_dim)
            for linear in (layer.query, layer.key, layer.value)
        )
        k = torch.einsum("bhnd,kn->bhkd", k, layer.key_projection.weight[0])
        v = torch.einsum("bhnd,kn->bhkd", v, layer.value_projection.weight[0])
        weights = (torch.einsum("bhnd,bhkd->bhnk", q, k) * layer.head_dim**-0.5).softmax(-1)
        heads = torch.einsum("bhnk,bhkd->bhnd", weights, v)
        return layer.out(rearrange(heads, "b h l d -> b l (h d)"))

    return attention


def flops(sizes: tuple[int, ...], directions: int) -> float:
    """Of the paper's order: four projections of the tokens, two over the length, attention to the columns."""
    batch, length, dim, _, rank = sizes
    return 2 * directions * batch * length * (4 * dim**2 + 4 * rank * dim)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "linformer", "einsum"])
def bench_low_rank_attention(benchmark, benchmark_op, how, sizes, direction):
    batch, length, dim, heads, rank = sizes
    benchmark.group = f"LowRankAttention {sizes} {direction}"
    backward = direction == "forward+backward"
    ours, theirs = twins(dim, heads, length, rank)
    # The peer is the package; what it and the equation are compared to, is ours.
    timed: tuple[Callable[[Tensor], Tensor], nn.Module] = {
        "lamina": (ours, ours), "linformer": (theirs, theirs), "einsum": (in_einsum(ours), ours)
    }[how]  # fmt: skip
    other = theirs if how == "lamina" else ours
    benchmark_op(
        timed[0],
        [torch.randn(batch, length, dim)],
        backward=backward,
        parameters=list(timed[1].parameters()) if backward else (),
        reference=other,
        reference_parameters=list(other.parameters()) if backward else (),
        flops=flops(sizes, 3 if backward else 1),
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("share", ["key_value", "none"])
@pytest.mark.parametrize("how", ["lamina", "einsum"])
def bench_sharing(benchmark, benchmark_op, how, share, direction):
    """One matrix for all is the default; one a head cannot be applied before the projection to keys."""
    batch, length, dim, heads, rank = SIZES["n1024-k128"]
    benchmark.group = f"LowRankAttention share={share} {direction}"
    layer = LowRankAttention(dim, heads, max_length=length, rank=rank, share=share).to(DEVICE)
    backward = direction == "forward+backward"

    def equation(x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(linear(x), "b l (h d) -> b h l d", h=heads)
            for linear in (layer.query, layer.key, layer.value)
        )
        k = torch.einsum("bhnd,hkn->bhkd", k, layer.key_projection.weight.expand(heads, -1, -1))
        v = torch.einsum("bhnd,hkn->bhkd", v, layer.value_projection.weight.expand(heads, -1, -1))
        weights = (torch.einsum("bhnd,bhkd->bhnk", q, k) * layer.head_dim**-0.5).softmax(-1)
        return layer.out(rearrange(torch.einsum("bhnk,bhkd->bhnd", weights, v), "b h l d -> b l (h d)"))

    operation, reference = (layer, equation) if how == "lamina" else (equation, layer)
    parameters = list(layer.parameters()) if backward else ()
    benchmark_op(
        operation,
        [torch.randn(batch, length, dim)],
        backward=backward,
        parameters=parameters,
        reference=reference,
        reference_parameters=parameters,
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("how", ["auto", "reference", "sdpa", "fused"])
def bench_columns(benchmark, benchmark_op, how, sizes, dtype, direction):
    if how == "fused" and DEVICE == "cpu":
        pytest.skip("the kernel runs on a GPU only")
    batch, heads, queries, columns, dim = sizes
    if how == "fused" and dtype is torch.float32 and columns > 128:
        pytest.skip("of float32 so many columns do not fit on chip")
    name = "" if dtype is torch.float32 else " bfloat16"
    benchmark.group = f"low_rank_attention {sizes}{name} {direction}"
    shapes = [(batch, heads, n, dim) for n in (queries, columns, columns)]
    backward = direction == "forward+backward"
    operation: Callable[..., Tensor] = {
        "reference": low_rank_attention_reference, "sdpa": F.scaled_dot_product_attention
    }.get(how, low_rank_attention)  # fmt: skip
    # What the backward pass reads and writes besides: the cotangent, the output again, and each gradient.
    tokens = (6 if backward else 2) * queries + (6 if backward else 2) * columns
    with use_backend("triton") if how == "fused" else nullcontext():
        benchmark_op(
            operation,
            [torch.randn(shape, dtype=dtype) for shape in shapes],
            backward=backward,
            reference=low_rank_attention_reference,
            flops=(14 if backward else 4) * batch * heads * queries * columns * dim,
            bytes_moved=batch * heads * dim * tokens * dtype.itemsize,
        )
