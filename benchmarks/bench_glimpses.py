"""Glimpses beside a loop that slices them image by image, as the well-known port does, and `grid_sample`."""

import pytest
import torch
import torch.nn.functional as F
from lamina.kernels import extract_glimpses, use_backend
from lamina.kernels.extract_glimpses import extract_glimpses_reference
from lamina.layers import GlimpseNetwork

# (B, C, H, W), size, scales: the paper's three tasks, and a photograph.
SIZES = {
    "mnist": ((128, 1, 28, 28), 8, 1),
    "translated": ((128, 1, 60, 60), 12, 3),
    "cluttered": ((128, 1, 100, 100), 12, 4),
    "photograph": ((8, 3, 224, 224), 16, 4),
}


def corners_of_pixels(shape):
    """Locations at which a slice is exact, so that all ways agree."""
    sides = torch.tensor([shape[3], shape[2]])
    return 2 * (torch.rand(shape[0], 2) * sides).round() / sides - 1


def by_slices(images, locations, size, scales):
    """The port's loop; it rounds down, which here would take a corner for the one before it."""
    glimpses = []
    for step in (2**scale for scale in range(scales)):
        wide = size * step
        padded = F.pad(images, (wide // 2,) * 4)
        sides = torch.tensor([images.shape[3], images.shape[2]], device=images.device)
        starts = (0.5 * (locations + 1) * sides).round().long().tolist()
        patches = [image[:, y : y + wide, x : x + wide] for image, (x, y) in zip(padded, starts, strict=True)]
        glimpses.append(F.avg_pool2d(torch.stack(patches), step))
    return torch.stack(glimpses, 1)


def by_grid_sample(images, locations, size, scales):
    glimpses = []
    for step in (2**scale for scale in range(scales)):
        wide = size * step
        samples = torch.arange(wide, device=images.device) - (wide - 1) / 2
        x = locations[:, :1] + samples * 2 / images.shape[3]
        y = locations[:, 1:] + samples * 2 / images.shape[2]
        grid = torch.stack([x[:, None].expand(-1, wide, -1), y[:, :, None].expand(-1, -1, wide)], -1)
        glimpses.append(F.avg_pool2d(F.grid_sample(images, grid, align_corners=False), step))
    return torch.stack(glimpses, 1)


def reference(images, locations, size, scales):
    return extract_glimpses_reference(images, locations.unsqueeze(1), size, scales).squeeze(1)


def on(backend: str):
    def extract(images, locations, size, scales):
        with use_backend(backend):
            return extract_glimpses(images, locations, size, scales)

    return extract


HOWS = {
    "lamina": extract_glimpses,
    "reference": reference,
    "grid_sample": by_grid_sample,
    "slices": by_slices,
}
if torch.cuda.is_available():
    HOWS |= {"triton": on("triton"), "products": on("torch"), "compiled": torch.compile(reference)}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", HOWS)
def bench_extract_glimpses(benchmark, benchmark_op, how, sizes, direction):
    shape, size, scales = sizes
    benchmark.group = f"extract_glimpses {shape} {size} x {scales} {direction}"
    locations = corners_of_pixels(shape).to("cuda" if torch.cuda.is_available() else "cpu")
    other = by_slices if how == "lamina" else extract_glimpses
    benchmark_op(
        lambda images: HOWS[how](images, locations, size, scales),
        [torch.randn(shape)],
        backward=direction == "forward+backward",
        reference=lambda images: other(images, locations, size, scales),
        bytes_moved=bytes_moved(shape, size, scales) * (2 if "backward" in direction else 1),
    )


def bytes_moved(shape, size: int, scales: int) -> int:
    """The glimpses written, and read of the image what the widest scale covers of it, in float32."""
    batch, channels, height, width = shape
    widest = size * 2 ** (scales - 1)
    return 4 * batch * channels * (min(height, widest) * min(width, widest) + scales * size**2)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_glimpse_network(benchmark, benchmark_op, direction):
    """A step of the paper's MNIST model: no library has the layer, so it stands alone."""
    benchmark.group = f"GlimpseNetwork {direction}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, locations = GlimpseNetwork(1, 8).to(device), (2 * torch.rand(128, 2) - 1).to(device)
    backward = direction == "forward+backward"
    benchmark_op(
        lambda images: network(images, locations),
        [torch.randn(128, 1, 28, 28)],
        backward=backward,
        parameters=list(network.parameters()) if backward else (),
    )
