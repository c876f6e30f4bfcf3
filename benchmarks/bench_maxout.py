"""Maxout beside the usual linear layer, view and maximum with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from lamina.layers import Maxout
from torch import Tensor

# Batch, inputs, outputs, pieces: Bahdanau's output layer for a step and for sentences, Goodfellow's on MNIST.
SIZES = {
    "step-80": (80, 1000, 500, 2),
    "sentences-2400": (2400, 256, 500, 2),
    "mnist-100": (100, 784, 240, 5),
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["view and max", "lamina"])
def bench_maxout(benchmark, benchmark_op, how, sizes, direction):
    batch, inputs, outputs, pieces = sizes
    benchmark.group = f"Maxout {sizes} {direction}"
    layer = Maxout(inputs, outputs, pieces=pieces).to("cuda" if torch.cuda.is_available() else "cpu")

    def usual(x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias).view(batch, outputs, pieces).max(-1).values

    backward = direction == "forward+backward"
    parameters = list(layer.parameters()) if backward else ()
    benchmark_op(
        layer if how == "lamina" else usual,
        [torch.randn(batch, inputs)],
        backward=backward,
        parameters=parameters,
        reference=usual if how == "lamina" else layer,
        reference_parameters=parameters,
        flops=(6 if backward else 2) * batch * inputs * outputs * pieces,
    )
