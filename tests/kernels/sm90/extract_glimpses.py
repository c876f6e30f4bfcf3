"""Calls of the glimpses' kernels, by the dtypes of images and locations: "bfloat16-float32"."""

from functools import partial

import torch
from lamina.kernels.fused.extract_glimpses import extract_glimpses, extract_glimpses_backward

SHAPES = {"photograph": ((8, 3, 224, 224), 5, 16, 4), "digits": ((128, 1, 28, 28), 1, 8, 1)}


def call(images: torch.dtype, locations: torch.dtype, shape, count: int, size: int, scales: int) -> None:
    places = torch.zeros(shape[0], count, 2, dtype=locations)
    out = extract_glimpses._init_fn(torch.empty(shape, dtype=images), places, size, scales)
    extract_glimpses_backward._init_fn(out, places, shape)


DTYPES = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
CASES = {
    f"{images}-{name}": partial(call, getattr(torch, images), getattr(torch, locations), *sizes)
    for images, locations in DTYPES.items()
    for name, sizes in SHAPES.items()
}
