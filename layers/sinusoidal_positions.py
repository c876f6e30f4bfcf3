"""Sinusoidal positions (Vaswani et al., 2017, section 3.5), of a sequence and of a grid."""

import torch
from torch import Tensor, nn

from .learned_positions import check_positions


class SinusoidalPositions(nn.Module):
    """Adds sines and cosines of the position, one wavelength for each two channels.

    .. math:: P_{m,2i} = \\sin(m \\beta^{-2i/C}), \\quad P_{m,2i+1} = \\cos(m \\beta^{-2i/C})

    Without `interleaved` all sines stand before all cosines: the same numbers in another order. (The authors'
    tensor2tensor, and fairseq after it, have that order and divide by C/2 - 1 in the exponent, where the
    paper divides by C/2.) An odd C has one sine more than cosines.

    There is no table to outgrow and no parameter: any length works, and each call computes what it needs, in
    float32 (float64 for float64), before the cast to x's precision. Cost: L·C sines, beside nothing.

    Args:
        dim: C, the channels of the model.
        base: β, the longest wavelength is about 2πβ positions.
        interleaved: sine and cosine by turns, as in the paper.
        device: taken so that all layers are made alike; there is nothing to place.
        dtype: as `device`.

    Shape:
        - x: (B, L, dim)
        - positions: (L,), or as x without its channels; 0 … L - 1 by default
        - output: as x

    Raises:
        ValueError: `dim` is less than one, or x has not `dim` channels.

    Reference:
        Vaswani et al. Attention Is All You Need. NeurIPS 2017. Section 3.5.

    Example:
        >>> positions = SinusoidalPositions(8)
        >>> positions(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> positions.table(2, offset=3).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got dim={dim}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved

    def forward(self, x: Tensor, *, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """Adds positions offset … offset + L - 1; or `positions`, where tokens do not stand side by side."""
        _check(x, self.dim)
        if positions is None:
            return x + self.table(x.shape[-2], offset, x.device, x.dtype)
        check_positions(x, positions)
        wide = torch.promote_types(x.dtype, torch.float32)
        return x + _waves((positions + offset).to(wide), self.dim, self.base, self.interleaved).to(x.dtype)

    def table(
        self,
        length: int,
        offset: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """(length, dim): what `forward` adds."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        wide = torch.promote_types(dtype, torch.float32)
        positions = torch.arange(length, device=device, dtype=wide) + offset
        return _waves(positions, self.dim, self.base, self.interleaved).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"


class SinusoidalPositions2d(nn.Module):
    """Adds sines and cosines of the row to the first half of the channels, and of the column to the second.

    .. math:: P_{(r,c)} = [\\, p(r) \\,;\\, p(c) \\,]

    with p as in `SinusoidalPositions` with C/2 channels. This is DETR's order; unlike DETR the coordinates
    are counted in cells from zero, not scaled to 2π. MAE has the column in the first half, and all sines
    before all cosines.

    Args:
        dim: channels of the model, even.
        base: β, the longest wavelength is about 2πβ cells.
        interleaved: sine and cosine by turns.
        device: taken so that all layers are made alike; there is nothing to place.
        dtype: as `device`.

    Shape:
        - x: (B, rows·cols, dim), row by row
        - grid: (rows, cols)
        - output: as x

    Raises:
        ValueError: `dim` is not even and positive; x has not `dim` channels, or not rows·cols tokens.

    Reference:
        Carion et al. End-to-End Object Detection with Transformers. ECCV 2020. Appendix A.4.

    Example:
        >>> positions = SinusoidalPositions2d(8)
        >>> positions(torch.randn(2, 15, 8), grid=(3, 5)).shape
        torch.Size([2, 15, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim must be even and positive, got dim={dim}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        _check(x, self.dim)
        rows, cols = grid
        if x.shape[-2] != rows * cols:
            raise ValueError(f"x must have one token a cell of grid={grid}, got {tuple(x.shape)}")
        return x + self.table(rows, cols, x.device, x.dtype)

    def table(
        self,
        rows: int,
        cols: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """(rows·cols, dim): what `forward` adds."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        wide = torch.promote_types(dtype, torch.float32)
        of_row, of_col = (
            _waves(
                torch.arange(length, device=device, dtype=wide), self.dim // 2, self.base, self.interleaved
            )
            for length in (rows, cols)
        )
        halves = of_row.unsqueeze(1).expand(-1, cols, -1), of_col.expand(rows, -1, -1)
        return torch.cat(halves, -1).flatten(0, 1).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"


def _waves(positions: Tensor, dim: int, base: float, interleaved: bool) -> Tensor:
    """(…, dim) in the dtype of `positions`, (…)."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=positions.dtype) / dim
    angles = positions.unsqueeze(-1) * base**-exponents
    waves = angles.sin(), angles.cos()
    table = torch.stack(waves, -1).flatten(-2) if interleaved else torch.cat(waves, -1)
    return table[..., :dim]  # an odd dim has one cosine fewer


def _check(x: Tensor, dim: int) -> None:
    if x.dim() < 2 or x.shape[-1] != dim:
        raise ValueError(f"x must be (B, L, {dim}), got {tuple(x.shape)}")
