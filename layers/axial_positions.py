"""Axial positions: a long sequence's places as the cells of a grid (Kitaev et al., 2020)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.checks import check_dropout


class AxialPositions(nn.Module):
    """Adds learned vectors of a place's coordinates in a grid: a table for each axis, not one for each place.

    .. math:: P_m = [\\, E^1_{i_1} ; E^2_{i_2} ; \\dots \\,] \\quad \\text{or} \\quad
              P_m = E^1_{i_1} + E^2_{i_2} + \\dots, \\qquad m = (i_1 s_2 + i_2) s_3 + \\dots

    for place m of a sequence of up to s_1 · s_2 · …, row by row. With `dims` the axes' vectors are
    concatenated, as in the Reformer: s_1 d_1 + s_2 d_2 + … parameters, 425,984 in place of 67 million for its
    65,536 places. Without, each has all channels and they are summed.

    `dropout` drops a vector of a table whole, wherever its coordinate occurs, anew for each sequence. (The
    authors' Trax draws one mask for the concatenated vector, shared along the axes that it is told;
    `transformers` drops that vector by the second coordinate.) A sequence shorter than the grid is taken in
    training too, which both refuse. Nothing is looked up: the tables are broadcast over the rows of the grid
    that the sequence reaches. Time O(B L C), and L·C numbers of memory beside the output.

    Args:
        shape: s_1, s_2, …, the sides of the grid; their product is the longest sequence.
        dim: C, the channels of the model.
        dims: d_1, d_2, …, which sum to `dim`; None to sum the axes' vectors.
        dropout: probability with which a table's vector is dropped in training.
        device: where the parameters are.
        dtype: of the parameters.

    Shape:
        - x: (B, L, dim), L at most s_1 · s_2 · …
        - output: as x

    Raises:
        ValueError: `shape` is empty or has an empty side, `dims` do not fit it or `dim`, `dropout` is not in
            [0, 1), or x has not `dim` channels or too many places.

    Reference:
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020, and its code in Trax.
        Ho, Kalchbrenner, Weissenborn, Salimans. Axial Attention in Multidimensional Transformers. 2019.

    Example:
        >>> positions = AxialPositions((128, 512), 32, dims=(8, 24))
        >>> positions(torch.randn(2, 1000, 32)).shape
        torch.Size([2, 1000, 32])
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        *,
        dims: Sequence[int] | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"shape must be sides of a grid, each at least 1, got {tuple(shape)}")
        if dims is not None and (len(dims) != len(shape) or min(dims) < 1 or sum(dims) != dim):
            raise ValueError(
                f"dims must be {len(shape)} numbers of channels that sum to dim={dim}, got {tuple(dims)}"
            )
        check_dropout(dropout)
        self.shape, self.dim = tuple(shape), dim
        self.dims = None if dims is None else tuple(dims)
        self.dropout = dropout
        self.weights = nn.ParameterList(
            torch.empty(side, channels, device=device, dtype=dtype)
            for side, channels in zip(self.shape, self.dims or (dim,) * len(self.shape), strict=True)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1), as in the authors' code, whose token embeddings start so too."""
        for weight in self.weights:
            nn.init.normal_(weight)

    @property
    def max_length(self) -> int:
        return math.prod(self.shape)

    def forward(self, x: Tensor, *, offset: int = 0) -> Tensor:
        """Adds the vectors of places offset … offset + L - 1."""
        if offset < 0:
            raise ValueError(f"offset must be at least 0, got offset={offset}")
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, L, {self.dim}), got {tuple(x.shape)}")
        if self.training and self.dropout:
            kept = [
                torch.rand(len(x), len(weight), 1, device=x.device) >= self.dropout for weight in self.weights
            ]
            scale = 1 / (1 - self.dropout)
            tables = [torch.where(k, w * scale, 0.0) for k, w in zip(kept, self.weights, strict=True)]
            return x + self._spread(tables, offset + x.shape[1])[..., offset:, :]
        # A batch of one gets the gradient as it is, where a table without a batch would sum a copy.
        return x + self.table(offset + x.shape[1])[offset:].unsqueeze(0)

    def table(self, length: int | None = None) -> Tensor:
        """(length, dim): what `forward` adds in evaluation; all places where no length is given."""
        return self._spread(list(self.weights), self.max_length if length is None else length)

    def _spread(self, tables: list[Tensor], length: int) -> Tensor:
        """The first places' vectors, (..., length, dim), from each axis's (..., side, channels)."""
        if length > self.max_length:
            raise ValueError(
                f"x must have at most {self.max_length} places, the product of shape={self.shape}, "
                f"got {length}"
            )
        row = self.max_length // self.shape[0]  # places that share the first coordinate
        reached = -(-length // row)
        shape = (reached, *self.shape[1:])
        spread = []
        for axis, table in enumerate(tables):
            table = table[..., :reached, :] if axis == 0 else table
            others = [1] * len(shape)
            others[axis] = table.shape[-2]
            spread.append(table.unflatten(-2, others).expand(*table.shape[:-2], *shape, table.shape[-1]))
        grid = sum(spread[1:], spread[0]) if self.dims is None else torch.cat(spread, -1)
        first = grid.ndim - 1 - len(shape)
        places = grid.flatten(first, -2)
        return places if length == reached * row else places[..., :length, :]

    def extra_repr(self) -> str:
        return f"{self.shape}, {self.dim}, dims={self.dims}, dropout={self.dropout}"
