"""Attention among the tokens that hashing puts side by side (Reformer: Kitaev et al., 2020, section 2).

Each round sorts the tokens by their bucket, stably, and cuts them into chunks; a token sees its own chunk and
the chunks beside it. With V(i) the pairs of a round and of another token that token i sees in that round,

    out[i] = sum_{(r, j) in V(i)} softmax_{(r, j)}( scale * x[i] . x[j] / |x[j]| ) value[j]

and out[i] = value[i] where V(i) is empty: a token attends to itself only where it sees no other. This is the
limit of the original's -1e5 on the diagonal, taken exactly. The length |x| is sqrt(x . x + 1e-6 D), as there.

On a GPU kernels take the tokens from where they stand, write each round's outputs back to where they stand,
and compute scores again for the gradients. A CPU takes a few heads at a time in chunks (`_lsh_chunks.py`), or
by the definition (`_lsh_rounds.py`) with `dropout` or `deduplicate`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import as_autocast
from ._lsh_chunks import attend_in_chunks, has_chunks, heads_at_once
from ._lsh_rounds import Options, attend, inverse, rounds, shares, sort_by_bucket
from ._second_order import twice_differentiable
from .backend import Refusals, choose, forced_backend, operation, triton_refusal
from .checks import check_dropout, check_key_mask


def _refusals(query_key: Tensor, value: Tensor, buckets: Tensor, **options: Any) -> Refusals:
    """By shapes, dtypes and devices alone: what a tensor holds, a GPU would have to be waited for."""
    refusals: Refusals = {}
    if not query_key.is_cpu:
        refusals["torch"] = "it takes a few heads at a time, for a CPU's cache"
    elif torch.compiler.is_compiling():
        refusals["torch"] = "a graph would hold each few heads on their own"
    widest = max(query_key.shape[-1], value.shape[-1])
    if (reason := triton_refusal(query_key, value, buckets)) is not None:
        refusals["triton"] = reason
    elif query_key.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        refusals["triton"] = f"the kernel has no {query_key.dtype}"
    elif widest > 256:
        refusals["triton"] = f"heads are at most 256 wide in the kernel, these {widest}"
    elif forced_backend() is None and query_key.dtype is torch.float64:
        refusals["triton"] = "of float64 the kernel is made for tests, in small tiles"
    elif forced_backend() is None and query_key.dtype is torch.float32 and widest > 128:
        refusals["triton"] = "float32 heads wider than 128 overflow the registers in the kernel"
    return refusals


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

    With chunks of c tokens and w = c (look_back + 1 + look_ahead): time O(R L w D), and a sort. For a
    backward pass the definition keeps O(R L (w + D)), the kernels O(R L + L D), and O(R L D) for as long as a
    pass runs. Without one the definition needs O(L w + R L D). Twice differentiable, the buckets taken as
    given, every path through the definition; a forward-mode derivative takes the definition. Every path is
    deterministic: of a token's gradients in a round all come from one kernel's program, without atomics.

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
    options = Options(
        num_buckets, chunk_size, look_back, look_ahead, circular, same_bucket, deduplicate, is_causal, scale
    )
    _check(query_key, value, buckets, key_mask, dropout, options)
    path = choose("lsh_attention", _refusals(query_key, value, buckets))
    if path == "triton":
        return _triton_path(query_key, value, buckets, key_mask, dropout, options)
    if path == "torch":
        return _cpu_path(query_key, value, buckets, key_mask, dropout, options)
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
    given, key_mask = Options(**options), _whole(key_mask, value)
    order, labels = sort_by_bucket(buckets, key_mask, given)
    dropped = (lambda weights, _: F.dropout(weights, dropout)) if dropout else None
    return attend(query_key, value, order, labels, key_mask, given, dropped)


def lsh_attention_weights(
    query_key: Tensor, buckets: Tensor, *, key_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """The weights of `lsh_attention` over all rounds, dense: (B, H, L, L). A row sums to one, or to zero."""
    given = Options(**options)
    _check(query_key, query_key, buckets, key_mask, 0.0, given)
    key_mask = _whole(key_mask, query_key)
    every = list(rounds(query_key, *sort_by_bucket(buckets, key_mask, given), key_mask, given))
    parts, alone = shares([seen.peaks for seen in every], [seen.sums for seen in every])
    if key_mask is not None:
        hidden = ~key_mask.unsqueeze(1)
        parts, alone = tuple(share.masked_fill(hidden, 0.0) for share in parts), alone & ~hidden
    length = query_key.shape[2]
    dense = torch.diag_embed(alone.to(parts[0].dtype)).flatten(2)
    for seen, share in zip(every, parts, strict=True):
        # Places behind the end of a round have no token, and keep a share of zero.
        sorted_share = torch.zeros_like(seen.queries, dtype=share.dtype).flatten(2)
        sorted_share = sorted_share.scatter(-1, seen.places, share).view(*seen.queries.shape, 1)
        at = seen.queries.unsqueeze(-1) * length + seen.keys.unsqueeze(-2)
        dense = dense.scatter_add(-1, at.flatten(2), (seen.powers * sorted_share).flatten(2))
    return dense.view(*query_key.shape[:2], length, length).to(query_key.dtype)


def _cpu_path(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    key_mask: Tensor | None,
    dropout: float,
    options: Options,
) -> Tensor:
    """A few heads at a time: in chunks with a backward pass of their own, or else by the definition."""
    whole = _whole(key_mask, value)
    order, labels = sort_by_bucket(buckets, whole, options)
    if has_chunks(query_key, value, order, dropout, options):
        return twice_differentiable(
            lambda q, v: attend_in_chunks(q, v, order, labels, whole, options),
            lambda q, v: lsh_attention_reference(q, v, buckets, key_mask=key_mask, **options._asdict()),
            query_key,
            value,
            node="_Attend",
        )
    batch, heads, length, _ = query_key.shape
    at_once = heads_at_once(length, options)
    n_heads = max(1, min(heads, at_once))
    n_batches = max(1, min(batch, at_once // n_heads))
    dropped = (lambda weights, _: F.dropout(weights, dropout)) if dropout else None
    outputs = []
    for b in range(0, max(batch, 1), n_batches):
        rows = slice(b, b + n_batches)
        of_rows = []
        for h in range(0, max(heads, 1), n_heads):
            at = rows, slice(h, h + n_heads)
            mask = None if whole is None else whole[rows]
            of_rows.append(attend(query_key[at], value[at], order[at], labels[at], mask, options, dropped))
        outputs.append(of_rows[0] if len(of_rows) == 1 else torch.cat(of_rows, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _triton_path(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    key_mask: Tensor | None,
    dropout: float,
    options: Options,
) -> Tensor:
    from .fused.lsh_attention import lsh_attention as fused

    key_mask = _whole(key_mask, value)
    order, labels = sort_by_bucket(buckets, key_mask, options)
    n_rounds, length = order.shape[2:]
    size, back, ahead = options.chunk_size, options.look_back, options.look_ahead
    count = (length + size - 1) // size
    if options.circular and n_rounds * count <= back + ahead:
        # A ring shorter than the reach: each of its chunks once, wherever one begins to count.
        back = min(back, max(n_rounds * count, 1) - 1)
        ahead = max(n_rounds * count, 1) - 1 - back
    places = inverse(order).to(torch.int32) if options.deduplicate else None
    seed = torch.randint(2**62, (1,), device=value.device) if dropout else None
    out = fused(
        *as_autocast(query_key, value),
        order,
        labels if options.same_bucket else None,
        places,
        key_mask,
        size,
        back,
        ahead,
        options.circular,
        options.is_causal,
        options.scale,
        dropout,
        seed,
    )[0]
    return out.to(value.dtype)


def _whole(key_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Of shape (B, L)."""
    return None if key_mask is None else key_mask.expand(tokens.shape[0], tokens.shape[2])


def _check(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    key_mask: Tensor | None,
    dropout: float,
    options: Options,
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
