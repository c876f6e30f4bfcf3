"""Tile sizes of the kernels of LSH attention, and how tensors are handed to them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tiles import Rows
from ._lsh_tiles import Parts, Ring


class Tiles(NamedTuple):
    """Of one launch: places of a tile, places beside them that are looked at together, warps."""

    rows: int
    columns: int
    warps: int
    registers: int | None = None  # of a thread at the most


# By bits of a number, then by the greatest head size of an entry. Chosen from what the compiler reports for
# sm_90 (tests/kernels/test_fused_lsh_attention.py): the largest that spill nothing, or little. With chunks of
# 64 that look one back, a tile of the forward kernel sees all its keys at once: what it does then is to wait
# for rows, and with 128 registers twice as many programs wait at a time. Which of those is the fastest, a GPU
# has yet to tell.
_TILES: dict[str, dict[int, dict[int, Tiles]]] = {
    "forward": {
        16: {64: Tiles(64, 128, 4, 128), 128: Tiles(64, 128, 4), 256: Tiles(64, 32, 8)},
        32: {64: Tiles(64, 32, 4), 128: Tiles(32, 32, 4), 256: Tiles(16, 16, 8)},
    },
    "backward": {
        16: {64: Tiles(64, 32, 4), 128: Tiles(32, 32, 4), 256: Tiles(32, 32, 8)},
        32: {64: Tiles(32, 32, 8), 128: Tiles(16, 16, 8), 256: Tiles(16, 16, 8)},
    },
}


@dataclass(frozen=True)
class Launch:
    """What all kernels of one call take."""

    query_key: Tensor
    value: Tensor
    ring: Ring
    mask: Tensor | None
    chunk: int
    back: int
    ahead: int
    circular: bool
    is_causal: bool
    scale: float
    dropout: float
    seed: Tensor | None

    @classmethod
    def of(
        cls,
        query_key: Tensor,
        value: Tensor,
        order: Tensor,
        labels: Tensor | None,
        places: Tensor | None,
        key_mask: Tensor | None,
        chunk_size: int,
        look_back: int,
        look_ahead: int,
        circular: bool,
        is_causal: bool,
        scale: float,
        dropout: float,
        seed: Tensor | None,
    ) -> "Launch":
        rounds, length = order.shape[2:]
        chunk = whole_chunk(length, chunk_size)
        ring = Ring(
            order=order.contiguous(),
            labels=None if labels is None else labels.contiguous(),
            places=None if places is None else places.contiguous(),
            lengths=None if key_mask is None else key_mask.sum(-1),
            rounds=rounds,
            length=length,
            chunks=triton.cdiv(length, chunk),
        )
        mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        return cls(
            dense_rows(query_key), dense_rows(value), ring, mask, chunk, look_back, look_ahead, circular,
            is_causal, scale, dropout, seed,
        )  # fmt: skip

    @property
    def pairs(self) -> int:
        """Of a batch and a head."""
        return self.query_key.shape[0] * self.query_key.shape[1]

    @property
    def wide(self) -> torch.dtype:
        """Of the accumulators."""
        return torch.float64 if self.query_key.dtype is torch.float64 else torch.float32

    def tiles(self, kernel: str) -> Tiles:
        bits = min(torch.finfo(self.query_key.dtype).bits, 32)
        by_size = _TILES[kernel][bits]
        widest = max(self.query_key.shape[3], self.value.shape[3])
        found = by_size[next(size for size in by_size if widest <= size)]
        # Random numbers, and counting how often a pair meets, take registers of a tile's every cell.
        cells = 2 if self.seed is not None else 1
        if self.ring.places is not None:
            cells = 4 if kernel == "forward" else 2
        # Short sequences have shorter tiles, of at least what a tensor core takes.
        length = max(16, triton.next_power_of_2(self.ring.length))
        found = found._replace(
            rows=min(found.rows, length), columns=max(16, min(found.columns // cells, length))
        )
        if not self.at_once(found):
            found = found._replace(columns=min(found.columns, 64))
        plain = cells == 1 and self.ring.labels is None and not self.circular and self.whole(found)
        return found if plain and self.at_once(found) else found._replace(registers=None)

    def by_round(self, tensor: Tensor) -> Tensor:
        """Memory for a row of each round: (B, H, R, L, D), in which the heads of a token lie side by side."""
        batch, heads, length, size = tensor.shape
        rows = tensor.new_empty(self.ring.rounds, batch, length, heads, size)
        return rows.permute(1, 3, 0, 2, 4)

    def run(self, kernel: Any, tile: Tiles, *arguments: Any, **constants: Any) -> None:
        """A kernel whose programs own a tile of the places of one round."""
        programs = triton.cdiv(self.ring.length, tile.rows) * self.ring.rounds * self.pairs
        if not programs:
            return
        size, v_size = self.query_key.shape[3], self.value.shape[3]
        # Three products of TF32 are as exact as one of float32 but for an ulp or two, and on tensor cores.
        precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"
        with torch.cuda.device_of(self.query_key):
            kernel[(programs,)](
                *arguments, self.ring, self.seed, self.dropout, self.query_key.shape[1],
                SIZE=size, V_SIZE=v_size, BLOCK=block(size), V_BLOCK=block(v_size), ROWS=tile.rows,
                COLUMNS=tile.columns, CHUNK=self.chunk, BACK=self.back, AHEAD=self.ahead,
                CIRCULAR=self.circular, CAUSAL=self.is_causal, WHOLE=self.whole(tile),
                SCALE=self.scale, ACC=accumulator(self.wide), PRECISION=precision, **constants,
                num_warps=tile.warps, num_stages=1, maxnreg=tile.registers,
            )  # fmt: skip

    def run_dense(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """A kernel whose programs own a tile of tokens as they stand."""
        size, v_size = self.query_key.shape[3], self.value.shape[3]
        rows = max(16, 4096 // max(block(size), block(v_size)))
        programs = triton.cdiv(self.ring.length, rows) * self.pairs
        if not programs:
            return
        with torch.cuda.device_of(self.query_key):
            kernel[(programs,)](
                *arguments, V_SIZE=v_size, V_BLOCK=block(v_size), ROWS=rows, ACC=accumulator(self.wide),
                **constants,
            )  # fmt: skip

    def whole(self, tile: Tiles) -> bool:
        """Whether every tile lies in one chunk."""
        return self.chunk % tile.rows == 0

    def at_once(self, tile: Tiles) -> bool:
        """Whether all that a tile sees fits into its columns."""
        within = 1 if self.whole(tile) else triton.cdiv(tile.rows - 1, self.chunk) + 1
        if tile.rows % self.chunk == 0:
            within = tile.rows // self.chunk
        return (within + self.back + self.ahead) * self.chunk <= tile.columns


def whole_chunk(length: int, chunk_size: int) -> int:
    """The size of a chunk as kernels take it: of one that holds every token, no more than it needs."""
    return min(chunk_size, max(16, triton.next_power_of_2(length))) if length <= chunk_size else chunk_size


def rows_of(tensor: Tensor) -> Rows:
    tensor = dense_rows(tensor)
    return Rows(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2))


def parts_of(tensor: Tensor) -> Parts:
    """(B, H, R, L, D) that `by_round` has made."""
    return Parts(tensor, *tensor.stride()[:4])


def block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype is torch.float64 else tl.float32


def dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
