"""Axial positions, added to tokens, beside `axial_positional_embedding` and `transformers`' Reformer."""

import pytest
import torch
from lamina.layers import AxialPositions
from torch import Tensor

# Batch, sides of the grid, length, channels by axis: the Reformer's configurations, with fewer places.
SIZES = {
    "enwik8-8k": (2, (64, 128), 8192, (256, 512)),
    "enwik8-part": (2, (64, 128), 5000, (256, 512)),
    "imagenet-12k": (1, (64, 64, 3), 12288, (384, 384, 256)),
    "text-1k": (16, (32, 32), 1024, (64, 192)),
}


def peer(ours: AxialPositions, package: str, length: int):
    """Called with the tokens, and its parameters."""
    if package == "axial_positional_embedding":
        module = pytest.importorskip("axial_positional_embedding").AxialPositionalEmbedding
        theirs = module(ours.dim, ours.shape, ours.dims)
    else:
        if ours.dims is None or len(ours.shape) != 2:
            pytest.skip("the Reformer of transformers concatenates two axes")
        reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
        config = reformer.ReformerConfig(
            axial_pos_shape=ours.shape, axial_pos_embds_dim=ours.dims, hidden_size=ours.dim
        )
        theirs = reformer.AxialPositionEmbeddings(config).eval()
    with torch.no_grad():
        for weight, mine in zip(theirs.weights, ours.weights, strict=True):
            weight.copy_(mine.view_as(weight))
    theirs = theirs.to(next(ours.parameters()).device)
    if package == "transformers":

        def call(x: Tensor) -> Tensor:
            return x + theirs(torch.arange(length, device=x.device).expand(len(x), -1))

        return call, list(theirs.parameters())
    return lambda x: x + theirs(x), list(theirs.parameters())


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("summed", [False, True], ids=["concatenated", "summed"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("package", ["axial_positional_embedding", "transformers"])
@pytest.mark.parametrize("how", ["lamina", "peer"])
def bench_axial_positions(benchmark, benchmark_op, how, package, sizes, summed, direction):
    batch, shape, length, dims = sizes
    benchmark.group = f"AxialPositions {sizes} {'summed' if summed else 'concatenated'} {direction}"
    ours = AxialPositions(shape, sum(dims), dims=None if summed else dims)
    ours = ours.to("cuda" if torch.cuda.is_available() else "cpu")
    theirs, parameters = peer(ours, package, length)
    pairs = [(ours, list(ours.parameters())), (theirs, parameters)]
    (timed, of), (other, of_other) = pairs if how == "lamina" else pairs[::-1]
    backward = direction == "forward+backward"
    benchmark_op(
        timed,
        [torch.randn(batch, length, sum(dims))],
        backward=backward,
        parameters=of if backward else (),
        reference=other,
        reference_parameters=of_other if backward else (),
        bytes_moved=4 * (2 + backward) * batch * length * sum(dims),
    )
