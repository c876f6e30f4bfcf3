"""Biases of attention scores that are made from few parameters, where they are wanted.

Handed to `dot_product_attention` as `score_bias`, they are never written out by the fused kernel, and their
gradient is that of the parameters. `dense` writes them out, for every other path. No kernel of its own: a
bias is a part of attention's.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DistanceBias:
    """A coefficient for each head, times a power of the distance between query and key.

    .. math:: B_{h,ij} = c_h \\lvert i + L_k - L_q - j \\rvert^p

    With p = 1 and negative fixed slopes this is ALiBi; with p = 2 and c = -1 / (2 σ²) the logarithm of a
    Gaussian. The last query stands where the last key does.

    Args:
        coefficients: c, (H,) of floats; differentiable.
        power: p, 1 or 2.

    Shape:
        - of `dense`: (H, Lq, Lk)

    Raises:
        ValueError: `coefficients` is not a vector of floats, or `power` is neither.

    Reference:
        Press, Smith, Lewis. Train Short, Test Long: Attention with Linear Biases Enables Input Length
        Extrapolation. ICLR 2022. Section 3. Ding et al. Hierarchical Multi-Scale Gaussian Transformer for
        Stock Movement Prediction. IJCAI 2020.

    Example:
        >>> DistanceBias(torch.tensor([-0.5])).dense(2, 3)
        tensor([[[-0.5000, -0.0000, -0.5000],
                 [-1.0000, -0.5000, -0.0000]]])
    """

    coefficients: Tensor
    power: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if self.coefficients.ndim != 1 or not self.coefficients.is_floating_point():
            found = f"{tuple(self.coefficients.shape)} of {self.coefficients.dtype}"
            raise ValueError(f"coefficients must be (H,) of floats, got {found}")
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power!r}")

    def dense(self, queries: int, keys: int) -> Tensor:
        """(H, Lq, Lk), in float32 at the least: exact there are distances up to 2^24, squares up to 2^12."""
        wide = torch.promote_types(self.coefficients.dtype, torch.float32)
        rows = torch.arange(keys - queries, keys, device=self.coefficients.device, dtype=wide)
        apart = rows[:, None] - torch.arange(keys, device=self.coefficients.device, dtype=wide)
        apart = apart.abs() if self.power == 1 else apart.square()
        return self.coefficients.to(wide)[:, None, None] * apart


@dataclass(frozen=True, eq=False)
class TableBias:
    """A table for each head, read at the difference of a query's position and a key's.

    .. math:: B_{h,ij} = T_{h,\\,p_i - r_j}

    Positions are integers of the user's choice, so that one form serves lines and grids: on a line p counts
    the tokens, with an offset that makes the least difference 0; on a grid of rows as wide as w, p = (2w - 1)
    times the row plus the column, so that each offset of two cells has one entry. They need not cover the
    table.

    Args:
        table: T, (H, R) or (1, R) of floats; differentiable.
        query_positions: p, (Lq,) of int32 or int64.
        key_positions: r, likewise (Lk,). All differences must be in 0 … R - 1, which is not looked at: a look
            would wait for the device.

    Shape:
        - of `dense`: (H, Lq, Lk), or (1, Lq, Lk) of a table for all heads

    Raises:
        ValueError: `table` is not a matrix of floats, or the positions are not vectors of integers.

    Reference:
        Shaw, Uszkoreit, Vaswani. Self-Attention with Relative Position Representations. NAACL 2018; Liu et
        al. Swin Transformer. ICCV 2021, equation 4.

    Example:
        >>> places = torch.arange(3)
        >>> TableBias(torch.arange(5.0)[None], places + 2, places).dense()
        tensor([[[2., 1., 0.],
                 [3., 2., 1.],
                 [4., 3., 2.]]])
    """

    table: Tensor
    query_positions: Tensor
    key_positions: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or not self.table.is_floating_point():
            raise ValueError(
                f"table must be (H, R) of floats, got {tuple(self.table.shape)} of {self.table.dtype}"
            )
        for name in "query_positions", "key_positions":
            positions = getattr(self, name)
            if positions.ndim != 1 or positions.dtype not in (torch.int32, torch.int64):
                found = f"{tuple(positions.shape)} of {positions.dtype}"
                raise ValueError(f"{name} must be a vector of int32 or int64, got {found}")

    def dense(self, queries: int | None = None, keys: int | None = None) -> Tensor:
        """(H, Lq, Lk), or of the first so many queries and keys."""
        at = self.query_positions[:queries, None] - self.key_positions[:keys]
        return self.table[:, at.long()]


ScoreBias = DistanceBias | TableBias


def check_score_bias(score_bias: ScoreBias | None, shape: tuple[int, int, int]) -> None:
    """Raises ValueError where `score_bias` does not fit scores of `shape` (H, Lq, Lk)."""
    heads, *lengths = shape
    if isinstance(score_bias, DistanceBias):
        if len(score_bias.coefficients) != heads:
            raise ValueError(
                f"score_bias must have {heads} coefficients, one a head, got {len(score_bias.coefficients)}"
            )
    elif isinstance(score_bias, TableBias):
        if score_bias.table.shape[0] not in (1, heads):
            raise ValueError(
                f"score_bias must have a table of {heads} heads, or of one, got {score_bias.table.shape[0]}"
            )
        found = [len(score_bias.query_positions), len(score_bias.key_positions)]
        if found != lengths:
            raise ValueError(
                f"score_bias must have positions of (Lq, Lk) = {tuple(lengths)}, got {tuple(found)}"
            )
    elif score_bias is not None:
        raise ValueError(f"score_bias must be a DistanceBias or a TableBias, got {type(score_bias).__name__}")
