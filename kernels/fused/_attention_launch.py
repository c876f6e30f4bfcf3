"""Tile sizes of the attention kernels, and how tensors are handed to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tiles import Cells, Line, Rows, Rules, Table


class Tiles(NamedTuple):
    """Of one launch: queries and keys of a tile, warps, and stages of its pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


# By kernel, bits of a number, and greatest head size. Chosen from what the compiler reports for sm_90
# (test_fused_attention_sm90.py): the largest that spill nothing, or little. Which of those is the fastest, a
# GPU has yet to tell.
_TILES: dict[str, dict[int, dict[int, Tiles]]] = {
    "forward": {
        16: {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2)},
        32: {64: Tiles(64, 32, 4, 2), 128: Tiles(32, 64, 8, 1), 256: Tiles(16, 16, 8, 1)},
    },
    "query": {
        16: {64: Tiles(64, 64, 4, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(32, 64, 8, 1)},
        32: {64: Tiles(64, 16, 4, 1), 128: Tiles(16, 32, 4, 1), 256: Tiles(16, 16, 8, 1)},
    },
    "key": {
        16: {64: Tiles(64, 64, 4, 2), 128: Tiles(16, 128, 8, 2), 256: Tiles(64, 32, 8, 1)},
        32: {64: Tiles(32, 32, 4, 1), 128: Tiles(64, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
    },
    "bias": {
        16: {64: Tiles(64, 64, 8, 1), 128: Tiles(64, 64, 8, 1), 256: Tiles(64, 32, 8, 1)},
        32: {64: Tiles(64, 16, 4, 1), 128: Tiles(16, 32, 4, 1), 256: Tiles(16, 32, 8, 1)},
    },
}

# Some features take registers: in place of the above where those would spill.
_TILES_WITH: dict[str, dict[tuple[str, int, int], Tiles]] = {
    "dropout": {
        ("forward", 16, 64): Tiles(64, 64, 4, 2),
        ("query", 16, 64): Tiles(128, 32, 8, 2),
        ("key", 16, 64): Tiles(16, 128, 8, 2),
    },
    "table": {
        ("forward", 16, 128): Tiles(128, 32, 8, 2),
        ("forward", 16, 256): Tiles(64, 16, 4, 2),
    },
}


def tiles(
    kernel: str, dtype: torch.dtype, head_dim: int, queries: int, keys: int, *, features: Sequence[str] = ()
) -> Tiles:
    """The configuration of a kernel: a table, never tuned at run time. float64 is for tests."""
    bits = min(torch.finfo(dtype).bits, 32)
    by_size = _TILES[kernel][bits]
    size = next(size for size in by_size if head_dim <= size)
    found = by_size[size]
    for feature in features:
        found = _TILES_WITH[feature].get((kernel, bits, size), found)
    # Short sequences have shorter tiles, of at least what a tensor core takes, and fewer warps: of a product
    # that another follows each warp has 16 rows, and more warps would only make the same ones again. Heads
    # wider than 128 need the registers of all.
    rows = min(found.rows, max(16, triton.next_power_of_2(queries)))
    columns = min(found.columns, max(16, triton.next_power_of_2(keys)))
    is_short = columns < found.columns if kernel == "key" else rows < found.rows
    warps = min(found.warps, 4) if is_short and size <= 128 else found.warps
    return Tiles(rows, columns, warps, found.stages)


@dataclass(frozen=True)
class Launch:
    """What all kernels of one call take."""

    query: Tensor
    key: Tensor
    value: Tensor
    rules: Rules
    seed: Tensor | None
    dropout: float
    scale: float
    power: int
    batches: int
    queries: int  # of the longest sequence
    keys: int
    packed: bool

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        table: Tensor | None,
        query_positions: Tensor | None,
        key_positions: Tensor | None,
        coefficients: Tensor | None,
        power: int,
        key_lengths: Tensor | None,
        query_starts: Tensor | None,
        key_starts: Tensor | None,
        longest: Sequence[int],
        before: int,
        after: int,
        scale: float,
        dropout: float,
        seed: Tensor | None,
    ) -> "Launch":
        packed = query_starts is not None
        rules = Rules(
            mask=None if mask is None else cells(mask),
            bias=None if bias is None else cells(bias),
            table=None if table is None else _table(table, query_positions, key_positions),
            coefficients=coefficients,
            key_lengths=key_lengths,
            query_starts=query_starts,
            key_starts=key_starts,
            before=None if before < 0 else before,
            after=None if after < 0 else after,
        )
        return cls(
            query=_dense_rows(query),
            key=_dense_rows(key),
            value=_dense_rows(value),
            rules=rules,
            seed=seed,
            dropout=dropout,
            scale=scale,
            power=power,
            batches=len(query_starts) - 1 if query_starts is not None else query.shape[0],
            queries=longest[0] if packed else query.shape[2],
            keys=longest[1] if packed else key.shape[2],
            packed=packed,
        )

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def wide(self) -> torch.dtype:
        """Of the accumulators."""
        return torch.float64 if self.query.dtype is torch.float64 else torch.float32

    def tiles(self, kernel: str) -> Tiles:
        head_dim = max(self.query.shape[3], self.value.shape[3])
        given = {"table": self.rules.table, "dropout": self.seed}
        features = [name for name, tensor in given.items() if tensor is not None]
        return tiles(kernel, self.query.dtype, head_dim, self.queries, self.keys, features=features)

    def rows(self, tensor: Tensor) -> Rows:
        tensor = _dense_rows(tensor)
        return Rows(tensor, 0 if self.packed else tensor.stride(0), tensor.stride(1), tensor.stride(2))

    def line(self, tensor: Tensor) -> Line:
        tensor = tensor.contiguous()
        return Line(tensor, 0 if self.packed else tensor.stride(0), tensor.stride(1))

    def inputs(self) -> tuple[Rows, Rows, Rows]:
        return self.rows(self.query), self.rows(self.key), self.rows(self.value)

    def run(self, kernel: Any, programs: int, tile: Tiles, *arguments: Any, own: Sequence[int] = ()) -> None:
        """`own` stands between the lengths and the constants: what only this kernel takes."""
        if not programs:
            return
        exact = self.wide is torch.float64
        size, v_size = self.query.shape[3], self.value.shape[3]
        # Three products of TF32 are as exact as one of float32 but for an ulp or two, and on tensor cores.
        precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"
        with torch.cuda.device_of(self.query):
            kernel[(programs,)](
                *arguments, self.rules, self.seed, self.dropout,
                *((self.batches,) if own else ()), self.heads, self.heads // self.key_heads, self.queries,
                self.keys, *own, SIZE=size, V_SIZE=v_size, BLOCK=_block(size), V_BLOCK=_block(v_size),
                ROWS=tile.rows, COLUMNS=tile.columns, SCALE=self.scale, POWER=self.power,
                ACC=tl.float64 if exact else tl.float32, PRECISION=precision, num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip


def cells(tensor: Tensor) -> Cells:
    strides = [0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return Cells(tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor, *strides)


def per_head(tensor: Tensor) -> Line:
    """(B, H, L) that this module has made: packed sequences have a batch in it."""
    return Line(tensor, tensor.stride(0), tensor.stride(1))


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _table(table: Tensor, query_positions: Tensor | None, key_positions: Tensor | None) -> Table:
    return Table(table, 0 if len(table) == 1 else table.stride(0), query_positions, key_positions)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
