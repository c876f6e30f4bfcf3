"""`deformable_sampling` as sums of bags: the cells are the rows of a table, and each output is a bag of rows.

`embedding_bag` is the one routine of PyTorch that gathers, weighs and sums rows without keeping what it
gathered. The gradient of the values is the same with the parts exchanged: the outputs are the table, and each
cell is the bag of those that sampled it, found by sorting. All is done level by level, which keeps what is
held small.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ._vmap import fold_into_batch
from .deformable_sampling import deformable_sampling_reference, working_dtype


@torch.library.custom_op("lamina::deformable_sampling_bags", mutates_args=())
def sampled_by_bags(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """The rows of a table are the cells' values of one head, and each output is the sum of a bag of rows."""
    batch, _, heads, dim = value.shape
    dtype = working_dtype(value, locations, weights)
    out = torch.zeros(batch, weights.shape[1], heads, dim, dtype=dtype, device=value.device)
    if value.numel() and weights.numel():
        table = value.reshape(-1, dim).to(dtype)
        for i, level in enumerate(_levels(sizes)):
            samples = _Samples(value, level, locations[:, :, :, i].to(dtype))
            shares = samples.shares(weights[:, :, :, i].to(dtype))
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
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights)
    if value.numel() and weights.numel():
        table, grad = value.reshape(-1, dim).to(dtype), grad.reshape(-1, dim).to(dtype)
        for i, level in enumerate(_levels(sizes)):
            samples = _Samples(value, level, locations[:, :, :, i].to(dtype))
            weight = weights[:, :, :, i].to(dtype)
            _write_transposed(grad_value.view(-1, dim), samples, samples.shares(weight).flatten(), grad)
            by_x, by_y, by_weight = samples.derivatives(_products(table, samples, grad))
            grad_locations[:, :, :, i, :, 0] = by_x * weight
            grad_locations[:, :, :, i, :, 1] = by_y * weight
            grad_weights[:, :, :, i] = by_weight
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


class _Axis:
    """One coordinate of the samples of a level: the first of the two cells beside each, and both shares."""

    def __init__(self, positions: Tensor, size: int) -> None:
        pixels = (positions * size).sub_(0.5).clamp_(-2, size + 1)  # as in the definition
        first = pixels.floor().nan_to_num_(0).clamp_(0, max(size - 2, 0))
        past = pixels.sub_(first)
        # Near an edge a sample is beyond one of its two cells, whose share then is zero. Where there is one
        # cell only, the second is put out of reach.
        self.distances = past, (past - 1 if size > 1 else past + 4)
        self.shares = [d.abs().neg_().add_(1).clamp_(min=0) for d in self.distances]
        self.first, self.size, self.step = first, size, int(size > 1)

    def slopes(self) -> list[Tensor]:
        """The derivatives of both shares in the location, at a kink those to the right."""
        return [
            (d >= -1).to(d.dtype).add_(d >= 0, alpha=-2).add_(d >= 1).mul_(self.size) for d in self.distances
        ]


class _Samples:
    """The samples of one level: `rows` (B, Lq, H, P, 2, 2) of the table, by the lower and the right cell."""

    def __init__(self, value: Tensor, level: tuple[int, int, int], locations: Tensor) -> None:
        batch, length, heads, _ = value.shape
        start, height, width = level
        self.x, self.y = _Axis(locations[..., 0], width), _Axis(locations[..., 1], height)
        small = max(batch * length * heads, 2 * locations.numel()) < 2**31
        whole: dict[str, Any] = {"dtype": torch.int32 if small else torch.int64, "device": value.device}
        cell = self.y.first.to(whole["dtype"]).mul_(width).add_(self.x.first.to(whole["dtype"]))
        row = cell.add_(start).mul_(heads)
        row += torch.arange(batch, **whole).view(-1, 1, 1, 1) * (length * heads)
        row += torch.arange(heads, **whole).view(-1, 1)
        self.rows = torch.empty(*row.shape, 2, 2, **whole)
        for lower, right in product((0, 1), repeat=2):
            step = lower * self.y.step * width + right * self.x.step
            torch.add(row, step * heads, out=self.rows[..., lower, right])
        self.bag_size = 4 * row.shape[-1]

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
    """The dot product of each row with the gradient of the output that it went to."""
    rows = samples.rows.flatten()
    output = torch.arange(len(grad), dtype=rows.dtype, device=rows.device).repeat_interleave(samples.bag_size)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, rows, samples.bag_starts(), output, 0
    )
    return products.view(samples.rows.shape)


def _write_transposed(grad_table: Tensor, samples: _Samples, shares: Tensor, grad: Tensor) -> None:
    """Writes each row of one level its part of the gradient: ordered by row, the sum of a bag of outputs."""
    rows, order = samples.rows.flatten().sort()
    is_first = torch.ones_like(rows, dtype=torch.bool)
    torch.ne(rows[1:], rows[:-1], out=is_first[1:])
    starts = is_first.nonzero().squeeze(1)
    shares = shares[order]
    grad_table[rows[starts]] = _bags(
        grad, order.div_(samples.bag_size, rounding_mode="floor"), starts, shares
    )


def _levels(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First cell, height and width of each level."""
    start = 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        yield start, height, width
        start += height * width
