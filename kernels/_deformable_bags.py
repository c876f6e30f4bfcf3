"""`deformable_sampling` as sums of bags: the cells are the rows of a table, and each output is a bag of rows.

`embedding_bag` is the one routine of PyTorch that gathers, weighs and sums rows without keeping what it
gathered. The gradient of the values is the same with the parts exchanged: the outputs are the table, and each
cell is the bag of those that sampled it, found by sorting. Levels of many samples are done one by one, which
keeps what is held small; levels of few together, as each operation then takes longer to start than to run.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._vmap import fold_into_batch
from .deformable_sampling import deformable_sampling_reference, working_dtype

ROWS = 2**19  # that are sampled at a time, 2 MB of indices, unless one level has more
GATHERED = 2**19  # numbers at a time, 2 MB of them


@torch.library.custom_op("lamina::deformable_sampling_bags", mutates_args=())
def sampled_by_bags(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """The rows of a table are the cells' values of one head, and each output is the sum of a bag of rows."""
    batch, _, heads, dim = value.shape
    dtype = working_dtype(value, locations, weights)
    out = torch.zeros(batch, weights.shape[1], heads, dim, dtype=dtype, device=value.device)
    if value.numel() and weights.numel():
        table = value.reshape(-1, dim).to(dtype)
        for levels in _together(sizes, weights):
            samples = _Samples(value, levels, locations[:, :, :, levels.which].to(dtype))
            shares = samples.shares(weights[:, :, :, levels.which].to(dtype))
            out += _bags(table, samples.rows.flatten(), samples.bag_starts(), shares.flatten()).view_as(out)
    return out.to(value.dtype)


@sampled_by_bags.register_fake
def _(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], weights.shape[1], *value.shape[2:])


@torch.library.custom_op("lamina::deformable_sampling_bags_backward", mutates_args=())
def _bags_backward(
    grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dim = value.shape[-1]
    dtype = working_dtype(value, locations, weights)
    grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights)
    of_levels = []
    if value.numel() and weights.numel():
        table, grad = value.reshape(-1, dim).to(dtype), grad.reshape(-1, dim).to(dtype)
        for levels in _together(sizes, weights):
            at = (slice(None),) * 3 + (levels.which,)
            samples = _Samples(value, levels, locations[at].to(dtype))
            weight = weights[at].to(dtype)
            of_levels.append(_transposed(samples, samples.shares(weight).flatten(), grad))
            by_x, by_y, by_weight = samples.derivatives(_products(table, samples, grad))
            grad_locations[at][..., 0] = by_x * weight
            grad_locations[at][..., 1] = by_y * weight
            grad_weights[at] = by_weight
    if not of_levels:
        return torch.zeros_like(value), grad_locations, grad_weights
    grad_value = of_levels[0] if len(of_levels) == 1 else torch.cat(of_levels, 1)
    return grad_value.to(value.dtype), grad_locations, grad_weights


@_bags_backward.register_fake
def _(
    grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), torch.empty_like(locations), torch.empty_like(weights)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = inputs = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the reference has
        needed = [ctx.needs_input_grad[n] for n in (0, 2, 3)]
        of_value, *others = gradients_of_definition(grad, needed, inputs, ctx.sizes)
    else:
        of_value, *others = _bags_backward(grad, value, ctx.sizes, locations, weights)
    return of_value, None, *others


sampled_by_bags.register_autograd(_backward, setup_context=_save_inputs)
fold_into_batch(sampled_by_bags, ["value", "locations", "weights"])


def gradients_of_definition(
    grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], sizes: Sequence[int]
) -> list[Tensor | None]:
    """Those of value, locations and weights that are needed, as the definition has them: with a graph."""
    value, locations, weights = inputs
    shapes = [(height, width) for _, height, width in _levels(sizes)]
    out = deformable_sampling_reference(value, shapes, locations, weights)
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


class _Levels(NamedTuple):
    """Levels that are done together."""

    which: slice
    starts: list[int]
    heights: list[int]
    widths: list[int]

    @property
    def cells(self) -> int:
        return sum(map(operator.mul, self.heights, self.widths))


class _Axis:
    """One coordinate of the samples: the first of the two cells beside each, and both shares.

    Args:
        positions: (..., levels, P).
        sizes: of each level.
    """

    def __init__(self, positions: Tensor, sizes: list[int]) -> None:
        def column(numbers: list[int]) -> Tensor:
            return _column(numbers, positions)

        self.size, none = column(sizes), column([0] * len(sizes))
        pixels = (positions * self.size).sub_(0.5).clamp_(none - 2, self.size + 1)  # as in the definition
        first = pixels.floor().nan_to_num_(0).clamp_(none, column([max(size - 2, 0) for size in sizes]))
        past = pixels.sub_(first)
        # Near an edge a sample is beyond one of its two cells, whose share then is zero. Where there is one
        # cell only, the second is put out of reach.
        self.distances = past, past + column([-1 if size > 1 else 4 for size in sizes])
        self.shares = [d.abs().neg_().add_(1).clamp_(min=0) for d in self.distances]
        self.first, self.steps = first, [int(size > 1) for size in sizes]

    def slopes(self) -> list[Tensor]:
        """The derivatives of both shares in the location, at a kink those to the right."""
        return [
            (d >= -1).to(d.dtype).add_(d >= 0, alpha=-2).add_(d >= 1).mul_(self.size) for d in self.distances
        ]


class _Samples:
    """The samples of some levels: `rows` of the table, by the lower and the right cell.

    Those are (B, Lq, H, levels, P, 2, 2), so that what goes to one output is one bag.
    """

    def __init__(self, value: Tensor, levels: _Levels, locations: Tensor) -> None:
        batch, length, heads, _ = value.shape
        _, starts, heights, widths = levels
        self.x, self.y = _Axis(locations[..., 0], widths), _Axis(locations[..., 1], heights)
        small = max(batch * length * heads, 2 * locations.numel()) < 2**31
        whole: dict[str, Any] = {"dtype": torch.int32 if small else torch.int64, "device": value.device}
        none = torch.empty(0, **whole)
        cell = (
            self.y.first.to(whole["dtype"]).mul_(_column(widths, none)).add_(self.x.first.to(whole["dtype"]))
        )
        row = cell.add_(_column(starts, none)).mul_(heads)
        row += torch.arange(batch, **whole).view(-1, 1, 1, 1, 1) * (length * heads)
        row += torch.arange(heads, **whole).view(-1, 1, 1)
        self.rows = torch.empty(*row.shape, 2, 2, **whole)
        for lower, right in product((0, 1), repeat=2):
            steps = [
                (lower * down * width + right * across) * heads
                for down, width, across in zip(self.y.steps, widths, self.x.steps, strict=True)
            ]
            torch.add(row, _column(steps, none), out=self.rows[..., lower, right])
        self.bag_size = 4 * row.shape[-1] * row.shape[-2]
        self.own_shape = batch, levels.cells, heads  # the levels' own part of the table
        # The rows before that part: of this batch's the levels before, of batches before all other levels.
        before = torch.arange(batch, **whole).mul_(length - levels.cells).add_(starts[0]).mul_(heads)
        self.before = before.view(-1, 1, 1, 1, 1, 1, 1)

    def bag_starts(self) -> Tensor:
        return torch.arange(
            0, self.rows.numel(), self.bag_size, dtype=self.rows.dtype, device=self.rows.device
        )

    def shares(self, weight: Tensor) -> Tensor:
        """What each of `rows` counts in its sample, times the sample's weight."""
        shares = torch.empty(self.rows.shape, dtype=weight.dtype, device=weight.device)
        for lower, right in product((0, 1), repeat=2):
            torch.mul(self.y.shares[lower] * weight, self.x.shares[right], out=shares[..., lower, right])
        return shares

    def derivatives(self, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the sum of `products`, each times its share: in x, in y, and in the weight where it is one."""
        (x0, x1), (y0, y1) = self.x.shares, self.y.shares
        (slope_x0, slope_x1), (slope_y0, slope_y1) = self.x.slopes(), self.y.slopes()
        (a, b), (c, d) = (upper_or_lower.unbind(-1) for upper_or_lower in products.unbind(-2))
        upper, lower = x0 * a + x1 * b, x0 * c + x1 * d
        by_x = y0 * (slope_x0 * a + slope_x1 * b) + y1 * (slope_x0 * c + slope_x1 * d)
        return by_x, slope_y0 * upper + slope_y1 * lower, y0 * upper + y1 * lower


def _bags(table: Tensor, rows: Tensor, starts: Tensor, shares: Tensor) -> Tensor:
    """For each bag the sum of its rows, each times its share."""
    return torch.embedding_bag(table, rows, starts, False, 0, False, shares)[0]


def _products(table: Tensor, samples: _Samples, grad: Tensor) -> Tensor:
    """The dot product of each row with the gradient of the output that it went to.

    Rows are gathered a few bags at a time. PyTorch's own routine for this makes a dot product a row, and is
    slower for bags of many rows.
    """
    rows, size, dim = samples.rows.flatten(), samples.bag_size, table.shape[1]
    count = max(1, min(len(grad), GATHERED // (size * dim)))
    gathered = table.new_empty(count * size, dim)
    products = table.new_empty(len(grad), 1, size)
    for bag in range(0, len(grad), count):
        of = grad[bag : bag + count].unsqueeze(1)
        found = gathered[: len(of) * size]
        torch.index_select(table, 0, rows[bag * size : (bag + len(of)) * size], out=found)
        torch.bmm(of, found.view(len(of), size, dim).transpose(1, 2), out=products[bag : bag + count])
    return products.view(samples.rows.shape)


def _transposed(samples: _Samples, shares: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the levels' cells, (B, cells, H, D): by row, each the sum of a bag of outputs."""
    rows, order = (samples.rows - samples.before).flatten().sort()
    counts = torch.bincount(rows, minlength=math.prod(samples.own_shape))
    starts = counts.cumsum(0).sub_(counts)
    shares = shares[order]
    outputs = order.div_(samples.bag_size, rounding_mode="floor")
    return _bags(grad, outputs, starts, shares).view(*samples.own_shape, -1)


def _levels(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First cell, height and width of each level."""
    start = 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        yield start, height, width
        start += height * width


def _together(sizes: Sequence[int], weights: Tensor) -> Iterator[_Levels]:
    """All levels, one or more at a time, up to `ROWS`."""
    starts, heights, widths = (list(numbers) for numbers in zip(*_levels(sizes), strict=True))
    per_level = max(4 * weights.numel() // max(len(starts), 1), 1)
    count = max(ROWS // per_level, 1)
    for first in range(0, len(starts), count):
        which = slice(first, min(first + count, len(starts)))
        yield _Levels(which, starts[which], heights[which], widths[which])


def _column(numbers: list[int], like: Tensor) -> Tensor:
    """(levels, 1), filled on the device, as a copy to it could not be captured in a CUDA graph."""
    column = like.new_empty(len(numbers), 1)
    for place, number in zip(column, numbers, strict=True):
        place.fill_(number)
    return column
