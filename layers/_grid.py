"""What the attentions over grids share: how a grid's size is found, and whether masks fit it."""

import math

from torch import Tensor

from ..kernels.checks import check_key_mask


def find_grid(
    query: Tensor, dim: int, given: tuple[int, int] | None, own: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns of the grid that the tokens are: those given, the layer's own, or a square."""
    if query.ndim != 3 or query.shape[-1] != dim:
        raise ValueError(f"query must be (B, rows * columns, {dim}), got {tuple(query.shape)}")
    tokens = query.shape[1]
    if given is None and own is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"grid must be given where the tokens are not a square, got {tokens} tokens")
        return side, side
    rows, cols = own if given is None else given  # type: ignore[misc]
    if rows * cols != tokens:
        raise ValueError(f"grid must have a cell for each token, got grid={(rows, cols)} and {tokens} tokens")
    return rows, cols


def grid_key_mask(key_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """`key_mask`, expanded to (B, N). Raises ValueError where it does not fit or is not boolean."""
    batch, tokens, _ = query.shape
    check_key_mask(key_mask, (batch, tokens), "(B, N)")
    return None if key_mask is None else key_mask.expand(batch, tokens)
