"""LSH attention on a CPU, a few heads at a time, with a backward pass of its own.

A round's tokens are gathered once, in the round's order. The keys of a chunk are then a window of what was
gathered, which no one copies where the windows are of one head, and a gradient goes back by the inverse order
instead of being scattered.

What a query does not see is told by numbers 0 and 1 that scores are added to and multiplied by: a CPU takes
far longer to fill by a mask that follows no pattern. And no power is taken of less than -80, where e^x takes
far longer too: beside the 1 that each sum has, e^-80 is nothing.

With s the scores, P a round's exp(s - peak), f what the softmax over all rounds makes of them, and g the
output's gradient, the gradient of s is

    P (f g v - f g out)
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._lsh_rounds import Options, inverse, inverse_size, numbered, shares, taking_part
from .backend import forward_derivatives, transformed

# Scores of a round that are taken at a time, 2 MB of them.
CELLS = 2**19
HIDDEN = 1e30  # is taken off what is not seen
# Of each type the least that a power is taken of, and up to which number every whole one is exact.
LEAST = {torch.float32: -80.0, torch.float64: -700.0}
EXACT = {torch.float32: 2**24, torch.float64: 2**53}


def heads_at_once(length: int, options: Options) -> int:
    """How many have no more than `CELLS` scores in a round."""
    reach = options.chunk_size * (options.look_back + 1 + options.look_ahead)
    return max(1, CELLS // max(1, length * min(reach, length)))


def has_chunks(query_key: Tensor, value: Tensor, order: Tensor, dropout: float, options: Options) -> bool:
    """Whether `attend_in_chunks` can do it: everything else is for the definition."""
    n_rounds, length = order.shape[2:]
    count = n_rounds * math.ceil(length / options.chunk_size)
    return (
        not dropout
        and not options.deduplicate
        and query_key.dtype == value.dtype
        and max(length, n_rounds * (options.num_buckets + 1)) < EXACT.get(value.dtype, 0)
        and query_key.numel() > 0
        and value.numel() > 0
        and not (options.circular and count <= options.look_back + options.look_ahead)
        and not forward_derivatives(query_key, value)
        and not transformed()
    )


def attend_in_chunks(
    query_key: Tensor,
    value: Tensor,
    order: Tensor,
    labels: Tensor,
    key_mask: Tensor | None,
    options: Options,
) -> Tensor:
    """As `attend`, given what `sort_by_bucket` gives."""
    return _Attend.apply(query_key, value, order, labels, key_mask, options)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        tokens, keeps = _Tokens(*inputs), any(ctx.needs_input_grad)
        out = torch.empty_like(tokens.value)
        kept = [
            _forward(_Rounds(tokens, heads), tokens.value[heads], keeps, out[heads])
            for heads in tokens.groups()
        ]
        if tokens.hidden is not None:
            out.masked_fill_(tokens.hidden.unsqueeze(-1), 0.0)
        *tensors, ctx.options = inputs
        out = out.view_as(tensors[1])
        if keeps:
            flat = [t for weights in kept for t in (*weights.powers, *weights.shares, weights.alone)]
            ctx.save_for_backward(*tensors, out, *flat)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query_key, value, order, labels, key_mask, out, *flat = ctx.saved_tensors
        tokens = _Tokens(query_key, value, order, labels, key_mask, ctx.options)
        grad = grad.reshape(tokens.value.shape)
        if tokens.hidden is not None:
            grad = grad.masked_fill(tokens.hidden.unsqueeze(-1), 0.0)
        by_query, by_key, by_value = (t.new_zeros(t.shape) for t in (tokens.query, tokens.key, tokens.value))
        lost = (grad * out.view_as(grad)).sum(-1, keepdim=True)
        n = order.shape[2]
        for k, heads in enumerate(tokens.groups()):
            *both, alone = flat[k * (2 * n + 1) : (k + 1) * (2 * n + 1)]
            weights = _Weights(both[:n], both[n:], alone)
            totals = by_query[heads], by_key[heads], by_value[heads]
            _backward(_Rounds(tokens, heads), weights, grad[heads], lost[heads], totals)
        by_query += tokens.through_unit(by_key)
        return by_query.view_as(query_key), by_value.view_as(value), None, None, None, None


class _Tokens:
    """All heads of all batches in one row, (B H, L, ...)."""

    def __init__(
        self,
        query_key: Tensor,
        value: Tensor,
        order: Tensor,
        labels: Tensor,
        key_mask: Tensor | None,
        options: Options,
    ) -> None:
        self.query, self.value = query_key.flatten(0, 1), value.flatten(0, 1)
        self.order, self.here = order.flatten(0, 1), taking_part(order, key_mask).flatten(0, 1)
        self.labels = numbered(labels).flatten(0, 1) if options.same_bucket else None
        self.length, dim = self.query.shape[1:]
        self.options = options._replace(chunk_size=max(1, min(options.chunk_size, self.length)))
        self.inverse = inverse_size(self.query)
        self.factor = self.inverse * (options.scale * dim**-0.5)
        self.key = self.query * self.factor
        self.hidden = None if key_mask is None else ~key_mask.repeat_interleave(query_key.shape[1], 0)

    def groups(self) -> Iterator[slice]:
        """A few heads at a time: a third is gained by scores that stay in a cache."""
        heads = len(self.query)
        at_once = min(heads, heads_at_once(self.length, self.options))
        for first in range(0, heads, at_once):
            yield slice(first, min(first + at_once, heads))

    def through_unit(self, by_key: Tensor) -> Tensor:
        """The gradient of the query-keys, given that of the keys, in which it is written."""
        along = (self.query * by_key).sum(-1, keepdim=True)
        along *= self.inverse.square() / self.query.shape[2]
        return by_key.addcmul_(self.query, along, value=-1).mul_(self.factor)


class _Weights(NamedTuple):
    """What the backward pass of some heads is given."""

    powers: Sequence[Tensor]  # of each round, (G n, c, w)
    shares: Sequence[Tensor]  # of each round, (G, L)
    alone: Tensor  # (G, L)


class _Rounds:
    """What the rounds of G heads have in common."""

    def __init__(self, tokens: _Tokens, heads: slice) -> None:
        self.options, self.length = tokens.options, tokens.length
        each = tokens.query[heads], tokens.key[heads], tokens.value[heads]
        self.table = torch.cat(each, -1).flatten(0, 1)  # a row for each token
        self.widths = [t.shape[2] for t in each]
        order = tokens.order[heads]
        self.groups, self.n_rounds, _ = order.shape
        self.first = self.length * torch.arange(self.groups).view(-1, 1)
        self.places = inverse(order)
        self.count = math.ceil(self.length / self.options.chunk_size)
        short = self.count * self.options.chunk_size - self.length
        self.here = F.pad(tokens.here[heads], (0, short), value=self.length)
        self.labels = None if tokens.labels is None else F.pad(tokens.labels[heads], (0, short), value=-1)
        self.memory: tuple[Tensor, Tensor] | None = None

    def around(self, x: Tensor, r: int, filler: int) -> Tensor:
        """Of (G, R, n c) a round, and what stands before and behind it: (G, E)."""
        size, back, ahead = self.options.chunk_size, self.options.look_back, self.options.look_ahead
        if not self.options.circular:
            return F.pad(x[:, r], (back * size, ahead * size), value=filler)
        first, last = r * self.count - back, (r + 1) * self.count + ahead
        ring = x.view(self.groups, -1, size)
        chunks = torch.arange(first, last) % ring.shape[1]
        return ring[:, chunks].flatten(1)

    def rows(self, tokens: Tensor) -> Tensor:
        """(G, E, ...) of the table; nobody's is any."""
        at = tokens.clamp_max(self.length - 1).add_(self.first)
        return self.table.index_select(0, at.flatten()).view(*tokens.shape, -1)

    def own(self, x: Tensor) -> Tensor:
        """Of (G, E, ...) the round's own: (G n, c, ...)."""
        size, back = self.options.chunk_size, self.options.look_back
        mine = x[:, back * size : (back + self.count) * size]
        return mine.unflatten(1, (self.count, size)).flatten(0, 1)

    def windows(self, x: Tensor) -> Tensor:
        """Of (G, E, ...) what each chunk sees: (G n, w, ...)."""
        size, back, ahead = self.options.chunk_size, self.options.look_back, self.options.look_ahead
        return x.unfold(1, size * (back + 1 + ahead), size).movedim(-1, 2).flatten(0, 1)

    def folded(self, x: Tensor) -> Tensor:
        """Of (G n, w, ...) the sum at each place of (G, E, ...)."""
        size, steps = self.options.chunk_size, self.options.look_back + 1 + self.options.look_ahead
        x = x.unflatten(0, (self.groups, self.count))
        total = x.new_zeros(self.groups, (self.count + steps - 1) * size, *x.shape[3:])
        for step in range(steps):
            part = total[:, step * size : (step + self.count) * size]
            part += x[:, :, step * size : (step + 1) * size].flatten(1, 2)
        return total

    def parts(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        query, key, value = self.rows(tokens).split(self.widths, -1)
        return self.own(query), self.windows(key), self.windows(value)

    def seen(self, tokens: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """1 for each key that a query sees, and 0, and the opposite, (G n, c, w): both till the next call."""
        tokens = tokens.to(self.table.dtype)
        own, other = self.own(tokens).unsqueeze(-1), self.windows(tokens).unsqueeze(-2)
        shape = *own.shape[:2], other.shape[2]
        self.memory = self.memory or (own.new_empty(shape), own.new_empty(shape))
        seen, hidden = self.memory
        if self.options.is_causal:
            torch.lt(other, own, out=seen)
        else:
            torch.ne(other, own, out=seen)
            seen.mul_(torch.ne(other, self.length, out=torch.empty_like(other)))
        if self.labels is not None:
            labels = self.around(self.labels, r, -1).to(seen.dtype)
            own, other = self.own(labels).unsqueeze(-1), self.windows(labels).unsqueeze(-2)
            seen.mul_(torch.eq(own, other, out=hidden))
        return seen, torch.sub(1, seen, out=hidden)

    def unsorted(self, x: Tensor, r: int, *, before: int = 0) -> Tensor:
        """Of (G, places, ...) each token's, (G, L, ...); its round begins after `before` places."""
        at = self.places[:, r] + before + x.shape[1] * torch.arange(self.groups).view(-1, 1)
        return x.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)


def _forward(rounds: _Rounds, value: Tensor, keeps: bool, out: Tensor) -> _Weights:
    """Writes the output of some heads."""
    heads: list[Tensor] = []
    peaks: list[Tensor] = []
    sums: list[Tensor] = []
    kept: list[Tensor] = []
    for r in range(rounds.n_rounds):
        tokens = rounds.around(rounds.here, r, rounds.length)
        query, key, values = rounds.parts(tokens)
        scores = torch.bmm(query, key.transpose(1, 2))
        seen, hidden = rounds.seen(tokens, r)
        scores.add_(hidden, alpha=-HIDDEN)
        peak = scores.amax(-1, keepdim=True)
        powers = scores.sub_(peak).clamp_(min=LEAST[scores.dtype]).exp_().mul_(seen)
        heads.append(rounds.unsorted(torch.bmm(powers, values).view(rounds.groups, -1, values.shape[2]), r))
        for found, of in ((peaks, peak), (sums, powers.sum(-1))):
            found.append(of.view(rounds.groups, -1).gather(1, rounds.places[:, r]))
        if keeps:
            kept.append(powers)
    parts, alone = shares(peaks, sums)
    torch.mul(value, alone.unsqueeze(-1), out=out)
    for head, share in zip(heads, parts, strict=True):
        out.addcmul_(head, share.unsqueeze(-1))
    return _Weights(kept, parts, alone)


def _backward(
    rounds: _Rounds, weights: _Weights, grad: Tensor, lost: Tensor, totals: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Adds the gradients of queries, keys and values of some heads, each (G, L, ...)."""
    groups, length, back = rounds.groups, rounds.length, rounds.options.look_back
    size, count = rounds.options.chunk_size, rounds.count
    both = torch.cat([grad, lost], -1)
    for r, (powers, share) in enumerate(zip(weights.powers, weights.shares, strict=True)):
        tokens = rounds.around(rounds.here, r, length)
        query, key, values = rounds.parts(tokens)
        # What comes to no token has no gradient: its row is the last, of zeros.
        with_none = F.pad(both * share.unsqueeze(-1), (0, 0, 0, 1)).flatten(0, 1)
        at = rounds.here[:, r] + (length + 1) * torch.arange(groups).view(-1, 1)
        given, losing = with_none.index_select(0, at.flatten()).split([values.shape[2], 1], -1)
        given = given.view(groups * count, size, -1)
        by_value = torch.bmm(powers.transpose(1, 2), given)
        by_score = torch.bmm(given, values.transpose(1, 2))
        by_score.sub_(losing.view(-1, size, 1)).mul_(powers)
        by_query = torch.bmm(by_score, key).view(groups, count * size, -1)
        by_key = torch.bmm(by_score.transpose(1, 2), query)
        totals[0].add_(rounds.unsorted(by_query, r))
        for total, windows in ((totals[1], by_key), (totals[2], by_value)):
            found = rounds.folded(windows)
            total += rounds.unsorted(found, r, before=back * size)
            if rounds.options.circular:
                _add_edges(total, found, tokens, back * size, (back + count) * size)
    totals[2].addcmul_(grad, weights.alone.unsqueeze(-1))


def _add_edges(total: Tensor, found: Tensor, tokens: Tensor, start: int, stop: int) -> None:
    """Adds what tokens of other rounds, beside this one in the ring, are given; some may be there twice."""
    edges = torch.cat([tokens[:, :start], tokens[:, stop:]], 1)
    parts = torch.cat([found[:, :start], found[:, stop:]], 1)
    length = total.shape[1]
    parts = parts.masked_fill((edges == length).unsqueeze(-1), 0.0)
    at = edges.clamp_max(length - 1) + length * torch.arange(len(total)).view(-1, 1)
    total.view(-1, total.shape[-1]).index_add_(0, at.flatten(), parts.flatten(0, 1))
