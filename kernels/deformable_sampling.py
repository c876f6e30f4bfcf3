"""Multi-scale deformable sampling (Zhu et al., 2021, eq. 3): a weighted sum of bilinear samples.

    out[b, q, h] = sum_l sum_p  weights[b, q, h, l, p] * bilinear(value_l[b, :, h], locations[b, q, h, l, p])

over the levels l of a feature pyramid and the sampling points p of each. A sample beyond the outer cells'
centres fades into zeros.

On a GPU a Triton kernel samples all levels at once and keeps nothing but its inputs. On a CPU the samples are
rows of a table, so that the forward is one `embedding_bag`, and the gradient of the values is another one,
whose bags are the cells.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from .backend import (
    Refusals,
    choose,
    forward_derivatives,
    functional_derivatives,
    operation,
    triton_refusal,
)

Shapes = Sequence[tuple[int, int]]


def _refusals(value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> Refusals:
    refusals: Refusals = {}
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if (reason := triton_refusal(value, locations, weights)) is not None:
        refusals["triton"] = reason
    elif strange := [t.dtype for t in (value, locations, weights) if t.dtype not in kinds]:
        refusals["triton"] = f"the kernel has no {strange[0]}"
    if forward_derivatives(value, locations, weights):
        refusals["torch"] = (
            "forward-mode derivatives are taken, which a registered operation would answer with zero"
        )
    elif functional_derivatives():
        refusals["torch"] = "torch.func takes a derivative, which it cannot of a registered operation"
    return refusals


@operation(_refusals)
def deformable_sampling(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Samples each level of `value` at a few points for each query and head, and adds the samples up.

    A location counts in the level that it samples: (0, 0) is the outer corner of its first cell and (1, 1)
    that of its last, so the centre of cell (row, column) is ((column + 0.5) / w, (row + 0.5) / h), as
    `grid_sample` has it with `align_corners=False`. Outside of the level there are zeros. An infinite
    location counts as outside, and NaN gives NaN.

    Values in half precision go with locations in float32: whatever the dtypes, positions and sums are at
    least float32, the output has the dtype of `value`, and each gradient that of its input. Keep the
    locations in float32: bfloat16 tells the cells of a level of 100 columns no longer apart.

    Time O(B Lq H S P D). Memory as much in the definition, and for each sampling point 4 integers and 4
    floats on a CPU. The kernel takes none beside its output, and in its backward pass the gradient of the
    values in float32. For that pass the CPU's path and the kernel keep their inputs alone.

    Every path is twice differentiable, the fast ones through the definition; a forward-mode derivative takes
    the definition. On a CPU all are deterministic. So are the kernel's output and its gradients of locations
    and weights; that of the values it adds up with atomics, in an order that changes from run to run. Under
    `torch.use_deterministic_algorithms(True)` it sorts the samples instead, for 16 bytes each and the sort's
    own memory, and every run gives the same to the last bit. Either way nothing waits for the device:
    forward and backward go into a CUDA graph.

    At the centre of a cell, where a bilinear sample has no derivative in its location, it is the one towards
    larger coordinates, as of `grid_sample`. Values that no sample is near are not read by the kernel; the
    definition reads the first cell of a level for what is outside of it.

    Args:
        value: (B, sum of h w, H, D), the levels one after the other, each row by row.
        spatial_shapes: (h, w) of each of the S levels, as plain integers.
        locations: (B, Lq, H, S, P, 2) as (x, y).
        weights: (B, Lq, H, S, P).

    Returns:
        (B, Lq, H, D).

    Raises:
        ValueError: a shape does not fit the others, `spatial_shapes` is a tensor or does not add up to the
            length of `value`, or one of the three is not a float.

    Reference:
        Zhu et al. Deformable DETR: Deformable Transformers for End-to-End Object Detection. ICLR 2021.
        Section 4.1.

    Example:
        >>> value, shapes = torch.randn(2, 5 * 7 + 3 * 4, 8, 32), [(5, 7), (3, 4)]
        >>> locations, weights = torch.rand(2, 11, 8, 2, 4, 2), torch.rand(2, 11, 8, 2, 4)
        >>> deformable_sampling(value, shapes, locations, weights).shape
        torch.Size([2, 11, 8, 32])
    """
    _check(value, spatial_shapes, locations, weights)
    path = choose("deformable_sampling", _refusals(value, spatial_shapes, locations, weights))
    if path == "reference":
        return deformable_sampling_reference(value, spatial_shapes, locations, weights)
    sizes = [size for shape in spatial_shapes for size in shape]
    if path == "triton":
        from .fused import deformable_sampling as fused

        sampled: Tensor = fused.deformable_sampling(value, sizes, locations, weights)
        return sampled
    from ._deformable_bags import sampled_by_bags

    out: Tensor = sampled_by_bags(value, sizes, locations, weights)
    return out


def deformable_sampling_reference(
    value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """The definition, in PyTorch: what every other path is tested against. Arguments as of the operation."""
    dtype = working_dtype(value, locations, weights)
    batch, queries, heads, _, points = weights.shape
    out = torch.zeros(batch, heads, queries, value.shape[-1], dtype=dtype, device=value.device)
    levels = value.to(dtype).transpose(1, 2).split([h * w for h, w in spatial_shapes], dim=2)
    for i, (level, shape) in enumerate(zip(levels, spatial_shapes, strict=True)):
        for cell, share in _corners(shape, locations[:, :, :, i].to(dtype)):
            index = cell.transpose(1, 2).reshape(batch, heads, queries * points, 1)
            rows = level.gather(2, index.expand(-1, -1, -1, level.shape[-1]))
            share = (share * weights[:, :, :, i]).transpose(1, 2).unsqueeze(-1)
            out = out + (share * rows.unflatten(2, (queries, points))).sum(3)
    return out.transpose(1, 2).to(value.dtype)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """What places are computed and samples summed in: float32, or float64 where an input is."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def sampling_weights(spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """What each cell has in each output of `deformable_sampling`, (B, Lq, H, sum of h w). Differentiable."""
    dtype = working_dtype(locations, weights)
    levels = []
    for i, shape in enumerate(spatial_shapes):
        level = torch.zeros(*weights.shape[:3], shape[0] * shape[1], dtype=dtype, device=locations.device)
        for cell, share in _corners(shape, locations[:, :, :, i].to(dtype)):
            level = level.scatter_add(-1, cell, share * weights[:, :, :, i])
        levels.append(level)
    return torch.cat(levels, -1)


def _corners(shape: tuple[int, int], locations: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The four cells around each location (..., 2) of a level, and the share of each in the sample there."""
    height, width = shape
    x, y = (
        # Two cells outside all shares are zero: clamped there, infinity does as well and no integer
        # overflows.
        (locations[..., axis] * size - 0.5).clamp(-2, size + 1)
        for axis, size in enumerate((width, height))
    )
    left, top = x.detach().floor(), y.detach().floor()
    across, down = x - left, y - top
    for lower, right in product((False, True), repeat=2):
        row, column = top + lower, left + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        share = (down if lower else 1 - down) * (across if right else 1 - across)
        # Multiplied, not filled in: where the location is NaN the share is too.
        yield (row * width + column).masked_fill(~inside, 0).long(), share * inside


def _check(value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    check_spatial_shapes(spatial_shapes)
    levels = len(spatial_shapes)
    fits = (value.ndim, locations.ndim, weights.ndim) == (4, 6, 5)
    if not fits or not (
        locations.shape[-1] == 2
        and locations.shape[:-1] == weights.shape
        and (weights.shape[0], weights.shape[2]) == (value.shape[0], value.shape[2])
        and weights.shape[3] == levels
    ):
        raise ValueError(
            "expected value (B, sum of h w, H, D), locations (B, Lq, H, S, P, 2) and weights "
            f"(B, Lq, H, S, P) with S = {levels} levels, got value {tuple(value.shape)}, "
            f"locations {tuple(locations.shape)} and weights {tuple(weights.shape)}"
        )
    check_length("value", value.shape[1], spatial_shapes)
    for name, tensor in ("value", value), ("locations", locations), ("weights", weights):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float, got {tensor.dtype}")


def check_spatial_shapes(spatial_shapes: Shapes) -> None:
    """Raises ValueError where `spatial_shapes` is not a sequence of pairs of plain positive integers."""
    found: object = spatial_shapes
    if isinstance(found, (tuple, list)) and found:
        sizes = [
            size for shape in found if isinstance(shape, (tuple, list)) and len(shape) == 2 for size in shape
        ]
        whole = all(isinstance(size, (int, torch.SymInt)) for size in sizes)
        if whole and len(sizes) == 2 * len(found) and all(size > 0 for size in sizes):
            return
    raise ValueError(
        "spatial_shapes must be (height, width) of each level as plain integers, at least 1, got "
        + (f"a tensor {tuple(found.shape)}: use .tolist()" if isinstance(found, Tensor) else repr(found))
    )


def check_length(name: str, length: int, spatial_shapes: Shapes) -> None:
    """Raises ValueError where the cells of all levels together are not `length`."""
    cells = sum(height * width for height, width in spatial_shapes)
    if length != cells:
        raise ValueError(
            f"{name} must hold the cells of all levels: {cells} for {list(spatial_shapes)}, got {length}"
        )
