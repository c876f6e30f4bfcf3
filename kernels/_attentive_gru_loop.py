"""The loop of `lamina.kernels.attentive_gru` as one registered operation, forward and backward.

As in `_lstm_loop.py`: steps without autograd, the gradients of what they share after them. Both products of a
state are one, with the rows of W and of U's gates: `joint`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _attentive_gru_steps
from ._lstm_loop import LONGEST, chunks, without_autocast
from .attentive_gru import attentive_gru_reference


def attentive_loop(*arguments: Any, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `attentive_gru_reference`, which takes the same; `fused` for the Triton kernels."""
    dtype = arguments[0].dtype
    if not fused and dtype in (torch.float16, torch.bfloat16):  # which a CPU computes slower than float32
        arguments = tuple(t.float() if t is not None and t.dtype is dtype else t for t in arguments)
    states, contexts, weights, *_ = loop(*arguments, fused)
    return states.to(dtype), contexts.to(dtype), weights.to(dtype)


@torch.library.custom_op("lamina::attentive_gru", mutates_args=())
@without_autocast
def loop(
    projected: Tensor,
    state: Tensor,
    weight: Tensor,
    context_weight: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    energy: Tensor,
    key_mask: Tensor | None,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The states (T + 1, B, H), contexts (T, B, C) and weights (T, B, S); the gates (T, B, 3 H) and the
    products of the states (T, B, A + 2 H), which the backward pass reads."""
    results = _results(projected, query_weight, keys, values)
    projected, state = projected.contiguous(), state.contiguous()
    shared = _shared(weight, context_weight, query_weight, keys, values, energy)
    key_mask = None if key_mask is None else key_mask.contiguous()
    results[0][0] = state
    for start, end in chunks(len(projected), LONGEST, backwards=False):
        inputs = [projected[start:end], results[0][start], *shared, key_mask]
        outputs = [results[0][start : end + 1], *(t[start:end] for t in results[1:])]
        _run("forward_steps", fused, inputs, outputs)
    states, contexts, weights, gates, products = results
    return states, contexts, weights, gates, products


@loop.register_fake
def _(
    projected: Tensor,
    state: Tensor,
    weight: Tensor,
    context_weight: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(_results(projected, query_weight, keys, values))


@torch.library.custom_op("lamina::attentive_gru_backward", mutates_args=())
@without_autocast
def loop_backward(
    d_states: Tensor | None,
    d_contexts: Tensor | None,
    d_weights: Tensor | None,
    states: Tensor,
    contexts: Tensor,
    weights: Tensor,
    gates: Tensor,
    products: Tensor,
    needed: Sequence[bool],
    projected: Tensor,
    state: Tensor,
    weight: Tensor,
    context_weight: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    energy: Tensor,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first eight inputs of `loop`: of what is not `needed`, nothing to read."""
    hidden, size = query_weight.shape
    shared = _shared(weight, context_weight, query_weight, keys, values, energy)
    d_states = torch.zeros_like(states) if d_states is None else d_states.contiguous()
    d_contexts = torch.zeros_like(contexts) if d_contexts is None else d_contexts.contiguous()
    d_weights = None if d_weights is None else d_weights.contiguous()
    wide = torch.promote_types(projected.dtype, torch.float32)
    d_gates, d_products, d_sums = (torch.empty_like(t) for t in (gates, products, contexts))
    d_state = state.new_zeros(state.shape, dtype=wide)
    d_keys = torch.zeros_like(keys, dtype=wide, memory_format=torch.contiguous_format)
    # Of each sequence its own, where programs add to it at the same time.
    d_energy = energy.new_zeros((len(state), hidden) if fused else (hidden,), dtype=wide)
    for start, end in chunks(len(projected), LONGEST, backwards=True):
        own_weights = None if d_weights is None else d_weights[start:end]
        inputs = [d_states[start + 1 : end + 1], d_contexts[start:end], own_weights]
        inputs += [states[start : end + 1], *(t[start:end] for t in (weights, gates, products)), *shared]
        inputs += [d_state.clone(), d_keys.clone(), d_energy.clone()]
        outputs = [*(t[start:end] for t in (d_gates, d_products, d_sums)), d_state, d_keys, d_energy]
        _run("backward_steps", fused, inputs, outputs)
    d_state = (d_state + d_states[0]).to(state.dtype)
    before = states[:-1].flatten(0, 1)
    of_weight, of_context, of_query, of_keys, of_values, of_energy = needed
    d_weight, d_context_weight, d_query_weight, d_values = (projected.new_empty(0) for _ in range(4))
    if of_weight or of_query:
        d_joint = d_products.flatten(0, 1).t() @ before
    if of_query:
        d_query_weight = d_joint[:hidden].clone()
    if of_weight:
        reset = gates.flatten(0, 1)[:, :size] * before
        d_candidate = d_gates.flatten(0, 1)[:, 2 * size :].t() @ reset
        d_weight = torch.cat([d_joint[hidden:], d_candidate])
    if of_context:
        d_context_weight = d_gates.flatten(0, 1).t() @ contexts.flatten(0, 1)
    if of_values:
        d_values = torch.bmm(weights.permute(1, 2, 0), d_sums.transpose(0, 1))
    d_keys = d_keys.to(keys.dtype) if of_keys else projected.new_empty(0)
    d_energy = d_energy.view(-1, hidden).sum(0).to(energy.dtype) if of_energy else projected.new_empty(0)
    return d_gates, d_state, d_weight, d_context_weight, d_query_weight, d_keys, d_values, d_energy


@loop_backward.register_fake
def _(
    d_states: Tensor | None,
    d_contexts: Tensor | None,
    d_weights: Tensor | None,
    states: Tensor,
    contexts: Tensor,
    weights: Tensor,
    gates: Tensor,
    products: Tensor,
    needed: Sequence[bool],
    *inputs: Any,
) -> tuple[Tensor, ...]:
    of_inputs = zip((True, True, *needed), inputs[:8], strict=True)
    return tuple(t.new_empty(t.shape) if wanted else states.new_empty(0) for wanted, t in of_inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.fused = inputs[9]
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    inputs, results, gradients = saved[:9], saved[9:], gradients[:3]
    wanted = [n for n in range(8) if ctx.needs_input_grad[n]]
    found: Sequence[Tensor]
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        outputs = attentive_gru_reference(*inputs)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [inputs[n] for n in wanted],
            [g for _, g in pairs],
            create_graph=True,
            materialize_grads=True,
        )
    else:
        needed = list(ctx.needs_input_grad[2:8])
        of_all = loop_backward(*gradients, *results, needed, *inputs[:8], ctx.fused)
        found = [of_all[n] for n in wanted]
    of_inputs: list[Tensor | None] = [None] * 10
    for n, gradient in zip(wanted, found, strict=True):
        of_inputs[n] = gradient
    return tuple(of_inputs)


loop.register_autograd(_backward, setup_context=_setup_context)


def _results(projected: Tensor, query_weight: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
    (steps, batch, width), (hidden, size) = projected.shape, query_weight.shape
    return [
        projected.new_empty(steps + 1, batch, size),
        projected.new_empty(steps, batch, values.shape[2]),
        projected.new_empty(steps, batch, keys.shape[1]),
        projected.new_empty(steps, batch, width),
        projected.new_empty(steps, batch, hidden + 2 * size),
    ]


def _shared(
    weight: Tensor,
    context_weight: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    energy: Tensor,
) -> list[Tensor]:
    """What all steps read: the rows that multiply the state together, the candidate's, and the rest."""
    of_gates, of_candidate = weight.split((2 * weight.shape[1], weight.shape[1]))
    rest = (of_candidate, context_weight, keys, values, energy)
    return [torch.cat([query_weight, of_gates]), *(t.contiguous() for t in rest)]


def _run(steps: str, fused: bool, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
    if fused:
        from .fused import attentive_gru
        from .fused._recurrent_graphs import replay

        replay(getattr(attentive_gru, steps), inputs, outputs, ())
    else:
        getattr(_attentive_gru_steps, steps)(inputs, outputs, ())
