"""Layers of spectral norm one beside torch's parametrization, in training: each call takes a step."""

import pytest
import torch
from lamina.layers import SpectralConv2d, SpectralLinear
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "linear-1024": (lambda c: c(1024, 1024), SpectralLinear, nn.Linear, (64, 1024)),
    "transgan-384": (lambda c: c(384, 384), SpectralLinear, nn.Linear, (16, 65, 384)),
    "conv-256": (lambda c: c(256, 256, 3, padding=1), SpectralConv2d, nn.Conv2d, (4, 256, 16, 16)),
    "conv-3": (lambda c: c(3, 64, 3, padding=1), SpectralConv2d, nn.Conv2d, (16, 3, 32, 32)),
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["lamina", "torch.nn"])
def bench_spectral_norm(benchmark, benchmark_op, how, case, direction):
    make, ours_class, theirs_class, sizes = CASES[case]
    benchmark.group = f"spectral norm {case} {direction}"
    ours, theirs = make(ours_class).to(DEVICE), spectral_norm(make(theirs_class)).to(DEVICE)
    # From the singular vectors themselves, which stand still: below the two take other numbers of steps.
    left, _, right = torch.linalg.svd(ours.weight.detach().flatten(1), full_matrices=False)
    ours.u.copy_(left[:, 0])
    ours.v.copy_(right[0])
    vectors = theirs.parametrizations.weight[0]
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)
    vectors._u.copy_(ours.u)
    vectors._v.copy_(ours.v)
    backward = direction == "forward+backward"
    timed, other = (ours, theirs) if how == "lamina" else (theirs, ours)
    benchmark_op(
        timed,
        [torch.randn(sizes)],
        backward=backward,
        parameters=list(timed.parameters()) if backward else (),
        reference=other,
        reference_parameters=list(other.parameters()) if backward else (),
    )
