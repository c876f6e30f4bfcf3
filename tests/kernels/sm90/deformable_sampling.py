"""Calls of the deformable kernels: the dtypes of values and of places, head size, levels, points, and a way.

"bfloat16-float32-32-4-4-backward"; and "sizes 0" … "sizes 2", pictures that one set of kernels is for.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from lamina.kernels.fused.deformable_sampling import deformable_sampling, deformable_sampling_backward

SHAPES = [(100, 134), (50, 67), (25, 34), (13, 17), (7, 9)]
WAYS = {
    "forward": None,
    "backward": [True, True, True],
    "values": [True, False, False],
    "places": [False, True, True],
    "deterministic": [True, True, True],
}
KINDS = [
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
]


def call(
    dtype: torch.dtype,
    place: torch.dtype,
    dim: int,
    shapes: Sequence[tuple[int, int]],
    points: int,
    *ways: str,
    queries: int = 300,
) -> None:
    batch, heads = 2, 8
    sizes = [size for shape in shapes for size in shape]
    value = torch.zeros(batch, sum(h * w for h, w in shapes), heads, dim, dtype=dtype)
    locations = torch.zeros(batch, queries, heads, len(shapes), points, 2, dtype=place)
    weights = torch.zeros(batch, queries, heads, len(shapes), points, dtype=place)
    for way in ways:
        needed = WAYS[way]
        if needed is None:
            deformable_sampling._init_fn(value, sizes, locations, weights)
            continue
        torch.use_deterministic_algorithms(way == "deterministic")
        grad = torch.zeros(batch, queries, heads, dim, dtype=dtype)
        deformable_sampling_backward._init_fn(grad, needed, value, sizes, locations, weights)


def named(*parts: object) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in parts)


CASES: dict[str, Callable[[], None]] = {
    named(*kinds, dim, levels, points, way): partial(call, *kinds, dim, SHAPES[:levels], points, way)
    for kinds, dim, levels, points, way in product(
        KINDS, (1, 7, 20, 32, 36, 64, 128, 160, 256), (1, 4, 5), (1, 3, 4, 8, 16), WAYS
    )
}
PICTURES = [([(16, 32)], 300), ([(1, 33)], 16), ([(7, 16)], 1)]
three_ways = partial(call, torch.float32, torch.float32, 32)
CASES |= {
    f"sizes {n}": partial(three_ways, shapes, 4, "forward", "backward", "deterministic", queries=queries)
    for n, (shapes, queries) in enumerate(PICTURES)
}
