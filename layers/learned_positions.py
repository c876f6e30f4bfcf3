"""Learned positions, of a sequence (Gehring et al., 2017) and of a grid (Dosovitskiy et al., 2021)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """Adds a learned vector for each place of a sequence.

    .. math:: y_m = x_m + P_m

    A shorter sequence takes the first rows. A longer one is an error, or with `interpolate` the table is
    drawn out to its length, linearly, its first and last rows kept. Every place then moves, so this suits
    sequences that are known whole, not step-by-step decoding.

    Args:
        max_length: rows of the table.
        dim: channels of the model.
        interpolate: whether a longer sequence is allowed.
        device: where the parameter is.
        dtype: of the parameter.

    Shape:
        - x: (B, L, dim)
        - positions: (L,), or as x without its channels; 0 … L - 1 by default
        - output: as x

    Raises:
        ValueError: x has not `dim` channels; `offset` is negative; offset + L exceeds `max_length`, and
            `interpolate` is off or `offset` is not zero.

    Reference:
        Gehring et al. Convolutional Sequence to Sequence Learning. ICML 2017. Section 3.1.
        Devlin et al. BERT. NAACL 2019, whose deviation of 0.02 it starts from.

    Example:
        >>> positions = LearnedPositions(512, 8)
        >>> positions(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        max_length: int,
        dim: int,
        *,
        interpolate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.interpolate = interpolate
        self.weight = nn.Parameter(torch.empty(max_length, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02), not truncated."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, *, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """Adds places offset … offset + L - 1; or those of `positions`, each a row of the table.

        Positions are for tokens that do not stand side by side: packed or left-padded rows.
        """
        if x.dim() < 2 or x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"x must be (B, L, {self.weight.shape[1]}), got {tuple(x.shape)}")
        if positions is None:
            return x + self.table(x.shape[-2], offset)
        check_positions(x, positions)
        return x + F.embedding(positions + offset, self.weight)

    def table(self, length: int, offset: int = 0) -> Tensor:
        """(length, dim): what `forward` adds."""
        max_length = len(self.weight)
        if offset < 0:
            raise ValueError(f"offset must be at least 0, got offset={offset}")
        if offset + length <= max_length:
            return self.weight[offset : offset + length]
        if not self.interpolate:
            raise ValueError(
                f"length must be at most max_length={max_length}, got length={length} at offset={offset}: "
                f"make the layer with max_length={offset + length} or more, or with interpolate=True"
            )
        if offset:
            raise ValueError(
                f"offset must be 0 beyond max_length={max_length}, got offset={offset}: "
                "interpolation needs the whole sequence, for all its places move with the length"
            )
        return _resized(self.weight, (length,), "bilinear")

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {self.weight.shape[1]}, interpolate={self.interpolate}"


class LearnedPositions2d(nn.Module):
    """Adds a learned vector for each cell of a grid; any other grid takes the table interpolated in 2-D.

    .. math:: y_{(r,c)} = x_{(r,c)} + P_{(r,c)}

    Tokens that stand before the cells, such as a class token, have rows of their own, `prefix`, which are
    never interpolated. A published table (1, prefix + cells, dim) loads as its first rows and the rest.

    "bilinear" puts the corners of the two grids onto each other, as the ViT authors' code does with
    `scipy.ndimage.zoom(order=1)`. "bicubic" puts the outer edges of the corner cells onto each other and
    smooths where it shrinks, as timm does.

    Args:
        grid: rows and columns of the table.
        dim: channels of the model.
        interpolation: how another grid is reached.
        num_prefix_tokens: tokens before the cells.
        device: where the parameters are.
        dtype: of the parameters.

    Shape:
        - x: (B, num_prefix_tokens + rows·cols, dim), cells row by row
        - grid: (rows, cols) of x; that of the table by default
        - output: as x

    Raises:
        ValueError: `interpolation` is unknown; x has not `dim` channels, or not as many tokens as its grid.

    Reference:
        Dosovitskiy et al. An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale.
        ICLR 2021. Sections 3.1 and 3.2.

    Example:
        >>> positions = LearnedPositions2d((14, 14), 8, num_prefix_tokens=1)
        >>> positions(torch.randn(2, 1 + 24 * 18, 8), grid=(24, 18)).shape
        torch.Size([2, 433, 8])
    """

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        *,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        num_prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {interpolation!r}")
        rows, cols = grid
        self.grid = (rows, cols)
        self.interpolation = interpolation
        self.weight = nn.Parameter(torch.empty(rows * cols, dim, device=device, dtype=dtype))
        self.prefix = (
            nn.Parameter(torch.empty(num_prefix_tokens, dim, device=device, dtype=dtype))
            if num_prefix_tokens
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02), not truncated, as in the authors' code."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        rows, cols = self.grid if grid is None else grid
        prefix = 0 if self.prefix is None else len(self.prefix)
        length, dim = prefix + rows * cols, self.weight.shape[1]
        if x.dim() < 2 or x.shape[-2:] != (length, dim):
            raise ValueError(
                f"x must be (B, {length}, {dim}) for {prefix} prefix tokens and grid={(rows, cols)}, "
                f"got {tuple(x.shape)}"
            )
        return x + self.table((rows, cols))

    def table(self, grid: tuple[int, int] | None = None) -> Tensor:
        """(num_prefix_tokens + rows·cols, dim): what `forward` adds."""
        cells = self._cells(self.grid if grid is None else (grid[0], grid[1]))
        return cells if self.prefix is None else torch.cat([self.prefix, cells])

    def _cells(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.weight
        return _resized(self.weight.unflatten(0, self.grid), grid, self.interpolation).flatten(0, 1)

    def extra_repr(self) -> str:
        return (
            f"{self.grid}, {self.weight.shape[1]}, interpolation={self.interpolation!r}, "
            f"num_prefix_tokens={0 if self.prefix is None else len(self.prefix)}"
        )


def check_positions(x: Tensor, positions: Tensor) -> None:
    """Raises ValueError where there is not a position for each token."""
    if positions.shape not in (x.shape[-2:-1], x.shape[:-1]):
        raise ValueError(
            f"positions must be ({x.shape[-2]},) or {tuple(x.shape[:-1])}, got {tuple(positions.shape)}"
        )


def _resized(table: Tensor, grid: tuple[int, ...], interpolation: str) -> Tensor:
    """`table`, (*old grid, dim), on another grid of as many dimensions, along one after the other.

    Products with small matrices, in float32 at least. The routine behind `F.interpolate` has no deterministic
    backward on a GPU, and that of its antialiased form does not compile for varying sizes.
    """
    resized = table.to(torch.promote_types(table.dtype, torch.float32))
    with torch.autocast("cpu" if table.is_meta else table.device.type, enabled=False):
        for axis, length in enumerate(grid):
            mix = _mix(resized.shape[axis], length, interpolation, resized)
            resized = torch.tensordot(mix, resized.movedim(axis, 0), 1).movedim(0, axis)
    return resized.to(table.dtype)


def _mix(old: int, new: int, interpolation: str, like: Tensor) -> Tensor:
    """(new, old): what each new cell takes of each old one."""
    cells = torch.arange(old, device=like.device, dtype=like.dtype)
    places = torch.arange(new, device=like.device, dtype=like.dtype).unsqueeze(1)
    if interpolation == "bilinear":
        return (1 - (cells - places * ((old - 1) / max(new - 1, 1))).abs()).clamp(min=0)
    shrink = old / new
    x = (cells - ((places + 0.5) * shrink - 0.5)).abs() / max(shrink, 1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2  # Keys's cubic, a = -1/2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)
