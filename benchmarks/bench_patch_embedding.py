"""Patch embedding as a reshape and a product, beside the convolution that it equals.

Forward; with the weight's gradient (the first layer of a model); with the image's gradient as well (behind
other layers, or for saliency and adversarial examples).
"""

import pytest
import torch
import torch.nn.functional as F
from lamina.layers import PatchEmbedding

# Batch, channels, side, patch, dim.
SIZES = {"vit-b16-224": (16, 3, 224, 16, 768), "digits-8": (64, 1, 8, 2, 64)}
DIRECTIONS = ["forward", "forward+dW", "forward+dW+dx"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["conv2d", "lamina", "compiled lamina"])
def bench_patch_embedding(benchmark, benchmark_op, how, sizes, direction):
    benchmark.group = f"PatchEmbedding {sizes} {direction}"
    batch, channels, side, patch, dim = sizes
    embed = PatchEmbedding(dim, patch, in_channels=channels)
    embed.to("cuda" if torch.cuda.is_available() else "cpu")
    image = torch.randn(batch, channels, side, side)
    rows, cols = embed.grid(side, side)

    def convolution(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, embed.weight, embed.bias, embed.stride).flatten(2).mT

    # Without its gradient the image is no input, but a constant.
    operation = embed if how.endswith("lamina") else convolution
    operation = torch.compile(operation) if how.startswith("compiled") else operation
    parameters = [] if direction == "forward" else [embed.weight, embed.bias]
    constant = image.to(embed.weight.device)
    takes_image = direction != "forward+dW"
    benchmark_op(
        operation if takes_image else lambda: operation(constant),
        [image] if takes_image else [],
        backward=direction != "forward",
        parameters=parameters,
        reference=convolution if takes_image else lambda: convolution(constant),
        reference_parameters=parameters,
        flops=2 * (1 + DIRECTIONS.index(direction)) * embed.weight.numel() * batch * rows * cols,
    )
