"""Attention among the tokens that hashing puts side by side (Reformer: Kitaev et al., 2020, section 2).

Each round sorts the tokens by their bucket, stably, and cuts them into chunks; a token sees its own chunk and
the chunks beside it. With V(i) the pairs of a round and of another token that token i sees in that round,

    out[i] = sum_{(r, j) in V(i)} softmax_{(r, j)}( scale * x[i] . x[j] / |x[j]| ) value[j]

and out[i] = value[i] where V(i) is empty: a token attends to itself only where it sees no other. This is the
limit of the original's -1e5 on the diagonal, taken exactly. The length |x| is sqrt(x . x + 1e-6 D), as there.

No kernel of its own yet: the definition walks over the rounds, so that it holds the scores of one at a time,
and never has a length by length matrix.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Refusals, choose, operation
from .checks import check_dropout, check_key_mask


def _refusals(query_key: Tensor, value: Tensor, buckets: Tensor, **options: Any) -> Refusals:
    return {
        "triton": "there is no fused kernel of this operation yet",
        "torch": "PyTorch has no routine for it: the definition is its fastest expression",
    }


@operation(_refusals)
def lsh_attention(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    *,
    num_buckets: int,
    chunk_size: int,
    look_back: int = 1,
    look_ahead: int = 0,
    circular: bool = False,
    same_bucket: bool = False,
    deduplicate: bool = False,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Each token's mean of the values that its rounds of hashing let it see, by softmax over all rounds.

    With chunks of c tokens and w = c (look_back + 1 + look_ahead): time O(R L w D), and a sort; memory
    O(R L (w + D)) for the backward pass, O(L w + R L D) without one. Twice differentiable, the buckets taken
    as given; deterministic.

    Args:
        query_key: (B, H, L, D), at once the queries and, brought to unit length, the keys.
        value: (B, H, L, Dv).
        buckets: (B, H, R, L) of int64 in [0, num_buckets), as `lsh_buckets` gives them, one row a round.
        num_buckets: how many buckets there are in a round.
        chunk_size: c. Where L is no multiple, the last chunk of a round is shorter.
        look_back: how many chunks before its own a token sees.
        look_ahead: how many chunks behind its own.
        circular: the chunks of all rounds form one ring, as in the original: the first chunk of a round looks
            back at the last of the round before. Otherwise it has nothing before it.
        same_bucket: a token sees only tokens of its own bucket, as in the paper's equation 4.
        deduplicate: a pair that meets in several rounds counts once, as in the paper's appendix A: its score
            is lowered by the log of how many times it meets.
        key_mask: bool, (B, L), False where a place takes no part: no token sees it, it gives zero, and as it
            is sorted behind all others, no other token's chunk depends on it.
        is_causal: a token sees only tokens that stand before it.
        scale: of the scores; the original has no 1 / sqrt(D) here, as its keys have unit length.
        dropout: probability with which a weight is dropped; drawn whenever it is not 0, so pass 0 to
            evaluate.

    Returns:
        (B, H, L, Dv).

    Raises:
        ValueError: a shape, dtype or size does not fit, or dropout is not in [0, 1).

    Reference:
        Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020. Section 2, appendix A.

    Example:
        >>> query_key, value = torch.randn(2, 3, 100, 8), torch.randn(2, 3, 100, 8)
        >>> buckets = lsh_buckets(query_key, torch.randn(3, 8, 4, 5), num_buckets=10)  # of four rounds
        >>> lsh_attention(query_key, value, buckets, num_buckets=10, chunk_size=16).shape
        torch.Size([2, 3, 100, 8])
    """
    options = _Options(
        num_buckets, chunk_size, look_back, look_ahead, circular, same_bucket, deduplicate, is_causal, scale
    )
    _check(query_key, value, buckets, key_mask, dropout, options)
    choose("lsh_attention", _refusals(query_key, value, buckets))  # to say why a forced path cannot run
    return lsh_attention_reference(
        query_key, value, buckets, key_mask=key_mask, dropout=dropout, **options._asdict()
    )


def lsh_attention_reference(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    *,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> Tensor:
    """The definition, in PyTorch: what every other path is tested against. Arguments as of the operation."""
    heads, peaks, sums = [], [], []
    for seen in _rounds(query_key, buckets, key_mask, _Options(**options)):
        kept = F.dropout(seen.powers, dropout) if dropout else seen.powers
        out = kept.to(value.dtype) @ _rows(value, seen.keys)
        heads.append(_rows(out.flatten(2, 3), seen.places))
        peaks.append(seen.peaks)
        sums.append(seen.sums)
    shares, alone = _shares(peaks, sums)
    itself = F.dropout(alone.to(value.dtype), dropout) if dropout else alone
    combined = value * itself.unsqueeze(-1)
    for head, share in zip(heads, shares, strict=True):
        combined = combined + head * share.unsqueeze(-1)
    if key_mask is not None:
        combined = combined.masked_fill(~key_mask[:, None, :, None], 0.0)
    return combined.to(value.dtype)


def lsh_attention_weights(
    query_key: Tensor, buckets: Tensor, *, key_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """The weights of `lsh_attention` over all rounds, dense: (B, H, L, L). A row sums to one, or to zero."""
    _check(query_key, query_key, buckets, key_mask, 0.0, _Options(**options))
    every = list(_rounds(query_key, buckets, key_mask, _Options(**options)))
    shares, alone = _shares([seen.peaks for seen in every], [seen.sums for seen in every])
    if key_mask is not None:
        hidden = ~key_mask.unsqueeze(1)
        shares, alone = tuple(share.masked_fill(hidden, 0.0) for share in shares), alone & ~hidden
    length = query_key.shape[2]
    dense = torch.diag_embed(alone.to(shares[0].dtype)).flatten(2)
    for seen, share in zip(every, shares, strict=True):
        # Places behind the end of a round have no token, and keep a share of zero.
        sorted_share = torch.zeros_like(seen.queries, dtype=share.dtype).flatten(2)
        sorted_share = sorted_share.scatter(-1, seen.places, share).view(*seen.queries.shape, 1)
        at = seen.queries.unsqueeze(-1) * length + seen.keys.unsqueeze(-2)
        dense = dense.scatter_add(-1, at.flatten(2), (seen.powers * sorted_share).flatten(2))
    return dense.view(*query_key.shape[:2], length, length).to(query_key.dtype)


class _Options(NamedTuple):
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


class _Round(NamedTuple):
    """What one round of n chunks of c tokens, each of which sees w keys, contributes."""

    queries: Tensor  # (B, H, n, c), the token at each place
    keys: Tensor  # (B, H, n, w), the tokens that it sees
    places: Tensor  # (B, H, L), where each token stands in the round
    powers: Tensor  # (B, H, n, c, w), exp(score - peak), 0 where a key takes no part
    peaks: Tensor  # (B, H, L), so that no row of powers sums to more than 1
    sums: Tensor  # (B, H, L), of the powers of each token


def _rounds(
    query_key: Tensor, buckets: Tensor, key_mask: Tensor | None, options: _Options
) -> Iterator[_Round]:
    """What the rounds contribute, one at a time: without gradients only one holds its scores."""
    length = query_key.shape[2]
    if length <= options.chunk_size:
        options = options._replace(chunk_size=max(length, 1))
        if not options.same_bucket:  # in one chunk everything sees everything, and every round is the first
            buckets = buckets[:, :, :1]
    rounds, size = buckets.shape[2], options.chunk_size
    count = (length + size - 1) // size
    order, places = _sorted(buckets, key_mask, options.num_buckets)
    here = order  # `length` stands for: nothing is here that takes part
    if key_mask is not None:
        real = key_mask.sum(-1)[:, None, None, None]
        here = order.masked_fill(torch.arange(length, device=order.device) >= real, length)
    tokens = _chunked(here, count, size, filler=length)
    seen = _beside(tokens, options).masked_fill(~_in_reach(rounds, count, options, order.device), length)
    ids = buckets + options.num_buckets * torch.arange(rounds, device=order.device).unsqueeze(-1)
    if options.same_bucket:
        labels = _chunked(ids.gather(-1, order), count, size, filler=-1)
        around = _beside(labels, options)
    at, beside = tokens.int().unsqueeze(-1), seen.int().unsqueeze(-2)
    queries_of, keys_of = tokens.clamp_max(length - 1), seen.clamp_max(length - 1)
    unit = _unit(query_key, options.scale)
    for r in range(rounds):
        mine = slice(r * count, (r + 1) * count)
        own, other = at[:, :, mine], beside[:, :, mine]
        hidden = other >= own if options.is_causal else (other == own) | (other == length)
        if options.same_bucket:
            hidden = hidden | (labels[:, :, mine, :, None] != around[:, :, mine, None, :])
        queries, keys = queries_of[:, :, mine], keys_of[:, :, mine]
        scores = _rows(query_key, queries) @ _rows(unit, keys).transpose(-2, -1)
        scores = scores.to(torch.promote_types(query_key.dtype, torch.float32))
        if options.deduplicate:
            scores = scores - _meetings(places, ids, queries, keys, count, options).clamp_min(1).log()
        scores = scores.masked_fill_(hidden, -torch.inf)
        # A constant, as the result does not depend on it: no gradient needs to follow the maximum.
        peaks = scores.detach().amax(-1).clamp_min(torch.finfo(scores.dtype).min / 2)
        peaks = peaks + math.log(keys.shape[-1])
        powers = scores.sub_(peaks.unsqueeze(-1)).exp_()
        where = places[:, :, r]
        peaks, sums = (t.flatten(2).gather(-1, where) for t in (peaks, powers.sum(-1)))
        yield _Round(queries, keys, where, powers, peaks, sums)


def _shares(peaks: Sequence[Tensor], sums: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """What to multiply each round's powers with, each (B, H, L), and which tokens see no other in any."""
    peak, total = torch.stack(list(peaks)), torch.stack(list(sums))
    factors = (peak - peak.amax(0)).exp()
    total = (factors * total).sum(0)
    alone = total == 0
    return (factors / total.masked_fill(alone, 1.0)).unbind(0), alone


def _unit(query_key: Tensor, scale: float) -> Tensor:
    """The keys: unit vectors, times the scale. In float32, as 1e-6 is nothing in float16."""
    wide = query_key.to(torch.promote_types(query_key.dtype, torch.float32))
    inverse = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return (wide * (inverse * (scale * query_key.shape[-1] ** -0.5))).to(query_key.dtype)


def _sorted(buckets: Tensor, key_mask: Tensor | None, num_buckets: int) -> tuple[Tensor, Tensor]:
    """The tokens of each round by bucket, then by position, and its inverse: where each token stands.

    Those that take no part come last, in a bucket of their own. Each is (B, H, R, L).
    """
    if key_mask is not None:
        buckets = buckets.masked_fill(~key_mask[:, None, None, :], num_buckets)
    order = torch.argsort(buckets, dim=-1, stable=True)
    positions = torch.arange(buckets.shape[-1], device=buckets.device).expand_as(order)
    return order, torch.empty_like(order).scatter_(-1, order, positions)


def _chunked(x: Tensor, count: int, size: int, filler: int) -> Tensor:
    """(B, H, R, L) as (B, H, R n, c), all rounds' chunks, the last chunk of each filled up."""
    filled = F.pad(x, (0, count * size - x.shape[3]), value=filler)
    return filled.view(*x.shape[:2], x.shape[2] * count, size)


def _beside(x: Tensor, options: _Options) -> Tensor:
    """What the chunks beside each chunk, and itself, hold: (B, H, R n, w), all rounds in a ring."""
    steps = range(-options.look_back, options.look_ahead + 1)
    return torch.cat([x.roll(-step, dims=2) for step in steps], dim=-1)


def _in_reach(rounds: int, count: int, options: _Options, device: torch.device) -> Tensor:
    """Which places of `_beside` a chunk may see: (R n, w)."""
    steps = torch.arange(-options.look_back, options.look_ahead + 1, device=device)
    if options.circular:  # a ring shorter than the reach would come round to the same chunk twice
        reach = (steps < rounds * count - options.look_back).expand(rounds * count, -1)
    else:
        chunk = torch.arange(count, device=device).unsqueeze(-1) + steps
        reach = ((chunk >= 0) & (chunk < count)).repeat(rounds, 1)
    return reach.unsqueeze(-1).expand(-1, -1, options.chunk_size).flatten(1)


def _meetings(
    places: Tensor, ids: Tensor, queries: Tensor, keys: Tensor, count: int, options: _Options
) -> Tensor:
    """In how many places each query sees each key, over all rounds: (B, H, n, c, w) of float32."""
    rounds = places.shape[2]
    chunk = places // options.chunk_size + count * torch.arange(rounds, device=places.device).unsqueeze(-1)

    def of(x: Tensor, r: int, tokens: Tensor) -> Tensor:
        return x[:, :, r].gather(-1, tokens.flatten(2)).view(tokens.shape)

    total = torch.zeros((), device=places.device)
    for a in range(rounds):
        # Only in a ring does a token of one round see a token of another.
        for b in range(rounds) if options.circular else (a,):
            distance = (
                of(chunk, b, keys).unsqueeze(-2) - of(chunk, a, queries).unsqueeze(-1) + options.look_back
            )
            if options.circular:
                distance = distance % (rounds * count)
            meet = (distance >= 0) & (distance <= options.look_back + options.look_ahead)
            if options.same_bucket:
                meet = meet & (of(ids, b, keys).unsqueeze(-2) == of(ids, a, queries).unsqueeze(-1))
            total = total + meet
    return total


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, h, index[b, h, ...]]: an embedding's backward pass adds rows up faster than a gather's."""
    batch, heads, length = x.shape[:3]
    first = length * torch.arange(batch * heads, device=x.device).view(batch, heads, *[1] * (index.ndim - 2))
    return F.embedding(index + first, x.flatten(0, 2))


def _check(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    key_mask: Tensor | None,
    dropout: float,
    options: _Options,
) -> None:
    if not (
        query_key.ndim == value.ndim == buckets.ndim == 4
        and query_key.shape[:3] == value.shape[:3] == (*buckets.shape[:2], buckets.shape[3])
        and buckets.shape[2] > 0
    ):
        raise ValueError(
            "expected query_key (B, H, L, D), value (B, H, L, Dv) and buckets (B, H, R, L), got "
            f"query_key {tuple(query_key.shape)}, value {tuple(value.shape)} and "
            f"buckets {tuple(buckets.shape)}"
        )
    if buckets.dtype != torch.int64:
        raise ValueError(f"buckets must be of int64, got {buckets.dtype}")
    if query_key.dtype != value.dtype and not torch.is_autocast_enabled(query_key.device.type):
        raise ValueError(f"query_key and value must share one dtype, got {query_key.dtype} and {value.dtype}")
    sizes = options.num_buckets, options.chunk_size
    reach = options.look_back, options.look_ahead
    if min(sizes) < 1 or min(reach) < 0:
        raise ValueError(
            "num_buckets and chunk_size must be positive, look_back and look_ahead not negative, got "
            f"num_buckets={sizes[0]}, chunk_size={sizes[1]}, look_back={reach[0]} and look_ahead={reach[1]}"
        )
    check_key_mask(key_mask, (query_key.shape[0], query_key.shape[2]), "(B, L)")
    check_dropout(dropout)
