"""Tiles of all scores that a CPU takes at a time, and which weights dropout leaves in each."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores of a tile, 4 MB of them. Smaller ones are no faster, and each of their many short operations waits
# for all threads, which takes long where a machine has other work.
CELLS = 2**20


@dataclass(frozen=True)
class Tile:
    """Some batches, the same heads of each, the same queries of each head, and their keys up to `n_keys`.

    Its scores lie as (batches and groups, heads of a group and their queries, keys): in products of matrices,
    the heads that share keys are as more queries.
    """

    batches: slice
    groups: slice
    heads: slice
    rows: slice
    n_keys: int
    seen: int  # the first of its queries sees so many keys if causal, each that follows one more

    def keys_of(self, t: Tensor) -> Tensor:
        """(B, G, Lk, D) -> (batches and groups, Lk, D)."""
        return t[self.batches, self.groups].flatten(0, 1).to(wide_dtype(t))

    def write_keys(self, to: Tensor, t: Tensor) -> None:
        part = to[self.batches, self.groups]
        part.copy_(t.view(part.shape))

    def rows_of(self, t: Tensor) -> Tensor:
        """(B, H, Lq, D) -> (batches and groups, heads of a group and queries, D)."""
        part = t[self.batches, self.heads, self.rows]
        groups = part.shape[0] * (self.groups.stop - self.groups.start)
        return part.reshape(groups, math.prod(part.shape[:3]) // groups, t.shape[3]).to(wide_dtype(t))

    def write(self, to: Tensor, t: Tensor) -> None:
        part = to[self.batches, self.heads, self.rows]
        part.copy_(t.view(part.shape))

    def cells_of(self, t: Tensor) -> Tensor:
        """The part of (1|B, 1|H, 1|Lq, 1|Lk) that is the tile's, in four dimensions still."""
        own = (self.batches, self.heads, self.rows, slice(self.n_keys))
        return t[tuple(slice(None) if t.shape[n] == 1 else part for n, part in enumerate(own))]

    def in_four(self, scores: Tensor) -> Tensor:
        sizes = (part.stop - part.start for part in (self.batches, self.heads, self.rows))
        return scores.view(*sizes, self.n_keys)

    def weights(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """With them which queries see no key, whose weights mean nothing; None where all see one."""
        scores = torch.bmm(queries, keys[:, : self.n_keys].mT)
        cells = self.in_four(scores)
        if bias is not None:
            cells += self.cells_of(bias)
        if mask is not None:  # added, since masked_fill costs ten sums
            cells += torch.where(self.cells_of(mask), 0.0, -torch.inf)
        if is_causal:
            cells += scores.new_full(cells.shape[2:], -torch.inf).triu_(self.seen)
        blind = scores.amax(-1, keepdim=True) == -torch.inf
        if not blind.any():
            return scores.softmax(-1), None
        return scores.masked_fill_(blind, 0.0).softmax(-1), blind


def blocks(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[list[Tile]]:
    """All scores in tiles, those that share their keys in one list; none where there is no score."""
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    if not batch * heads * queries * keys:
        return
    per_group = heads // groups
    n_rows = min(queries, max(1, CELLS // (per_group * keys)))
    n_groups = min(groups, max(1, CELLS // (per_group * n_rows * keys)))
    n_batches = min(batch, max(1, CELLS // (heads * n_rows * keys)))
    for b, g in itertools.product(_slices(batch, n_batches), _slices(groups, n_groups)):
        h = slice(g.start * per_group, g.stop * per_group)
        tiles = []
        for rows in _slices(queries, n_rows):
            seen = rows.start + 1 + keys - queries
            # At least one key, which the mask takes away again.
            n_keys = min(keys, max(1, rows.stop + keys - queries)) if is_causal else keys
            tiles.append(Tile(b, g, h, rows, n_keys, seen))
        yield tiles


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class Drops:
    """Which weights dropout leaves: the same for the same seed, where tiles come in the same order.

    A weight's bits are its number in the tile, as MurmurHash3 mixes one, by factors drawn for each tile. On a
    CPU a generator's own bits come one after the other, and `bernoulli_` takes ten times as long as this.
    """

    def __init__(self, seed: Tensor, dropout: float) -> None:
        self.generator = torch.Generator().manual_seed(int(seed))
        self.threshold = min(max(round((1 - dropout) * 2**32), 1), 2**32 - 1)
        self.share = self.threshold / 2**32  # left of all weights
        self.numbers = torch.empty(0, dtype=torch.int32)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """int32: -1 where a weight is left, else 0."""
        n = math.prod(shape)
        if n > len(self.numbers):
            self.numbers = torch.arange(n, dtype=torch.int32).mul_(-1640531527)  # 2^32 over the golden ratio
        first, *factors = torch.randint(-(2**31), 2**31, (3,), generator=self.generator).tolist()
        bits = self.numbers[:n] + first
        high = torch.empty_like(bits)
        for factor in factors:
            torch.bitwise_right_shift(bits, 16, out=high)
            bits.bitwise_xor_(high.bitwise_and_(2**16 - 1)).mul_(factor | 1)
        return bits.lt_(self.threshold - 2**31).neg_().view(shape)


def strike_out(weights: Tensor, kept: Tensor) -> Tensor:
    """Zero, in place, where `kept` is: a bitwise and, which costs a fifth of a product with truths."""
    whole = torch.int64 if weights.dtype is torch.float64 else torch.int32
    weights.view(whole).bitwise_and_(kept.to(whole))
    return weights


def wide_dtype(t: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 where the input is."""
    return torch.promote_types(t.dtype, torch.float32)


def like_tokens(heads: Tensor, size: int) -> Tensor:
    """(B, H, L, size), unwritten, in whose memory the heads of a token lie side by side."""
    batch, n_heads, length, _ = heads.shape
    return heads.new_empty(batch, length, n_heads, size).transpose(1, 2)
