"""Norms beside torch's own and transformers': over tokens, over channels, and frozen."""

from collections.abc import Callable

import pytest
import torch
from lamina.layers import FrozenBatchNorm2d, PixelNorm, TokenNorm
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = {"transgan-64": (16, 64, 1024), "transgan-1024": (16, 1024, 64), "vit-197": (4, 197, 768)}
IMAGES = {"layer1": (2, 256, 56, 56), "layer4": (2, 2048, 7, 7), "stem": (2, 64, 112, 112)}

directions = pytest.mark.parametrize("direction", ["forward", "forward+backward"])


@directions
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("sizes", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("how", ["lamina", "torch.nn"])
def bench_token_norm(benchmark, benchmark_op, how, sizes, affine, direction):
    """torch's layer wants the tokens last, and leaves a transposed view behind."""
    benchmark.group = f"TokenNorm {sizes} affine={affine} {direction}"
    ours = TokenNorm(sizes[-1], affine=affine).to(DEVICE)
    theirs = nn.InstanceNorm1d(sizes[-1], affine=affine).to(DEVICE)

    def peer(x):
        return theirs(x.mT).mT

    backward = direction == "forward+backward"
    timed, other = ((ours, ours), (peer, theirs)) if how == "lamina" else ((peer, theirs), (ours, ours))
    benchmark_op(
        timed[0],
        [torch.randn(sizes)],
        backward=backward,
        parameters=list(timed[1].parameters()) if backward else (),
        reference=other[0],
        reference_parameters=list(other[1].parameters()) if backward else (),
    )


@directions
@pytest.mark.parametrize("sizes", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("how", ["lamina", "torch.nn"])
def bench_pixel_norm(benchmark, benchmark_op, how, sizes, direction):
    benchmark.group = f"PixelNorm {sizes} {direction}"
    ours = PixelNorm(dim=-1)
    theirs = nn.RMSNorm(sizes[-1], eps=1e-8, elementwise_affine=False)
    timed, other = (ours, theirs) if how == "lamina" else (theirs, ours)
    benchmark_op(timed, [torch.randn(sizes)], backward=direction == "forward+backward", reference=other)


def frozen(how: str, channels: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """With the same statistics, whoever makes it."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels).requires_grad_(False).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.copy_(torch.rand(channels) + 0.5)
    if how == "lamina":
        return FrozenBatchNorm2d.from_batch_norm(norm).to(DEVICE)
    if how == "transformers":
        detr = pytest.importorskip("transformers.models.detr.modeling_detr").DetrFrozenBatchNorm2d(channels)
        detr.load_state_dict(norm.state_dict())
        return detr.to(DEVICE)
    return norm.to(DEVICE)


@directions
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("sizes", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("how", ["lamina", "torch.nn", "transformers"])
def bench_frozen_batch_norm(benchmark, benchmark_op, how, sizes, layout, direction):
    """Each beside `nn.BatchNorm2d` in evaluation, which stands beside ours."""
    benchmark.group = f"FrozenBatchNorm2d {sizes} {layout} {direction}"
    benchmark_op(
        frozen(how, sizes[1]),
        [torch.randn(sizes).contiguous(memory_format=layout)],
        backward=direction == "forward+backward",
        reference=frozen("lamina" if how == "torch.nn" else "torch.nn", sizes[1]),
    )
