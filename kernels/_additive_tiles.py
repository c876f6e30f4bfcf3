"""Additive scores on a CPU, by tiles that stay in its cache, with a backward pass of its own.

A tile is some batches, some of their queries and all their keys: (…, rows, Lk, H) numbers, of which nothing
is kept. How they are made depends on the largest |a| of all queries and |b| of all keys:

    1 - 2 r,  r = 1 / (1 + A B)     A = e^2a and B = e^2b, taken once a token: a tanh is then a reciprocal
    u / (u + 2),  u = A B - 1       where the tanh are small: u is made of A - 1 and B - 1, which have digits
                                    that a difference from 1 has not
    tanh(a + b)                     where A B would overflow
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._score_tiles import wide_dtype

# Numbers of a tile, 4 MB of them. One thread would be as fast with fewer; several wait for each other after
# every operation on a tile, and then take longer.
CELLS = 2**20

# Below this sum of the largest numbers tanh are small, and above the other A B is near float32's end.
LEAST, MOST = 1.0, 40.0


class _Pairs:
    """All pairs of a call. What is as large as the tokens is made at once, as large as a tile in place."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        wide = wide_dtype(query)
        query, key = query.to(wide), key.to(wide)
        self.shape = (*query.shape[:2], key.shape[1], query.shape[2])
        some = self.shape[0] * self.shape[3] > 0
        bound = _peak(query) + _peak(key) if some else 0.0
        self.is_small, self.is_factored = bound <= LEAST, LEAST < bound <= MOST  # neither for NaN
        if self.is_small:
            query, key = torch.expm1(query * 2), torch.expm1(key * 2)
            self.raised = key + 1
        elif self.is_factored:
            query, key = (query * 2).exp_(), (key * 2).exp_()
        self.query, self.key, self.one = query, key, query.new_ones(())
        batch, queries, keys, hidden = self.shape
        self.n_rows = max(1, min(queries, CELLS // max(1, keys * hidden)))
        self.n_batches = max(1, min(batch, CELLS // max(1, self.n_rows * keys * hidden)))
        n = min(batch, self.n_batches) * min(queries, self.n_rows) * keys * hidden
        self.memory = [query.new_empty(n) for _ in range(2)]

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Batches and queries of each; none where there is nothing to sum."""
        if 0 in self.shape:
            return
        batch, queries = self.shape[:2]
        firsts = itertools.product(range(0, batch, self.n_batches), range(0, queries, self.n_rows))
        for b, i in firsts:
            yield slice(b, min(b + self.n_batches, batch)), slice(i, min(i + self.n_rows, queries))

    def tanh(self, tile: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
        """(batches, rows, Lk, H) of tanh, or of r if `is_factored`; and memory as large, unwritten."""
        query, key = self.query[tile].unsqueeze(2), self.key[tile[0]].unsqueeze(1)
        cells = (*query.shape[:2], *key.shape[2:])
        n = query.shape[0] * query.shape[1] * key.shape[2] * key.shape[3]
        found, other = (t[:n].view(cells) for t in self.memory)
        if self.is_factored:
            return torch.addcmul(self.one, query, key, out=found).reciprocal_(), other
        if self.is_small:
            torch.addcmul(key, query, self.raised[tile[0]].unsqueeze(1), out=found)
            return found.div_(torch.add(found, 2, out=other)), other
        return torch.add(query, key, out=found).tanh_(), other


def _peak(tokens: Tensor) -> float:
    """The largest |x|; NaN where one is."""
    if not tokens.numel():
        return 0.0
    least, most = torch.aminmax(tokens)
    return max(-least.item(), most.item()) if least == least else torch.nan


@torch.library.custom_op("lamina::tiled_additive_scores", mutates_args=())
def tiled_scores(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    """As `additive_scores`, of inputs on a CPU; deterministic, and differentiable twice."""
    pairs, wide = _Pairs(query, key), wide_dtype(query)
    scores = torch.zeros(pairs.shape[:3], dtype=wide)
    energy = energy.to(wide)
    for tile in pairs.tiles():
        found = torch.mv(pairs.tanh(tile)[0].flatten(0, 2), energy)
        if pairs.is_factored:
            found.mul_(-2).add_(energy.sum())
        scores[tile] = found.view(scores[tile].shape)
    return scores.to(query.dtype)


@tiled_scores.register_fake
def _(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], key.shape[1])


@torch.library.custom_op("lamina::tiled_additive_scores_backward", mutates_args=())
def _scores_backward(
    grad: Tensor, needed: Sequence[bool], query: Tensor, key: Tensor, energy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and energy: of what is not `needed`, nothing to read."""
    pairs, wide, (of_query, of_key, of_energy) = _Pairs(query, key), wide_dtype(query), needed
    d_query, d_key, d_energy = (torch.zeros(t.shape, dtype=wide) for t in (query, key, energy))
    grad = grad.to(wide)
    for tile in pairs.tiles():
        tanh, slopes = pairs.tanh(tile)
        by_pair, factor = grad[tile].reshape(-1), 1.0
        if pairs.is_factored:  # tanh / -2, rather than 1 from all sums in the end
            tanh, factor = tanh.sub_(0.5), -2.0
        if of_energy:
            d_energy.addmv_(tanh.flatten(0, 2).T, by_pair, alpha=factor)
        if not (of_query or of_key):
            continue
        spread = by_pair.view(*slopes.shape[:3], 1)
        torch.addcmul(spread, torch.mul(tanh, tanh, out=slopes), spread, value=-(factor**2), out=slopes)
        if of_query:
            d_query[tile] = slopes.sum(2)
        if of_key:
            d_key[tile[0]] += slopes.sum(1)
    found = (d_query.mul_(energy), d_key.mul_(energy), d_energy)
    d_query, d_key, d_energy = (
        d.to(query.dtype) if is_wanted else query.new_empty(0)
        for d, is_wanted in zip(found, needed, strict=True)
    )
    return d_query, d_key, d_energy


@_scores_backward.register_fake
def _(grad: Tensor, needed: Sequence[bool], query: Tensor, key: Tensor, energy: Tensor) -> tuple[Tensor, ...]:
    given = zip((query, key, energy), needed, strict=True)
    return tuple(t.new_empty(t.shape if is_wanted else 0) for t, is_wanted in given)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, needed = ctx.saved_tensors, list(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        from .additive_scores import additive_scores_reference

        wanted = [t for t, is_wanted in zip(inputs, needed, strict=True) if is_wanted]
        out = additive_scores_reference(*inputs)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return tuple(next(found) if is_wanted else None for is_wanted in needed)
    gradients = _scores_backward(grad, needed, *inputs)
    return tuple(g if is_wanted else None for g, is_wanted in zip(gradients, needed, strict=True))


tiled_scores.register_autograd(_backward, setup_context=_setup_context)
