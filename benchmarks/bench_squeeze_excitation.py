"""Squeeze and excitation beside the layer of RegNet in transformers, which has 1x1 convolutions."""

import pytest
import torch
from lamina.layers import SqueezeExcitation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "senet-cifar": (64, 64, 32, 32),
    "senet-56": (4, 256, 56, 56),
    "senet-7": (2, 2048, 7, 7),
    "senet-cifar-last": (64, 512, 4, 4),
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "transformers"])
def bench_squeeze_excitation(benchmark, benchmark_op, how, sizes, direction):
    regnet = pytest.importorskip("transformers.models.regnet.modeling_regnet")
    benchmark.group = f"SqueezeExcitation {sizes} {direction}"
    ours = SqueezeExcitation(sizes[1]).to(DEVICE)
    theirs = regnet.RegNetSELayer(sizes[1], sizes[1] // 16).to(DEVICE)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
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
