"""Triton kernels of `lamina.kernels.lsh_attention`, forward and backward: their registration.

The tokens come sorted; no row of queries or values is. Each round's outputs, and the logarithms of its
softmaxes' mass, are written where the tokens stand, and one pass combines them. The backward pass computes
the weights again from the mass of all rounds, and gives a row for each round and token, whose sum over the
rounds is the gradient.

All operations take what `lsh_attention` takes, in its order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._lsh_rounds import Options, attend
from .._vmap import fold_into_batch
from ._lsh_backward import backward_kernel, facts_kernel
from ._lsh_forward import combine_kernel, forward_kernel, kept_kernel
from ._lsh_launch import Launch, block, parts_of, rows_of, whole_chunk
from ._saved import save, saved


@torch.library.custom_op("lamina::lsh_attention", mutates_args=())
def lsh_attention(
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
) -> tuple[Tensor, Tensor]:
    """The output (B, H, L, Dv), and the logarithm to base 2 of each softmax's mass, (B, H, L).

    Args:
        query_key: (B, H, L, D).
        value: (B, H, L, Dv).
        order: (B, H, R, L) of int64, the tokens of each round as they are sorted.
        labels: (B, H, R, L) of integers, their buckets, where a token sees only its own.
        places: (B, H, R, L) of int32, the inverse of `order`, where a pair counts once.
        key_mask: (B, L) of bool: who takes part. Those that do come first in `order`.
        chunk_size: as of the operation.
        look_back: likewise, in a ring less than all of its chunks.
        look_ahead: likewise, in a ring no more than what `look_back` leaves.
        circular: as of the operation.
        is_causal: likewise.
        scale: likewise.
        dropout: likewise.
        seed: (1,) of int64, where dropout is not 0.
    """
    call = Launch.of(
        query_key, value, order, labels, places, key_mask, chunk_size, look_back, look_ahead, circular,
        is_causal, scale, dropout, seed,
    )  # fmt: skip
    heads, length, single = value.shape[1], value.shape[2], call.ring.rounds == 1
    parts = call.by_round(value)
    masses = value.new_empty(*value.shape[:2], call.ring.rounds, length, dtype=call.wide)
    tile = call.tiles("forward")
    call.run(
        forward_kernel, tile, rows_of(call.query_key), rows_of(call.value), parts_of(parts), masses,
        ONCE=call.at_once(tile), SINGLE=single,
    )  # fmt: skip
    if single:
        return parts[:, :, 0], masses[:, :, 0]
    out, lse = _like_tokens(value), value.new_empty(value.shape[:3], dtype=call.wide)
    call.run_dense(
        combine_kernel, parts_of(parts), masses, rows_of(call.value), rows_of(out), lse, call.mask, seed,
        dropout, heads, call.ring.rounds, length,
    )  # fmt: skip
    return out, lse


@lsh_attention.register_fake
def _(query_key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if value.dtype is torch.float64 else torch.float32
    return _like_tokens(value), value.new_empty(value.shape[:3], dtype=wide)


@torch.library.custom_op("lamina::lsh_attention_backward", mutates_args=())
def lsh_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    needed: Sequence[bool],
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
) -> tuple[Tensor, Tensor]:
    """Gradients of query_key and value: of what is not `needed`, nothing to read."""
    call = Launch.of(
        query_key, value, order, labels, places, key_mask, chunk_size, look_back, look_ahead, circular,
        is_causal, scale, dropout, seed,
    )  # fmt: skip
    of_query_key, of_value = needed
    facts = lse.new_empty(*lse.shape, 4)
    call.run_dense(
        facts_kernel, rows_of(call.query_key), rows_of(out), rows_of(grad), lse, facts, value.shape[1],
        value.shape[2], SIZE=query_key.shape[3], BLOCK=block(query_key.shape[3]),
    )  # fmt: skip
    d_query_key = call.by_round(query_key) if of_query_key else None
    d_value = call.by_round(value) if of_value else None
    call.run(
        backward_kernel, call.tiles("backward"), rows_of(call.query_key), rows_of(call.value), rows_of(grad),
        facts, None if d_query_key is None else parts_of(d_query_key),
        None if d_value is None else parts_of(d_value),
    )  # fmt: skip
    return _summed(d_query_key, query_key), _summed(d_value, value)


@lsh_attention_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, needed: Sequence[bool], query_key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    of_query_key, of_value = needed
    return (
        _like_tokens(query_key) if of_query_key else query_key.new_empty(0),
        _like_tokens(value) if of_value else value.new_empty(0),
    )


@torch.library.custom_op("lamina::lsh_kept", mutates_args=())
def kept_weights(
    seed: Tensor, dropout: float, sizes: Sequence[int], chunk_size: int, look_back: int, look_ahead: int
) -> tuple[Tensor, Tensor]:
    """Which weights dropout leaves, of `sizes` B, H, R and L.

    Returns:
        (B, H, R, n, c, s, c) of bool: of a round, a chunk and a place in it, the weights of the s chunks that
        are seen and of the places in them; and (B, H, L), of the tokens that see no other.
    """
    batch, heads, rounds, length = sizes
    chunk, steps = whole_chunk(length, chunk_size), look_back + 1 + look_ahead
    count = (length + chunk - 1) // chunk
    left = torch.empty(
        (batch, heads, rounds, count, chunk, steps, chunk), dtype=torch.bool, device=seed.device
    )
    alone = torch.empty((batch, heads, length), dtype=torch.bool, device=seed.device)
    programs = (rounds * count * chunk + 31) // 32 * batch * heads
    if programs:
        with torch.cuda.device_of(seed):
            kept_kernel[(programs,)](
                left.view(torch.uint8), alone.view(torch.uint8), seed, dropout, length, rounds, count,
                ROWS=32, CHUNK=chunk, BACK=look_back, AHEAD=look_ahead, COLUMNS=64,
            )  # fmt: skip
    return left, alone


@kept_weights.register_fake
def _(
    seed: Tensor, dropout: float, sizes: Sequence[int], chunk_size: int, look_back: int, look_ahead: int
) -> tuple[Tensor, Tensor]:
    batch, heads, rounds, length = sizes
    chunk, steps = whole_chunk(length, chunk_size), look_back + 1 + look_ahead
    count = (length + chunk - 1) // chunk
    left = torch.empty(
        (batch, heads, rounds, count, chunk, steps, chunk), dtype=torch.bool, device=seed.device
    )
    return left, torch.empty((batch, heads, length), dtype=torch.bool, device=seed.device)


def definition(
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
) -> Tensor:
    """What `lsh_attention` gives, in PyTorch: its derivatives have some. Dropout leaves what it leaves."""
    options = Options(
        0, chunk_size, look_back, look_ahead, circular, labels is not None, places is not None, is_causal,
        scale,
    )  # fmt: skip
    dropped = None
    if seed is not None:
        sizes = order.shape
        left, left_alone = kept_weights(seed, dropout, list(sizes), chunk_size, look_back, look_ahead)
        used = min(chunk_size, max(sizes[3], 1))  # of a chunk that is longer than the sequence
        left = left[:, :, :, :, :used, :, :used].flatten(-2)

        def dropped(weights: Tensor, r: int | None) -> Tensor:
            return weights * (left_alone if r is None else left[:, :, r]) / (1 - dropout)

    return attend(query_key, value, order, order if labels is None else labels, key_mask, options, dropped)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    save(ctx, inputs, *output)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    inputs, (out, lse) = saved(ctx)
    gradients: list[Tensor | None] = [None] * len(inputs)
    wanted = [n for n in (0, 1) if ctx.needs_input_grad[n]]
    if grad is None:
        return tuple(gradients)
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        found = torch.autograd.grad(
            definition(*inputs),
            [inputs[n] for n in wanted],
            grad,
            create_graph=True,
            materialize_grads=True,
        )
    else:
        both = lsh_attention_backward(grad, out, lse, [n in wanted for n in (0, 1)], *inputs)
        found = tuple(both[n] for n in wanted)
    for place, gradient in zip(wanted, found, strict=True):
        gradients[place] = gradient
    return tuple(gradients)


lsh_attention.register_autograd(_backward, setup_context=_setup_context)
fold_into_batch(
    lsh_attention, ["query_key", "value", "order", "labels", "places", "key_mask"], alone=["seed"]
)


def _summed(parts: Tensor | None, like: Tensor) -> Tensor:
    if parts is None:
        return like.new_empty(0)
    by_round = parts.permute(2, 0, 3, 1, 4)  # as it lies in memory: (R, B, L, H, D)
    return (by_round[0] if by_round.shape[0] == 1 else by_round.sum(0)).transpose(1, 2)


def _like_tokens(heads: Tensor) -> Tensor:
    """(B, H, L, D), in whose memory the heads of a token lie side by side, as a projection takes them."""
    batch, n_heads, length, size = heads.shape
    return heads.new_empty(batch, length, n_heads, size).transpose(1, 2)
