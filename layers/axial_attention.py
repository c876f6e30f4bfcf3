"""Axial attention: along the rows and columns of a grid (Ho et al., 2019)."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ._grid import find_grid, grid_key_mask
from .multi_head_attention import MultiHeadAttention

# From a grid to its lines, folded into the batch, and back.
_LINES = {
    "height": ("b (h w) c -> (b w) h c", "(b w) h c -> b (h w) c"),
    "width": ("b (h w) c -> (b h) w c", "(b h) w c -> b (h w) c"),
}


class AxialAttention(nn.Module):
    """Multi-head self-attention along each axis of a grid in turn, the outputs summed.

    .. math:: y_{rc} = \\operatorname{MHA}_{\\text{height}}(x_{:c})_r
              + \\operatorname{MHA}_{\\text{width}}(x_{r:})_c

    Each axis has a `MultiHeadAttention` of its own, over lines of the grid. Two layers see the whole grid.
    With one axis it is the layer of Ho et al., who alternate the two in a stack; the sum of both in one layer
    is how the package `axial-attention` reads it. They shift and mask rows for their image model, which is
    left to the model here.

    `is_causal` has every token see its line up to itself: nothing that comes later row by row. What stands
    above and to the right is earlier too, yet stays out of reach, however many layers there are.

    Time O(N C² + N (rows + columns) C), memory that of `dot_product_attention` over lines: O(N) where
    PyTorch's fused attention runs, and O(N (rows + columns) H) where the definition does.

    Args:
        dim: C, size of a token and of the output.
        num_heads: H of each axis.
        axes: "height" (along a column), "width" (along a row), or both.
        grid: rows and columns of the tokens' grid where `forward` is not told; a square if neither is.
        bias: whether the projections have one.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns queries and keys by their place in the line, e.g. `RotaryPositions(dim // num_heads)`.

    Shape:
        - query: (B, rows · columns, dim), row by row
        - grid: (rows, columns)
        - key_mask: (B, rows · columns) of bool, True where a token takes part as a key
        - output: as query; an axis on which a token has no key adds the bias of its output projection alone

    Raises:
        ValueError: `axes` are not of "height" and "width", `num_heads` does not divide `dim`, the tokens do
            not fit the grid, or no grid is given and they are no square.

    Reference:
        Ho, Kalchbrenner, Weissenborn, Salimans. Axial Attention in Multidimensional Transformers.
        arXiv:1912.12180, 2019. Section 3.

    Example:
        >>> attention = AxialAttention(32, num_heads=4)
        >>> attention(torch.randn(2, 3 * 5, 32), grid=(3, 5)).shape
        torch.Size([2, 15, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        axes: Sequence[str] = ("height", "width"),
        grid: tuple[int, int] | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        rotary: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(axes, str) or not axes or len({*axes} & {*_LINES}) != len(axes):
            raise ValueError(f"axes must be some of {tuple(_LINES)}, each once, got {axes!r}")
        self.dim, self.num_heads = dim, num_heads
        self.grid = None if grid is None else (grid[0], grid[1])
        self.axes = nn.ModuleDict(
            {
                axis: _LineAttention(
                    dim, num_heads, bias=bias, dropout=dropout, rotary=rotary, device=device, dtype=dtype
                )
                for axis in axes
            }
        )

    def forward(
        self,
        query: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        rows, cols = find_grid(query, self.dim, grid, self.grid)
        key_mask = grid_key_mask(key_mask, query)
        outputs = []
        for axis, attention in self.axes.items():
            lines, keys = _lines(query, key_mask, axis, rows, cols)
            along = attention(lines, key_mask=keys, is_causal=is_causal)
            outputs.append(rearrange(along, _LINES[axis][1], b=len(query), h=rows, w=cols))
        return outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]

    def weights(
        self,
        query: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The attention weights of every token to every other, (B, H · axes, N, N), the first axis first."""
        rows, cols = find_grid(query, self.dim, grid, self.grid)
        key_mask = grid_key_mask(key_mask, query)
        dense = []
        for axis, attention in self.axes.items():
            lines, keys = _lines(query, key_mask, axis, rows, cols)
            along = MultiHeadAttention.weights(attention, lines, key_mask=keys, is_causal=is_causal)  # type: ignore[arg-type]
            # A token's weight stands on its own line: the diagonal of the lines of query and key.
            if axis == "height":
                along = rearrange(along, "(b w) n q k -> b n q k w", b=len(query), w=cols)
                dense.append(rearrange(along.diag_embed(), "b n q k w v -> b n (q w) (k v)"))
            else:
                along = rearrange(along, "(b h) n q k -> b n q k h", b=len(query), h=rows)
                dense.append(rearrange(along.diag_embed(), "b n q k h g -> b n (h q) (g k)"))
        return torch.cat(dense, 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, grid={self.grid}"


class _LineAttention(MultiHeadAttention):
    """One axis's attention, without `weights`: those to look at are the whole layer's, over the grid."""

    weights = None  # type: ignore[assignment]


def _lines(
    query: Tensor, key_mask: Tensor | None, axis: str, rows: int, cols: int
) -> tuple[Tensor, Tensor | None]:
    """The lines along `axis`, (B · lines, places, C), and their key mask, (B · lines, places)."""
    to_lines, sizes = _LINES[axis][0], {"b": len(query), "h": rows, "w": cols}
    lines = rearrange(query, to_lines, **sizes)
    if key_mask is None:
        return lines, None
    return lines, rearrange(key_mask.unsqueeze(-1), to_lines, **sizes).squeeze(-1)
