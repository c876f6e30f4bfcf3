"""Axial attention beside its definition, line after line, and beside full attention with the same lines.

No package of it installs here. Full attention computes the same by a mask over the whole grid.
"""

import pytest
import torch
from lamina.layers import AxialAttention, MultiHeadAttention
from torch import Tensor

SIZES = {"grid-16": (8, 16, 16, 256, 8), "grid-32": (2, 32, 32, 256, 8), "grid-24x40": (2, 24, 40, 128, 4)}


def line_by_line(layer: AxialAttention, rows: int, cols: int):
    """The straightforward loop."""

    def call(x: Tensor) -> Tensor:
        image = x.unflatten(1, (rows, cols))
        height, width = layer.axes["height"], layer.axes["width"]
        columns = torch.stack([height(image[:, :, c]) for c in range(cols)], 2)
        return (columns + torch.stack([width(image[:, r]) for r in range(rows)], 1)).flatten(1, 2)

    return call


def over_the_grid(layer: AxialAttention, rows: int, cols: int):
    """Full attention, in which a mask hides what is not on the line."""
    cells = torch.arange(rows * cols, device=next(layer.parameters()).device)
    masks = {
        "height": cells % cols == (cells % cols)[:, None],
        "width": cells // cols == (cells // cols)[:, None],
    }

    def call(x: Tensor) -> Tensor:
        return sum(attention(x, mask=masks[axis]) for axis, attention in layer.axes.items())

    return call


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina-beside-loop", "lamina-beside-full", "loop", "full"])
def bench_axial_attention(benchmark, benchmark_op, how, sizes, direction):
    batch, rows, cols, dim, heads = sizes
    benchmark.group = f"AxialAttention {sizes} {direction}"
    layer = AxialAttention(dim, heads, grid=(rows, cols)).to("cuda" if torch.cuda.is_available() else "cpu")
    peer = (line_by_line if how.endswith("loop") else over_the_grid)(layer, rows, cols)
    timed, other = (layer, peer) if how.startswith("lamina") else (peer, layer)
    backward = direction == "forward+backward"
    parameters = list(layer.parameters()) if backward else ()
    benchmark_op(
        timed,
        [torch.randn(batch, rows * cols, dim)],
        backward=backward,
        parameters=parameters,
        reference=other,
        reference_parameters=parameters,
        flops=(6 if backward else 2) * batch * rows * cols * (8 * dim**2 + 2 * (rows + cols) * dim),
    )


@pytest.mark.parametrize("how", ["lamina", "full"])
def bench_against_one_full_attention(benchmark, benchmark_op, how):
    """What the axes save: both axes of 48 x 48 cells, and one attention of each cell to each other."""
    benchmark.group = "AxialAttention or MultiHeadAttention, 48 x 48"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = AxialAttention(128, 4) if how == "lamina" else MultiHeadAttention(128, 4)
    benchmark_op(made.to(device), [torch.randn(1, 48 * 48, 128)], backward=False)
