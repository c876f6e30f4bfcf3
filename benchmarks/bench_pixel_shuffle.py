"""Pixel shuffle of tokens beside TransGAN's way: transpose, `nn.PixelShuffle` on the image, and back."""

import pytest
import torch
from lamina.layers import PixelShuffleUpsample
from torch import nn

SIZES = {
    "stage-1": (16, 8, 1024, 2),
    "stage-2": (16, 16, 256, 2),
    "256-px": (4, 64, 256, 2),
    "4x": (8, 14, 192, 4),
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "torch.nn"])
def bench_pixel_shuffle(benchmark, benchmark_op, how, sizes, direction):
    batch, side, channels, factor = sizes
    benchmark.group = f"PixelShuffleUpsample {sizes} {direction}"
    ours, shuffle = PixelShuffleUpsample(factor), nn.PixelShuffle(factor)

    def peer(x):
        return shuffle(x.permute(0, 2, 1).view(batch, channels, side, side)).flatten(2).permute(0, 2, 1)

    x = torch.randn(batch, side**2, channels)
    timed, other = (ours, peer) if how == "lamina" else (peer, ours)
    benchmark_op(
        timed,
        [x],
        backward=direction == "forward+backward",
        reference=other,
        bytes_moved=(2 if direction == "forward" else 4) * x.nbytes,
    )
