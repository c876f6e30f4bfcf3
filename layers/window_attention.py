"""Attention within the windows of a grid, shifted or not (Liu et al., 2021; Jiang et al., 2021)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from ..kernels.checks import check_dropout
from ..kernels.dot_product_attention import attention_weights
from ..kernels.masking import combine_masks
from ._grid import find_grid, grid_key_mask
from ._heads import head_size, split_heads, start_projections
from ._windows import Windows, attend_windows
from .relative_position_bias import RelativePositionBias2d


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows that a grid of tokens is cut into, linear in the grid's size.

    .. math:: \\operatorname{head}_h = \\operatorname{softmax}\\left(
              \\frac{Q_h K_h^\\top}{\\sqrt D} + b_h + m \\right) V_h, \\quad
              m_{ij} = \\begin{cases} 0 & \\operatorname{win}(i) = \\operatorname{win}(j) \\\\
              -\\infty & \\text{else} \\end{cases}, \\quad
              \\operatorname{win}(i) = \\left( \\left\\lfloor \\frac{r_i - s}{w} \\right\\rfloor,
              \\left\\lfloor \\frac{c_i - s}{w} \\right\\rfloor \\right)

    for a token at row r and column c, windows of w cells a side, and the shift s; b is the bias of
    `RelativePositionBias2d`. With shift 0 it is TransGAN's grid self-attention, and Swin's block; Swin's next
    block shifts by half a window. An axis of the grid that fits into one window is one, and is not shifted.

    The shifted windows at opposite edges are computed as one, as in Swin (roll the grid, hide one half from
    the other), so that a shift costs no window more. A grid that windows do not divide is padded and the
    padding hidden, exactly. In the authors' code and in `transformers`' `SwinLayer` padding takes part, with
    the projections' biases for keys and values, and of a grid of unequal sides, one of which fits into a
    window, both axes take the smaller window. The two agree on every grid that the windows divide.

    Time O(N C² + N w² C). Memory O(N w² H) to train the bias, O(N C) without it or in evaluation, where a
    grid that is shifted or padded has its mask besides, O(N w² H) for all images together.

    Args:
        dim: C, size of a token and of the output.
        num_heads: H, which divides `dim`.
        window: cells a side of a window, or its rows and columns.
        shift: how far the windows are moved down and to the right, less than `window`; or by rows, columns.
        grid: rows and columns of the tokens' grid where `forward` is not told; a square if neither is.
        relative_bias: whether the scores have a relative position bias.
        bias: whether the projections of queries, keys and values have one.
        out_bias: whether the output's projection has one.
        dropout: probability with which an attention weight is dropped in training.

    Shape:
        - query: (B, rows · columns, dim), row by row
        - grid: (rows, columns)
        - key_mask: (B, rows · columns) of bool, True where a token takes part as a key
        - output: as query; where a window has no key, the bias of the output projection alone

    Raises:
        ValueError: `num_heads` does not divide `dim`, a shift is not from 0 to less than its window, the
            tokens do not fit the grid, or no grid is given and they are no square.

    Reference:
        Liu et al. Swin Transformer: Hierarchical Vision Transformer using Shifted Windows. ICCV 2021.
        Jiang, Chang, Wang. TransGAN: Two Pure Transformers Can Make One Strong GAN. NeurIPS 2021.

    Example:
        >>> attention = WindowAttention(32, num_heads=4, window=4, shift=2)
        >>> attention(torch.randn(2, 10 * 7, 32), grid=(10, 7)).shape
        torch.Size([2, 70, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window: int | tuple[int, int] = 7,
        shift: int | tuple[int, int] = 0,
        grid: tuple[int, int] | None = None,
        relative_bias: bool = True,
        bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_size(dim, num_heads)
        check_dropout(dropout)
        self.window, self.shift = _pair(window), _pair(shift)
        for side, by in zip(self.window, self.shift, strict=True):
            if not 0 <= by < side:
                raise ValueError(
                    f"window must be at least 1 and shift from 0 to window - 1, got window={window} and "
                    f"shift={shift}"
                )
        factory = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.dropout = dim, num_heads, dropout
        self.grid = None if grid is None else (grid[0], grid[1])
        self.query = nn.Linear(dim, dim, bias=bias, **factory)
        self.key = nn.Linear(dim, dim, bias=bias, **factory)
        self.value = nn.Linear(dim, dim, bias=bias, **factory)
        self.out = nn.Linear(dim, dim, bias=out_bias, **factory)
        self.relative_bias = (
            RelativePositionBias2d(num_heads, self.window, device=device, dtype=dtype)
            if relative_bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections with zero bias, as those of `MultiHeadAttention`."""
        start_projections(self.query, self.key, self.value, self.out)

    def forward(
        self, query: Tensor, *, grid: tuple[int, int] | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        rows, cols = find_grid(query, self.dim, grid, self.grid)
        key_mask = grid_key_mask(key_mask, query)
        windows = Windows((rows, cols), self.window, self.shift)
        tokens = windows.cut(query)
        q, k, v = (
            rearrange(project(tokens), "b w t (h d) -> b w h t d", h=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        bias = None if self.relative_bias is None else self.relative_bias(windows.size)
        key_mask = None if key_mask is None else windows.cut(key_mask.unsqueeze(-1)).squeeze(-1)
        dropout = self.dropout if self.training else 0.0
        heads = attend_windows(q, k, v, bias, windows.mask(query.device), key_mask, dropout)
        return windows.join(self.out(heads))

    def weights(
        self, query: Tensor, *, grid: tuple[int, int] | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """The attention weights of every token to every other, (B, H, N, N): zero outside of its window."""
        rows, cols = find_grid(query, self.dim, grid, self.grid)
        key_mask = grid_key_mask(key_mask, query)
        q, k = (split_heads(project(query), self.num_heads) for project in (self.query, self.key))
        cells = torch.arange(rows * cols, device=query.device)
        same, offset = torch.ones_like(cells, dtype=torch.bool)[:, None], torch.zeros_like(cells)[:, None]
        axes = zip(
            (cells // max(cols, 1), cells % max(cols, 1)), (rows, cols), self.window, self.shift, strict=True
        )
        for place, length, side, by in axes:
            window = (
                torch.zeros_like(place) if length <= side else (place - by).div(side, rounding_mode="floor")
            )
            same = same & (window[:, None] == window)
            apart = (place[:, None] - place).clamp(1 - side, side - 1)  # further is another window
            offset = offset * (2 * side - 1) + apart + side - 1
        bias = None if self.relative_bias is None else self.relative_bias.weight[offset].permute(2, 0, 1)
        taking_part = combine_masks(same, None if key_mask is None else key_mask[:, None, None, :])
        return attention_weights(q, k, mask=taking_part, bias=bias)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window={self.window}, shift={self.shift}, "
            f"grid={self.grid}, dropout={self.dropout}"
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
