"""Triton kernels of `lamina.kernels.attentive_gru`: all of a step but its products, forward and backward.

Scores: a program has some keys of a sequence, and walks over the hidden units. Contexts: some channels of a
sequence; each takes the softmax again. Gates: a row of the batch and a block of units. Going back, a program
has some hidden units of a sequence, and walks over all keys, so that nothing is added to by two. No atomics.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 16  # of a tile
_BLOCK = 128  # hidden units, channels or units of a tile


def forward_steps(inputs: Sequence[Any], outputs: Sequence[Tensor], options: tuple[int, ...]) -> None:
    """Writes states (from the given one on), contexts, weights, gates, and the states' products."""
    projected, state, joint, of_candidate, context_weight, keys, values, energy, key_mask = inputs
    batch, length, hidden = keys.shape
    size, channels = state.shape[1], values.shape[2]
    states, contexts, weights, gates, products = (t.unbind(0) for t in outputs)
    states[0].copy_(state)
    acc = _accumulator(state)
    scores = state.new_empty(batch, length, dtype=acc)
    reset, product = torch.empty_like(state), torch.empty_like(state)
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    for t in range(len(projected)):
        torch.mm(states[t], joint.t(), out=products[t])
        _launch(
            _scores_kernel, (batch, triton.cdiv(length, _KEYS)), products[t], keys, energy, mask, scores,
            length, hidden, hidden + 2 * size,
        )  # fmt: skip
        _launch(
            _context_kernel, (batch, triton.cdiv(channels, _BLOCK)), scores, values, weights[t], contexts[t],
            length, channels, ALL=triton.next_power_of_2(max(1, length)),
        )  # fmt: skip
        torch.addmm(projected[t], contexts[t], context_weight.t(), out=gates[t])
        units = (batch, triton.cdiv(size, _BLOCK))
        _launch(_reset_kernel, units, gates[t], products[t], states[t], reset, size, hidden)
        torch.mm(reset, of_candidate.t(), out=product)
        _launch(_update_kernel, units, gates[t], product, states[t], states[t + 1], size)


def backward_steps(inputs: Sequence[Any], outputs: Sequence[Tensor], options: tuple[int, ...]) -> None:
    """Writes the gradients of gates, products and contexts, and adds to those of state, keys and energy."""
    d_states, d_own_contexts, d_own_weights, states, weights, gates, products = inputs[:7]
    joint, of_candidate, context_weight, keys, values, energy, d_state, d_keys, d_energy = inputs[7:]
    d_gates, d_products, d_contexts, carried, of_keys, of_energy = outputs
    batch, length, hidden = keys.shape
    size = d_state.shape[1]
    carried.copy_(d_state)
    of_keys.copy_(d_keys)
    of_energy.copy_(d_energy)
    d_reset, d_weights = keys.new_empty(batch, size), keys.new_empty(batch, length, 1)
    flow = torch.zeros_like(d_reset)  # through the products; what passes by z and r is carried in float32
    units = (batch, triton.cdiv(size, _BLOCK))
    for t in reversed(range(len(gates))):
        _launch(
            _update_backward_kernel, units, d_states[t], gates[t], states[t], flow, carried, d_gates[t], size
        )
        torch.mm(d_gates[t][:, 2 * size :], of_candidate, out=d_reset)
        _launch(
            _reset_backward_kernel, units, d_reset, gates[t], states[t], carried, d_gates[t], d_products[t],
            size, hidden,
        )  # fmt: skip
        torch.addmm(d_own_contexts[t], d_gates[t], context_weight, out=d_contexts[t])
        torch.bmm(values, d_contexts[t].unsqueeze(-1), out=d_weights)
        own = None if d_own_weights is None else d_own_weights[t]
        _launch(
            _scores_backward_kernel, (batch, triton.cdiv(hidden, _BLOCK)), d_weights, own, weights[t],
            products[t], keys, energy, d_products[t], of_keys, of_energy, length, hidden, hidden + 2 * size,
            ALL=triton.next_power_of_2(max(1, length)),
        )  # fmt: skip
        torch.mm(d_products[t], joint, out=flow)
    carried += flow


def _launch(kernel: Any, programs: tuple[int, int], *arguments: Any, **options: int) -> None:
    """Most steps are small: the programs are as well."""
    if not programs[0] * programs[1]:
        return
    tensor = arguments[0]
    acc = tl.float64 if tensor.dtype is torch.float64 else tl.float32
    with torch.cuda.device_of(tensor):
        kernel[programs](*arguments, **options, KEYS=_KEYS, BLOCK=_BLOCK, ACC=acc, num_warps=4)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@triton.jit
def _tanh(x):
    # Twice a sigmoid, less one, would have twice a sigmoid's rounding, where that of this is a half's.
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _scores_kernel(
    products, keys, energy, mask, scores, length, hidden, width,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores of KEYS keys; of one that does not take part, -inf."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    total = tl.zeros((KEYS,), ACC)
    for start in range(0, hidden, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        query = tl.load(products + b * width + unit, mask=unit < hidden, other=0.0).to(ACC)
        e = tl.load(energy + unit, mask=unit < hidden, other=0.0).to(ACC)
        inside = (j < length)[:, None] & (unit < hidden)[None, :]
        key = tl.load(keys + (b * length + j[:, None]) * hidden + unit[None, :], mask=inside, other=0.0)
        total += tl.sum(_tanh(query[None, :] + key.to(ACC)) * e[None, :], 1)
    if mask is not None:
        kept = tl.load(mask + b * length + j, mask=j < length, other=0) != 0
        total = tl.where(kept, total, -float("inf"))
    tl.store(scores + b * length + j, total, mask=j < length)


@triton.jit
def _context_kernel(
    scores, values, weights, contexts, length, channels, ALL: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The softmax of all keys, and the mean of some channels of the values. Of no key both are zero."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    every = tl.arange(0, ALL)
    score = tl.load(scores + b * length + every, mask=every < length, other=-float("inf"))
    most = tl.max(score, 0)
    most = tl.where(most == -float("inf"), 0.0, most)
    share = tl.exp(score - most)
    mass = tl.sum(share, 0)
    mass = tl.where(mass == 0, 1.0, mass)
    if tl.program_id(1) == 0:
        tl.store(weights + b * length + every, share / mass, mask=every < length)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, length, KEYS):
        j = start + tl.arange(0, KEYS)
        weight = tl.exp(tl.load(scores + b * length + j, mask=j < length, other=-float("inf")) - most)
        inside = (j < length)[:, None] & (c < channels)[None, :]
        value = tl.load(values + (b * length + j[:, None]) * channels + c[None, :], mask=inside, other=0.0)
        total += tl.sum(weight[:, None] * value.to(ACC), 0)
    tl.store(contexts + b * channels + c, total / mass, mask=c < channels)


@triton.jit
def _reset_kernel(
    gates, products, states, reset, size, hidden, KEYS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """r and z in place, and r times the state."""
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < size
    gate, product = gates + b * 3 * size + unit, products + b * (hidden + 2 * size) + hidden + unit
    r = tl.load(gate, mask=inside, other=0.0).to(ACC) + tl.load(product, mask=inside, other=0.0).to(ACC)
    z = tl.load(gate + size, mask=inside, other=0.0).to(ACC)
    z += tl.load(product + size, mask=inside, other=0.0).to(ACC)
    r = tl.sigmoid(r)
    tl.store(gate, r, mask=inside)
    tl.store(gate + size, tl.sigmoid(z), mask=inside)
    state = tl.load(states + b * size + unit, mask=inside, other=0.0).to(ACC)
    tl.store(reset + b * size + unit, r * state, mask=inside)


@triton.jit
def _update_kernel(
    gates, product, before, after, size, KEYS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """n in place, and the new state."""
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < size
    gate, here = gates + b * 3 * size + unit, b * size + unit
    n = tl.load(gate + 2 * size, mask=inside, other=0.0).to(ACC)
    n = _tanh(n + tl.load(product + here, mask=inside, other=0.0).to(ACC))
    z = tl.load(gate + size, mask=inside, other=0.0).to(ACC)
    state = tl.load(before + here, mask=inside, other=0.0).to(ACC)
    tl.store(gate + 2 * size, n, mask=inside)
    tl.store(after + here, n + z * (state - n), mask=inside)


@triton.jit
def _update_backward_kernel(
    d_states, gates, states, flow, carried, d_gates, size,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of z and n before their nonlinearities, and what passes the step by z, in place."""
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < size
    gate, here = b * 3 * size + unit, b * size + unit
    z = tl.load(gates + gate + size, mask=inside, other=0.0).to(ACC)
    n = tl.load(gates + gate + 2 * size, mask=inside, other=0.0).to(ACC)
    state = tl.load(states + here, mask=inside, other=0.0).to(ACC)
    total = tl.load(d_states + here, mask=inside, other=0.0).to(ACC)
    total += tl.load(flow + here, mask=inside, other=0.0).to(ACC)
    total += tl.load(carried + here, mask=inside, other=0.0)
    tl.store(d_gates + gate + size, total * (state - n) * z * (1 - z), mask=inside)
    tl.store(d_gates + gate + 2 * size, total * (1 - z) * (1 - n * n), mask=inside)
    tl.store(carried + here, total * z, mask=inside)


@triton.jit
def _reset_backward_kernel(
    d_reset, gates, states, carried, d_gates, d_products, size, hidden,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of r before its nonlinearity, a copy of it and z's, and what passes the step by r."""
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < size
    gate, here = b * 3 * size + unit, b * size + unit
    d = tl.load(d_reset + here, mask=inside, other=0.0).to(ACC)
    r = tl.load(gates + gate, mask=inside, other=0.0).to(ACC)
    d_r = d * tl.load(states + here, mask=inside, other=0.0).to(ACC) * r * (1 - r)
    passed = tl.load(carried + here, mask=inside, other=0.0) + d * r
    tl.store(carried + here, passed, mask=inside)
    tl.store(d_gates + gate, d_r, mask=inside)
    product = d_products + b * (hidden + 2 * size) + hidden + unit
    tl.store(product, d_r, mask=inside)
    tl.store(product + size, tl.load(d_gates + gate + size, mask=inside, other=0.0), mask=inside)


@triton.jit
def _scores_backward_kernel(
    d_weights, d_own, weights, products, keys, energy, d_products, d_keys, d_energy, length, hidden, width,
    ALL: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Some hidden units' part of the query's gradient, and what is added to those of keys and energy."""
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    every = tl.arange(0, ALL)
    share = tl.load(weights + b * length + every, mask=every < length, other=0.0).to(ACC)
    mean = tl.sum(share * _of_weights(d_weights, d_own, b * length + every, every < length, ACC), 0)
    query = tl.load(products + b * width + unit, mask=unit < hidden, other=0.0).to(ACC)
    e = tl.load(energy + unit, mask=unit < hidden, other=0.0).to(ACC)
    to_query, to_energy = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for start in range(0, length, KEYS):
        j = start + tl.arange(0, KEYS)
        weight = tl.load(weights + b * length + j, mask=j < length, other=0.0).to(ACC)
        d_score = weight * (_of_weights(d_weights, d_own, b * length + j, j < length, ACC) - mean)
        inside = (j < length)[:, None] & (unit < hidden)[None, :]
        at = (b * length + j[:, None]) * hidden + unit[None, :]
        t = _tanh(query[None, :] + tl.load(keys + at, mask=inside, other=0.0).to(ACC))
        slope = d_score[:, None] * e[None, :] * (1 - t * t)
        tl.store(d_keys + at, tl.load(d_keys + at, mask=inside, other=0.0) + slope, mask=inside)
        to_query += tl.sum(slope, 0)
        to_energy += tl.sum(d_score[:, None] * t, 0)
    tl.store(d_products + b * width + unit, to_query, mask=unit < hidden)
    at_energy = d_energy + b * hidden + unit
    to_energy += tl.load(at_energy, mask=unit < hidden, other=0.0)
    tl.store(at_energy, to_energy, mask=unit < hidden)


@triton.jit
def _of_weights(d_weights, d_own, at, inside, ACC: tl.constexpr):
    d = tl.load(d_weights + at, mask=inside, other=0.0).to(ACC)
    if d_own is not None:
        d += tl.load(d_own + at, mask=inside, other=0.0).to(ACC)
    return d
