"""Relative position biases, of a sequence (clipped distances, T5's buckets) and of a grid (Swin's)."""

import math

import torch
from torch import Tensor, nn

from ..kernels.score_bias import TableBias


class RelativePositionBias(nn.Module):
    """A learned number for each head and each distance between query and key, to add to the scores.

    .. math:: b_{hij} = T_{\\operatorname{row}(j - i), h}

    Give it to any attention as `bias=`. Without `num_buckets` every distance up to `max_distance` has a row
    of its own, and all that lie further share the last. With `num_buckets` the rows are T5's: half of each
    direction's buckets are exact, the other half grow logarithmically up to `max_distance`. One direction
    (`bidirectional=False`) is for causal attention: all later keys share the row of distance 0.

    Its buckets are those of `transformers`' T5, so that the weight of its `relative_attention_bias` loads as
    `weight`. T5 adds it to scores that are not scaled; ours scale the dot products, not the bias. T5 counts
    positions from the first query and key, this layer back from the last ones, as `is_causal` has it, so that
    decoding with a cache needs no offset: the two agree where queries are as many as keys.

    A bias is constant along diagonals. So Lq + Lk - 1 rows are looked up, and the (H, Lq, Lk) output is
    copied from windows over them, where T5 computes a bucket for each pair: time and memory O(H Lq Lk).
    `score_bias` gives those rows alone, which `MultiHeadAttention` takes as `bias=` too: time and memory
    O(H (Lq + Lk)), and on a GPU the bias is never written out.

    Args:
        num_heads: H.
        max_distance: from which on distances are one.
        num_buckets: rows of T5's table; None for a row for each distance.
        bidirectional: whether later keys are told from earlier ones, and from each other.
        device: where the parameter is.
        dtype: of the parameter.

    Shape:
        - queries, keys: integers, Lq and Lk; the last query stands where the last key does
        - output: (H, Lq, Lk)

    Raises:
        ValueError: `max_distance` or `num_buckets` is too small, or `num_buckets` is odd in two directions.

    Reference:
        Shaw, Uszkoreit, Vaswani. Self-Attention with Relative Position Representations. NAACL 2018.
        Raffel et al. Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer.
        JMLR 2020. Section 2.1, and its code for the buckets.

    Example:
        >>> bias = RelativePositionBias(4, num_buckets=32)
        >>> bias(5, 7).shape
        torch.Size([4, 5, 7])
    """

    def __init__(
        self,
        num_heads: int,
        *,
        max_distance: int = 128,
        num_buckets: int | None = None,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        directions = 2 if bidirectional else 1
        self.max_distance = max_distance
        self.num_buckets = num_buckets
        self.bidirectional = bidirectional
        if num_buckets is None:
            if max_distance < 0:
                raise ValueError(f"max_distance must be at least 0, got {max_distance}")
            rows = directions * max_distance + 1
            self._bounds: tuple[int, ...] = ()
        else:
            if num_buckets % directions or num_buckets < 2 * directions:
                raise ValueError(
                    f"num_buckets must be {'even and ' if bidirectional else ''}at least {2 * directions} "
                    f"with bidirectional={bidirectional}, got {num_buckets}"
                )
            exact = num_buckets // directions // 2
            if max_distance <= exact:
                raise ValueError(
                    f"max_distance must exceed the {exact} exact buckets of num_buckets={num_buckets}, "
                    f"got {max_distance}"
                )
            rows = num_buckets
            self._bounds = _bucket_bounds(num_buckets // directions, max_distance)
        self.weight = nn.Parameter(torch.empty(rows, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of deviation 0.02."""
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, queries: int, keys: int) -> Tensor:
        # At least one query, since no window fits into fewer distances than keys.
        windows = max(queries, 1)
        distances = torch.arange(windows + keys - 1, device=self.weight.device) - (keys - 1)
        by_distance = self.weight.index_select(0, self._rows(distances)).t()
        # Window s begins at the distance s - (keys - 1), which query windows - 1 - s has to its first key.
        return by_distance.unfold(1, keys, 1).flip(1)[:, :queries]

    def score_bias(self, queries: int, keys: int) -> TableBias:
        """What `forward` writes out, as a table of distances."""
        device = self.weight.device
        distances = queries - 1 - torch.arange(max(queries + keys - 1, 0), device=device)
        table = self.weight.index_select(0, self._rows(distances)).t()
        places = torch.arange(max(queries, keys), device=device, dtype=torch.int32)
        return TableBias(table, places[:queries] + (keys - 1), places[:keys])

    def _rows(self, distances: Tensor) -> Tensor:
        """The row of the table for each distance, which is the key's position less the query's."""
        if self.num_buckets is None:
            clipped = distances.clamp(-self.max_distance, self.max_distance if self.bidirectional else 0)
            return clipped + self.max_distance if self.bidirectional else -clipped
        size = distances.abs() if self.bidirectional else (-distances).clamp(min=0)
        bounds = torch.tensor(self._bounds, device=distances.device)
        rows = torch.bucketize(size, bounds, right=True) - 1
        return rows + (distances > 0) * (self.num_buckets // 2) if self.bidirectional else rows

    def extra_repr(self) -> str:
        buckets = f"num_buckets={self.num_buckets}, bidirectional={self.bidirectional}"
        return f"{self.weight.shape[1]}, max_distance={self.max_distance}, {buckets}"


class RelativePositionBias2d(nn.Module):
    """A learned number for each head and each offset between two cells of a grid, to add to the scores.

    .. math:: b_{hij} = T_{(r_i - r_j + R - 1)(2C - 1) + (c_i - c_j + C - 1), h}

    for cells at row r and column c of R rows and C columns. It is Swin's bias, and with the whole grid
    TransGAN's: their tables load as `weight`. A smaller grid takes the middle of the table, where the same
    offsets are.

    Swin and TransGAN keep an index of every pair in a buffer, and gather by it. Here the output is copied
    from windows over the table: there is nothing to lose on the meta device, and the gradient is a sum over
    windows in place of a scatter. Time and memory O(H (R C)²). `score_bias` gives the table itself, with the
    cells' positions in it, which `MultiHeadAttention` takes as `bias=` too.

    Args:
        num_heads: H.
        grid: rows and columns of the largest grid.
        device: where the parameter is.
        dtype: of the parameter.

    Shape:
        - grid: (rows, columns), the constructed ones where it is not given
        - output: (H, rows · columns, rows · columns), cells row by row

    Raises:
        ValueError: a grid is empty, or larger than the constructed one.

    Reference:
        Liu et al. Swin Transformer: Hierarchical Vision Transformer using Shifted Windows. ICCV 2021.
        Section 3.2, equation 4.
        Jiang, Chang, Wang. TransGAN: Two Pure Transformers Can Make One Strong GAN. NeurIPS 2021.

    Example:
        >>> bias = RelativePositionBias2d(4, (3, 5))
        >>> bias().shape
        torch.Size([4, 15, 15])
        >>> bias((2, 2)).shape
        torch.Size([4, 4, 4])
    """

    def __init__(
        self,
        num_heads: int,
        grid: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rows, cols = grid
        if rows < 1 or cols < 1:
            raise ValueError(f"grid must have at least one row and one column, got {tuple(grid)}")
        self.grid = (rows, cols)
        offsets = (2 * rows - 1) * (2 * cols - 1)
        self.weight = nn.Parameter(torch.empty(offsets, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of deviation 0.02, as in both papers' code."""
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, grid: tuple[int, int] | None = None) -> Tensor:
        rows, cols = self._grid(grid)
        most_rows, most_cols = self.grid
        # Flipped, so that along a window the offset falls as the key's position grows.
        table = self.weight.flip(0).unflatten(0, (2 * most_rows - 1, 2 * most_cols - 1)).permute(2, 0, 1)
        table = table[:, most_rows - rows : most_rows + rows - 1, most_cols - cols : most_cols + cols - 1]
        windows = table.unfold(1, rows, 1).unfold(2, cols, 1).flip(1, 2)  # (H, R, C, R, C)
        return windows.flatten(3, 4).flatten(1, 2)

    def score_bias(self, grid: tuple[int, int] | None = None) -> TableBias:
        """What `forward` writes out, as a table of offsets."""
        rows, cols = self._grid(grid)
        most_rows, most_cols = self.grid
        width = 2 * most_cols - 1
        down, along = (torch.arange(n, device=self.weight.device, dtype=torch.int32) for n in (rows, cols))
        cells = (down[:, None] * width + along).flatten()
        return TableBias(self.weight.t(), cells + (most_rows - 1) * width + most_cols - 1, cells)

    def _grid(self, grid: tuple[int, int] | None) -> tuple[int, int]:
        rows, cols = self.grid if grid is None else grid
        if not (0 < rows <= self.grid[0] and 0 < cols <= self.grid[1]):
            raise ValueError(f"grid must be from (1, 1) to {self.grid}, got {(rows, cols)}")
        return rows, cols

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.grid}"


def _bucket_bounds(buckets: int, max_distance: int) -> tuple[int, ...]:
    """The least distance of each of one direction's buckets.

    From T5's own formula in float32, whose rounding the published weights were trained with. It is evaluated
    here, once: a compiled graph's logarithm may round another way at a bucket's edge.
    """
    exact = buckets // 2
    distances = torch.arange(exact, max_distance + 1, device="cpu", dtype=torch.float32)
    growth = torch.log(distances / exact) / math.log(max_distance / exact) * (buckets - exact)
    bucket = (exact + growth.long()).clamp(max=buckets - 1)
    first = torch.searchsorted(bucket, torch.arange(exact, buckets, device="cpu")) + exact
    return (*range(exact), *first.tolist())
