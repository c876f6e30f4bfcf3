"""LSH attention, round by round, in PyTorch: who sees whom, and with which weights.

The definition of `lamina.kernels.lsh_attention` walks over the rounds, so that without gradients it holds the
scores of one at a time, and never has a length by length matrix.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Which of the weights are left of a round, or, given None, of those of tokens that see no other.
Dropout = Callable[[Tensor, int | None], Tensor]


class Options(NamedTuple):
    """What the operation is given besides tensors; `lsh_attention` describes it."""

    num_buckets: int
    chunk_size: int
    look_back: int = 1
    look_ahead: int = 0
    circular: bool = False
    same_bucket: bool = False
    deduplicate: bool = False
    is_causal: bool = False
    scale: float = 1.0


class Round(NamedTuple):
    """What one round of n chunks of c tokens, each of which sees w keys, contributes."""

    queries: Tensor  # (B, H, n, c), the token at each place
    keys: Tensor  # (B, H, n, w), the tokens that it sees
    places: Tensor  # (B, H, L), where each token stands in the round
    powers: Tensor  # (B, H, n, c, w), exp(score - peak), 0 where a key takes no part
    peaks: Tensor  # (B, H, L), so that no row of powers sums to more than 1
    sums: Tensor  # (B, H, L), of the powers of each token


def sort_by_bucket(buckets: Tensor, key_mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """The tokens of each round by bucket, then by position, and their buckets: each (B, H, R, L).

    Those that take no part come last, in a bucket of their own. Where one chunk holds every token, everything
    sees everything, and every round is the first, which is the only one given.
    """
    if buckets.shape[3] <= options.chunk_size and not options.same_bucket:
        buckets = buckets[:, :, :1]
    if key_mask is not None:
        buckets = buckets.masked_fill(~key_mask[:, None, None, :], options.num_buckets)
    if buckets.is_cuda and options.num_buckets <= torch.iinfo(torch.int16).max:
        buckets = buckets.to(torch.int16)  # a GPU sorts by radix: its passes go by the width of a key
    labels, order = torch.sort(buckets, dim=-1, stable=True)
    return order, labels


def attend(
    query_key: Tensor,
    value: Tensor,
    order: Tensor,
    labels: Tensor,
    key_mask: Tensor | None,
    options: Options,
    dropped: Dropout | None = None,
) -> Tensor:
    """The output, (B, H, L, Dv), given what `sort_by_bucket` gives."""
    heads, peaks, sums = [], [], []
    for r, seen in enumerate(rounds(query_key, order, labels, key_mask, options)):
        kept = seen.powers if dropped is None else dropped(seen.powers, r)
        out = kept.to(value.dtype) @ rows_at(value, seen.keys)
        heads.append(rows_at(out.flatten(2, 3), seen.places))
        peaks.append(seen.peaks)
        sums.append(seen.sums)
    parts, alone = shares(peaks, sums)
    itself = alone.to(value.dtype)
    itself = itself if dropped is None else dropped(itself, None)
    combined = value * itself.unsqueeze(-1)
    for head, share in zip(heads, parts, strict=True):
        combined = combined + head * share.unsqueeze(-1)
    if key_mask is not None:
        combined = combined.masked_fill(~key_mask[:, None, :, None], 0.0)
    return combined.to(value.dtype)


def rounds(
    query_key: Tensor, order: Tensor, labels: Tensor, key_mask: Tensor | None, options: Options
) -> Iterator[Round]:
    """What the rounds contribute, one at a time: without gradients only one holds its scores."""
    n_rounds, length = order.shape[2:]
    if length <= options.chunk_size:
        options = options._replace(chunk_size=max(length, 1))
    size = options.chunk_size
    count = (length + size - 1) // size
    places = inverse(order)
    tokens = chunked(taking_part(order, key_mask), count, size, filler=length)
    seen = beside(tokens, options).masked_fill(~in_reach(n_rounds, count, options, order.device), length)
    ids = None
    if options.same_bucket:
        labels = numbered(labels)
        ids = labels.gather(-1, places)
        labels = chunked(labels, count, size, filler=-1)
        around = beside(labels, options)
    at, others = tokens.int().unsqueeze(-1), seen.int().unsqueeze(-2)
    queries_of, keys_of = tokens.clamp_max(length - 1), seen.clamp_max(length - 1)
    unit_keys = unit(query_key, options.scale)
    for r in range(n_rounds):
        mine = slice(r * count, (r + 1) * count)
        own, other = at[:, :, mine], others[:, :, mine]
        hidden = other >= own if options.is_causal else (other == own) | (other == length)
        if options.same_bucket:
            hidden = hidden | (labels[:, :, mine, :, None] != around[:, :, mine, None, :])
        queries, keys = queries_of[:, :, mine], keys_of[:, :, mine]
        scores = rows_at(query_key, queries) @ rows_at(unit_keys, keys).transpose(-2, -1)
        scores = scores.to(torch.promote_types(query_key.dtype, torch.float32))
        if options.deduplicate:
            times = _meetings(places, ids, queries, keys, count, options).clamp_min(1)
            scores = scores - times.to(scores.dtype).log()
        scores = scores.masked_fill_(hidden, -torch.inf)
        # A constant, as the result does not depend on it: no gradient needs to follow the maximum.
        peaks = scores.detach().amax(-1).clamp_min(torch.finfo(scores.dtype).min / 2)
        peaks = peaks + math.log(keys.shape[-1])
        powers = scores.sub_(peaks.unsqueeze(-1)).exp_()
        where = places[:, :, r]
        peaks, sums = (t.flatten(2).gather(-1, where) for t in (peaks, powers.sum(-1)))
        yield Round(queries, keys, where, powers, peaks, sums)


def shares(peaks: Sequence[Tensor], sums: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """What to multiply each round's powers with, each (B, H, L), and which tokens see no other in any."""
    peak, total = torch.stack(list(peaks)), torch.stack(list(sums))
    factors = (peak - peak.amax(0)).exp()
    total = (factors * total).sum(0)
    alone = total == 0
    return (factors / total.masked_fill(alone, 1.0)).unbind(0), alone


def taking_part(order: Tensor, key_mask: Tensor | None) -> Tensor:
    """The order, (B, H, R, L), with `L` in the place of each token that takes no part: those stand last."""
    if key_mask is None:
        return order
    length = order.shape[3]
    real = key_mask.sum(-1)[:, None, None, None]
    return order.masked_fill(torch.arange(length, device=order.device) >= real, length)


def numbered(labels: Tensor) -> Tensor:
    """Buckets (B, H, R, L), by numbers of which none is of two rounds: a bucket of another is another one."""
    n_rounds = labels.shape[2]
    return labels.long() * n_rounds + torch.arange(n_rounds, device=labels.device).unsqueeze(-1)


def inverse(order: Tensor) -> Tensor:
    """Where in each round each token stands."""
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return positions.scatter(-1, order, positions)


def unit(query_key: Tensor, scale: float) -> Tensor:
    """The keys: unit vectors, times the scale. In float32, as 1e-6 is nothing in float16."""
    wide = query_key.to(torch.promote_types(query_key.dtype, torch.float32))
    return (wide * (inverse_size(wide) * (scale * query_key.shape[-1] ** -0.5))).to(query_key.dtype)


def inverse_size(x: Tensor) -> Tensor:
    """√D / |x|, of the length that never is zero."""
    return (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def chunked(x: Tensor, count: int, size: int, filler: int) -> Tensor:
    """(B, H, R, L) as (B, H, R n, c), all rounds' chunks, the last chunk of each filled up."""
    filled = F.pad(x, (0, count * size - x.shape[3]), value=filler)
    return filled.view(*x.shape[:2], x.shape[2] * count, size)


def beside(x: Tensor, options: Options) -> Tensor:
    """What the chunks beside each chunk, and itself, hold: (B, H, R n, w), all rounds in a ring."""
    steps = range(-options.look_back, options.look_ahead + 1)
    return torch.cat([x.roll(-step, dims=2) for step in steps], dim=-1)


def in_reach(n_rounds: int, count: int, options: Options, device: torch.device) -> Tensor:
    """Which places of `beside` a chunk may see: (R n, w)."""
    steps = torch.arange(-options.look_back, options.look_ahead + 1, device=device)
    if options.circular:  # a ring shorter than the reach would come round to the same chunk twice
        reach = (steps < n_rounds * count - options.look_back).expand(n_rounds * count, -1)
    else:
        chunk = torch.arange(count, device=device).unsqueeze(-1) + steps
        reach = ((chunk >= 0) & (chunk < count)).repeat(n_rounds, 1)
    return reach.unsqueeze(-1).expand(-1, -1, options.chunk_size).flatten(1)


def _meetings(
    places: Tensor, ids: Tensor | None, queries: Tensor, keys: Tensor, count: int, options: Options
) -> Tensor:
    """In how many places each query sees each key, over all rounds: (B, H, n, c, w) of float32."""
    n_rounds = places.shape[2]
    chunk = places // options.chunk_size + count * torch.arange(n_rounds, device=places.device).unsqueeze(-1)

    def of(x: Tensor, r: int, tokens: Tensor) -> Tensor:
        return x[:, :, r].gather(-1, tokens.flatten(2)).view(tokens.shape)

    total = torch.zeros((), device=places.device)
    for a in range(n_rounds):
        # Only in a ring does a token of one round see a token of another.
        for b in range(n_rounds) if options.circular else (a,):
            distance = (
                of(chunk, b, keys).unsqueeze(-2) - of(chunk, a, queries).unsqueeze(-1) + options.look_back
            )
            if options.circular:
                distance = distance % (n_rounds * count)
            meet = (distance >= 0) & (distance <= options.look_back + options.look_ahead)
            if ids is not None:
                meet = meet & (of(ids, b, keys).unsqueeze(-2) == of(ids, a, queries).unsqueeze(-1))
            total = total + meet
    return total


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x[b, h, index[b, h, ...]]: an embedding's backward pass adds rows up faster than a gather's."""
    batch, heads, length = x.shape[:3]
    first = length * torch.arange(batch * heads, device=x.device).view(batch, heads, *[1] * (index.ndim - 2))
    return F.embedding(index + first, x.flatten(0, 2))
