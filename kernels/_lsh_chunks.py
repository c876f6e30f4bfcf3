"""LSH attention on a CPU, a few heads at a time, with a backward pass of its own.

A round's tokens are gathered once, in the round's order. The keys of a chunk are then a window of what was
gathered, which no one copies where the windows are of one head. What a token is given, in several rounds and
windows, is a bag of rows of what the products wrote: nothing is scattered.

What a query does not see is told by numbers 0 and 1: a CPU takes far longer to fill by a mask that follows no
pattern. As keys are unit vectors, a score is not above the size of its query; where no size is large that is
what comes off the scores, and no maximum is looked for. Else what is not seen is hidden by adding to its
score, and no power is taken of less than -80, where e^x takes far longer too: beside the 1 that each sum then
has, e^-80 is nothing.

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
from torch.autograd.function import once_differentiable

from ._autocast import no_autocast
from ._lsh_rounds import Options, inverse, inverse_size, numbered, shares, taking_part
from .backend import forward_derivatives, transformed

# Scores of a round that are taken at a time, 2 MB of them.
CELLS = 2**19
HIDDEN = 1e30  # is taken off what is not seen
# Of each type the least that a power is taken of, and up to which number every whole one is exact.
LEAST = {torch.float32: -80.0, torch.float64: -700.0}
EXACT = {torch.float32: 2**24, torch.float64: 2**53}
# Up to which score no maximum is needed: e^-60 times a value is far from where numbers end.
FLAT = 30.0


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
        and not torch.is_autocast_enabled("cpu")
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
        value = inputs[1]
        out = value.new_empty(value.flatten(0, 1).shape)
        kept = [_forward(_Rounds(tokens, heads), keeps, out[heads]) for heads in tokens.groups()]
        if tokens.hidden is not None:
            out.masked_fill_(tokens.hidden.unsqueeze(-1), 0.0)
        *tensors, ctx.options = inputs
        out = out.view_as(value)
        if keeps:
            flat = [t for weights in kept for t in (*weights.powers, weights.shares, weights.alone)]
            ctx.save_for_backward(*tensors, out, *flat)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query_key, value, order, labels, key_mask, out, *flat = ctx.saved_tensors
        tokens = _Tokens(query_key, value, order, labels, key_mask, ctx.options)
        lost = (grad * out).sum(-1).flatten(0, 1)
        grad = grad.flatten(0, 1)
        if tokens.hidden is not None:
            grad = grad.masked_fill(tokens.hidden.unsqueeze(-1), 0.0)
        by_query_key, by_value = torch.empty_like(tokens.query_key), torch.empty_like(grad)
        each = order.shape[2] + 2
        with no_autocast("cpu"):  # wherever the backward pass is called from
            for k, heads in enumerate(tokens.groups()):
                *powers, parts, alone = flat[k * each : (k + 1) * each]
                rounds, weights = _Rounds(tokens, heads), _Weights(powers, parts, alone)
                by_query, by_key, by_value[heads] = _backward(rounds, weights, grad[heads], lost[heads])
                torch.add(by_query, tokens.through_unit(by_key, heads), out=by_query_key[heads])
        return by_query_key.view(query_key.shape), by_value.view(value.shape), None, None, None, None


class _Memory:
    """Memory that is written over for the next heads: a process is given new memory page by page."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Of that shape, where what had the name before was."""
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = like.new_empty(size)
        return self.held[name][:size].view(shape)


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
        self.memory = _Memory()
        self.table = torch.cat([query_key, value], -1).flatten(0, 1)
        self.length, self.dim = query_key.shape[2:]
        self.query_key = self.table[..., : self.dim]
        self.order, self.here = order.flatten(0, 1), taking_part(order, key_mask).flatten(0, 1)
        self.labels = numbered(labels).flatten(0, 1) if options.same_bucket else None
        self.options = options._replace(chunk_size=max(1, min(options.chunk_size, self.length)))
        self.inverse = inverse_size(self.query_key)
        self.factor = self.inverse * (options.scale * self.dim**-0.5)  # a key is a query times this
        self.hidden = None if key_mask is None else ~key_mask.repeat_interleave(query_key.shape[1], 0)

    def groups(self) -> Iterator[slice]:
        """A few heads at a time: a third is gained by scores that stay in a cache."""
        heads = len(self.table)
        at_once = min(heads, heads_at_once(self.length, self.options))
        for first in range(0, heads, at_once):
            yield slice(first, min(first + at_once, heads))

    def highest(self, heads: slice) -> Tensor:
        """What no score of a query is above, (G, L)."""
        return self.inverse[heads].squeeze(-1).reciprocal() * (abs(self.options.scale) * self.dim**0.5)

    def through_unit(self, by_key: Tensor, heads: slice) -> Tensor:
        """The gradient of the query-keys, given that of the keys, in which it is written."""
        query = self.query_key[heads]
        along = (query * by_key).sum(-1, keepdim=True)
        along *= self.inverse[heads].square() / self.dim
        return by_key.addcmul_(query, along, value=-1).mul_(self.factor[heads])


class _Weights(NamedTuple):
    """What the backward pass of some heads is given."""

    powers: Sequence[Tensor]  # of each round, (G n, c, w)
    shares: Tensor  # (G, L, R)
    alone: Tensor  # (G, L) of bool


class _Rounds:
    """What the R rounds of G heads have in common; n chunks of c tokens, each of which sees w keys.

    A round has E places: its own, and those that stand before and behind it.
    """

    def __init__(self, tokens: _Tokens, heads: slice) -> None:
        self.options, self.length, self.dim = tokens.options, tokens.length, tokens.dim
        self.memory = tokens.memory
        self.table = tokens.table[heads].flatten(0, 1)  # a row for each token, its query and its value
        self.factor = tokens.factor[heads].flatten()
        self.highest = tokens.highest(heads)
        real = self.highest if tokens.hidden is None else self.highest.masked_fill(tokens.hidden[heads], 0.0)
        self.is_flat = bool(real.max() <= FLAT)  # to the last bit, what is hidden has no influence
        order = tokens.order[heads]
        self.groups, self.n_rounds, _ = order.shape
        self.group = torch.arange(self.groups).view(-1, 1, 1)
        self.places = inverse(order)  # (G, R, L)
        self.size = self.options.chunk_size
        self.width = self.size * (self.options.look_back + 1 + self.options.look_ahead)
        self.count = math.ceil(self.length / self.size)
        self.tokens = self.around(tokens.here[heads], filler=self.length)  # (G, R, E)
        # Where they are in the table: nobody is anybody.
        self.rows = self.tokens.clamp_max(self.length - 1).add_(self.length * self.group)
        self.labels = None if tokens.labels is None else self.around(tokens.labels[heads], filler=-1)

    def empty(self, name: str, places: int, width: int) -> Tensor:
        """For rows of that width at so many places of each chunk of every round."""
        shape = self.n_rounds, self.groups * self.count, places, width
        return self.memory.empty(name, self.table, *shape)

    def around(self, x: Tensor, filler: int) -> Tensor:
        """Of (G, R, L) each round, and what stands before and behind it: (G, R, E)."""
        size, back, ahead = self.size, self.options.look_back, self.options.look_ahead
        short = self.count * size - self.length
        if not self.options.circular:
            return F.pad(x, (back * size, ahead * size + short), value=filler)
        ring = F.pad(x, (0, short), value=filler).view(self.groups, -1, size)
        chunks = self.count * torch.arange(self.n_rounds).view(-1, 1)
        chunks = (chunks + torch.arange(-back, self.count + ahead)) % ring.shape[1]
        return ring[:, chunks].flatten(2)

    def own(self, x: Tensor) -> Tensor:
        """Of (G, R, E) the rounds' own: (R, G n, c)."""
        first = self.options.look_back * self.size
        mine = x[:, :, first : first + self.count * self.size].transpose(0, 1)
        return mine.reshape(self.n_rounds, -1, self.size)

    def beside(self, x: Tensor) -> Tensor:
        """Of (G, R, E) what each chunk sees: (R, G n, w)."""
        return x.unfold(2, self.width, self.size).transpose(0, 1).flatten(1, 2)

    def parts(self, r: int) -> tuple[Tensor, Tensor]:
        """The queries and values of a round, each (G, E, ...)."""
        rows = self.rows[:, r]
        both = self.table.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return both[..., : self.dim], both[..., self.dim :]

    def chunks(self, x: Tensor) -> Tensor:
        """Of (G, E, ...) the round's own: (G n, c, ...)."""
        first = self.options.look_back * self.size
        mine = x[:, first : first + self.count * self.size]
        return mine.unflatten(1, (self.count, self.size)).flatten(0, 1)

    def windows(self, x: Tensor) -> Tensor:
        """Of (G, E, ...) what each chunk sees: (G n, w, ...)."""
        return x.unfold(1, self.width, self.size).movedim(-1, 2).flatten(0, 1)

    def seen(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each round 1 for each key that a query sees, else 0, (G n, c, w), and memory for as many."""
        shape = self.groups * self.count, self.size, self.width
        seen, more = (self.memory.empty(name, self.table, *shape) for name in ("seen", "more"))
        of_tokens, of_labels = self._numbers(self.tokens), self._numbers(self.labels)
        for r in range(self.n_rounds):
            own, other = of_tokens[r]
            if self.options.is_causal:
                torch.lt(other, own, out=seen)
            else:
                torch.ne(other, own, out=seen)
                seen.mul_(torch.ne(other, self.length, out=torch.empty_like(other)))
            if of_labels:
                own, other = of_labels[r]
                seen.mul_(torch.eq(own, other, out=more))
            yield seen, more

    def _numbers(self, x: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Of (G, R, E) the queries' and the keys' for each round, as numbers to compare."""
        if x is None:
            return []
        x = x.to(self.table.dtype)
        return list(zip(self.own(x).unsqueeze(-1), self.beside(x).unsqueeze(-2), strict=True))

    def of_queries(self) -> Tensor:
        """Which rows of (R, G n, c) are of each token: (G L, R)."""
        first = self.groups * torch.arange(self.n_rounds).view(-1, 1) + self.group
        return (self.places + self.count * self.size * first).transpose(1, 2).flatten(0, 1)

    def of_keys(self) -> tuple[Tensor, int | None]:
        """Which rows of (R, G n, w) are of each token, (G L, R (w / c)), and which is of none."""
        n, size, back = self.count, self.size, self.options.look_back
        steps = torch.arange(self.width // size)
        chunk = self.places // size
        inside = (self.places - chunk * size).unsqueeze(-1) + size * steps
        # The chunk in whose window the token is a step's, among those of all rounds.
        first = (n * torch.arange(self.n_rounds)).view(-1, 1, 1)
        of = first + (chunk.unsqueeze(-1) + back - steps)
        nobody = None
        if self.options.circular:
            of %= self.n_rounds * n
        elif len(steps) > 1:  # then something stands before the first token, or behind the last
            nobody = 0 if back else self.n_rounds * self.groups * n * self.width - 1
        rows = of + (of // n * (self.groups - 1) + self.group.unsqueeze(-1)) * n
        rows = rows * self.width + inside
        if nobody is not None:
            rows.masked_fill_((of < first) | (of >= first + n), nobody)
        return rows.transpose(1, 2).flatten(0, 1).flatten(1), nobody


def _forward(rounds: _Rounds, keeps: bool, out: Tensor) -> _Weights:
    """Writes the output of some heads."""
    highest = -rounds.own(rounds.highest.flatten()[rounds.rows]).unsqueeze(-1)
    factor = rounds.factor[rounds.rows]
    of_keys = rounds.beside(factor).unsqueeze(-2)
    peaks: list[Tensor] = []
    sums: list[Tensor] = []
    kept: list[Tensor] = []
    given = rounds.empty("given", rounds.size, out.shape[2])
    for r, (seen, hidden) in enumerate(rounds.seen()):
        query, value = rounds.parts(r)
        key = query if rounds.is_flat else query * factor[:, r].unsqueeze(-1)
        scores = torch.bmm(rounds.chunks(query), rounds.windows(key).transpose(1, 2))
        if rounds.is_flat:
            torch.addcmul(highest[r], scores, of_keys[r], out=scores)
        else:
            scores.add_(torch.sub(1, seen, out=hidden), alpha=-HIDDEN)
            peak = scores.amax(-1, keepdim=True)
            scores.sub_(peak).clamp_(min=LEAST[scores.dtype])
            peaks.append(peak.view(rounds.groups, -1).gather(1, rounds.places[:, r]))
        powers = scores.exp_().mul_(seen)
        sums.append(powers.sum(-1).view(rounds.groups, -1).gather(1, rounds.places[:, r]))
        torch.bmm(powers, rounds.windows(value), out=given[r])
        if keeps:
            kept.append(powers)
    parts, alone = shares(peaks or [torch.zeros_like(total) for total in sums], sums)
    weights = torch.stack(parts, -1)
    found = _bags(given, rounds.of_queries(), weights=weights.flatten(0, 1))
    (at,) = alone.flatten().nonzero(as_tuple=True)
    found[at] = rounds.table[at, rounds.dim :]
    out.copy_(found.view_as(out))
    return _Weights(kept, weights, alone)


def _backward(
    rounds: _Rounds, weights: _Weights, grad: Tensor, lost: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values of some heads, each (G, L, ...)."""
    dim, shape = rounds.dim, grad.shape
    grad, lost = grad.flatten(0, 1), lost.flatten()
    # What comes to no token has no gradient: its share is the last, which is zero.
    share = F.pad(weights.shares.transpose(1, 2), (0, 1)).gather(2, rounds.tokens)
    losing = rounds.own(lost[rounds.rows] * share).unsqueeze(-1)
    share, mine = rounds.own(share).unsqueeze(-1), rounds.own(rounds.rows)
    factor = rounds.factor[rounds.rows].unsqueeze(-1)
    by_query = rounds.empty("by_query", rounds.size, dim)
    by_key = rounds.empty("by_key", rounds.width, dim)
    by_value = rounds.empty("by_value", rounds.width, grad.shape[1])
    for r, powers in enumerate(weights.powers):
        query, value = rounds.parts(r)
        given = grad.index_select(0, mine[r].flatten()).unflatten(0, mine[r].shape).mul_(share[r])
        torch.bmm(powers.transpose(1, 2), given, out=by_value[r])
        by_score = torch.bmm(given, rounds.windows(value).transpose(1, 2)).sub_(losing[r]).mul_(powers)
        torch.bmm(by_score, rounds.windows(query * factor[:, r]), out=by_query[r])
        torch.bmm(by_score.transpose(1, 2), rounds.chunks(query), out=by_key[r])
    of_keys, nobody = rounds.of_keys()
    queries = _bags(by_query, rounds.of_queries())
    keys, values = (_bags(x, of_keys, nobody=nobody) for x in (by_key, by_value))
    (at,) = weights.alone.flatten().nonzero(as_tuple=True)
    values[at] += grad[at]
    return queries.view(*shape[:2], -1), keys.view(*shape[:2], -1), values.view(shape)


def _bags(x: Tensor, rows: Tensor, *, weights: Tensor | None = None, nobody: int | None = None) -> Tensor:
    """Of (..., D) the sums of bags of rows, (N, D); `nobody` is no row."""
    return F.embedding_bag(
        rows, x.view(-1, x.shape[-1]), mode="sum", per_sample_weights=weights, padding_idx=nobody
    )
