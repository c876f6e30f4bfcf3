"""Triton kernels of `lamina.kernels.lstm_sequence`: all of a step but its products, forward and backward.

A program has a row of the batch, and where nothing is normalised over all units, a block of its units. It
reads the share of the input and the product, and computes in float32. The backward pass computes the gates
again: only the products and the memories are kept. No atomics: every run gives the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256  # units of a program that need not have all


def forward_steps(inputs: Sequence[Any], outputs: Sequence[Tensor], options: tuple[float, bool]) -> None:
    """Writes states and memories (both with what comes before the steps), products, and what is projected."""
    projected, hidden, memory, lengths, weight, peepholes, gate_gain, cell_gain, cell_bias, projection = (
        inputs
    )
    states, memories, products, _, shown = outputs
    eps, reverse = options
    steps = len(projected)
    earlier, later = (1, 0) if reverse else (0, 1)
    states[steps * earlier].copy_(hidden)
    memories[steps * earlier].copy_(memory)
    launch = _launcher(memory, gate_gain, cell_gain)
    alive = _alive(lengths, steps) if projection is not None else None
    state, product, u = states.unbind(0), products.unbind(0), weight.t()
    out = states if projection is None else shown
    for t in reversed(range(steps)) if reverse else range(steps):
        torch.mm(state[t + earlier], u, out=product[t])
        launch(
            _forward_kernel, projected, products, memories, states, out, peepholes, gate_gain, cell_gain,
            cell_bias, lengths, t, t + earlier, t + later, t if projection is not None else t + later,
            eps=eps, CARRIES=projection is None,
        )  # fmt: skip
        if projection is not None:
            torch.mm(shown[t], projection.t(), out=state[t + later])
            if alive is not None:
                torch.where(alive[t], state[t + later], state[t + earlier], out=state[t + later])


def backward_steps(inputs: Sequence[Any], outputs: Sequence[Tensor], options: tuple[float, bool]) -> None:
    """Writes the gradients of gates, products, normalised memories, outputs, and of what came before."""
    cotangents, projected, memories, products, _, lengths, weight, peepholes, gate_gain = inputs[:9]
    cell_gain, cell_bias, projection, d_hidden, d_memory = inputs[9:]
    d_gates, d_products, d_seen, d_outputs, carried, d_cell = outputs
    eps, reverse = options
    steps = len(projected)
    earlier, later = (1, 0) if reverse else (0, 1)
    carried.copy_(d_hidden)
    d_cell.copy_(d_memory)
    launch = _launcher(d_cell, gate_gain, cell_gain)
    alive = _alive(lengths, steps) if projection is not None else None
    of_product = d_gates if gate_gain is None else d_products
    d_product, d_output = of_product.unbind(0), None
    for t in range(steps) if reverse else reversed(range(steps)):
        if projection is not None:
            total = torch.add(cotangents[t], carried, out=d_outputs[t])
            if alive is not None:
                carried.copy_(total).masked_fill_(alive[t], 0.0)
                total.masked_fill_(~alive[t], 0.0)
            d_output = torch.mm(total, projection, out=d_output)
        launch(
            _backward_kernel, projected, products, memories, cotangents, carried, d_output, d_cell, d_gates,
            d_products, d_seen, peepholes, gate_gain, cell_gain, cell_bias, lengths, t, t + earlier,
            t + later, eps=eps,
        )  # fmt: skip
        if lengths is None:
            torch.mm(d_product[t], weight, out=carried)
        else:
            torch.addmm(carried, d_product[t], weight, out=carried)


def _launcher(memory, gate_gain, cell_gain):
    """Launches a kernel over all units of all rows. Most steps are small: the programs are as well."""
    batch, size = memory.shape
    block = triton.next_power_of_2(size)
    if gate_gain is None and cell_gain is None:
        block = min(block, _BLOCK)
    warps = max(1, min(16, block // 128))
    acc = tl.float64 if memory.dtype is torch.float64 else tl.float32

    def launch(kernel, *arguments, **options) -> None:
        if batch:
            with torch.cuda.device_of(memory):
                kernel[(batch, triton.cdiv(size, block))](
                    *arguments, batch, size, **options, BLOCK=block, ACC=acc, num_warps=warps
                )

    return launch


def _alive(lengths, steps: int):
    """For every step (B, 1): which sequences are not over."""
    if lengths is None:
        return None
    times = torch.arange(steps, device=lengths.device)
    return (times[:, None, None] < lengths[:, None]).unbind(0)


@triton.jit
def _tanh(x):
    # Twice a sigmoid, less one, would have twice a sigmoid's rounding, where that of this is a half's.
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _normalised(i, f, g, o, inside, size, eps):
    """The four gates over all their units, and one over their deviation."""
    mean = (tl.sum(i, 0) + tl.sum(f, 0) + tl.sum(g, 0) + tl.sum(o, 0)) / (4 * size)
    i, f = tl.where(inside, i - mean, 0.0), tl.where(inside, f - mean, 0.0)
    g, o = tl.where(inside, g - mean, 0.0), tl.where(inside, o - mean, 0.0)
    variance = (tl.sum(i * i, 0) + tl.sum(f * f, 0) + tl.sum(g * g, 0) + tl.sum(o * o, 0)) / (4 * size)
    rstd = 1 / tl.sqrt(variance + eps)
    return i * rstd, f * rstd, g * rstd, o * rstd, rstd


@triton.jit
def _gates(
    projected, products, peepholes, gain, memory, at, unit, inside, size, eps, ACC: tl.constexpr
):  # fmt: skip
    """i, f and g; o but for its peephole and its nonlinearity; and what normalising gave."""
    a_i = tl.load(products + at, mask=inside, other=0.0).to(ACC)
    a_f = tl.load(products + at + size, mask=inside, other=0.0).to(ACC)
    a_g = tl.load(products + at + 2 * size, mask=inside, other=0.0).to(ACC)
    a_o = tl.load(products + at + 3 * size, mask=inside, other=0.0).to(ACC)
    i, f, g, o = a_i, a_f, a_g, a_o
    rstd = 1.0
    if gain is not None:
        a_i, a_f, a_g, a_o, rstd = _normalised(a_i, a_f, a_g, a_o, inside, size, eps)
        i = a_i * tl.load(gain + unit, mask=inside, other=0.0).to(ACC)
        f = a_f * tl.load(gain + unit + size, mask=inside, other=0.0).to(ACC)
        g = a_g * tl.load(gain + unit + 2 * size, mask=inside, other=0.0).to(ACC)
        o = a_o * tl.load(gain + unit + 3 * size, mask=inside, other=0.0).to(ACC)
    i += tl.load(projected + at, mask=inside, other=0.0).to(ACC)
    f += tl.load(projected + at + size, mask=inside, other=0.0).to(ACC)
    g += tl.load(projected + at + 2 * size, mask=inside, other=0.0).to(ACC)
    o += tl.load(projected + at + 3 * size, mask=inside, other=0.0).to(ACC)
    if peepholes is not None:
        i += tl.load(peepholes + unit, mask=inside, other=0.0).to(ACC) * memory
        f += tl.load(peepholes + unit + size, mask=inside, other=0.0).to(ACC) * memory
    return tl.sigmoid(i), tl.sigmoid(f), _tanh(g), o, a_i, a_f, a_g, a_o, rstd


@triton.jit
def _seen(memory, gain, bias, unit, inside, size, eps, ACC: tl.constexpr):
    """The memory as the output sees it, normalised, and one over its deviation."""
    mean = tl.sum(tl.where(inside, memory, 0.0), 0) / size
    centred = tl.where(inside, memory - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / size + eps)
    normal = centred * rstd
    scale = tl.load(gain + unit, mask=inside, other=0.0).to(ACC)
    return normal * scale + tl.load(bias + unit, mask=inside, other=0.0).to(ACC), normal, scale, rstd


@triton.jit(do_not_specialize=["step", "before", "after", "to"])
def _forward_kernel(
    projected, products, memories, states, out, peepholes, gate_gain, cell_gain, cell_bias, lengths,
    step, before, after, to, batch, size, eps, CARRIES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The new memory and the output of a row; of a row that is over, the old ones."""
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < size
    old = tl.load(memories + (before * batch + row) * size + unit, mask=inside, other=0.0)
    at = (step * batch + row) * 4 * size + unit
    i, f, g, o, _, _, _, _, _ = _gates(
        projected, products, peepholes, gate_gain, old, at, unit, inside, size, eps, ACC
    )
    new = f * old + i * g
    if peepholes is not None:
        o += tl.load(peepholes + unit + 2 * size, mask=inside, other=0.0).to(ACC) * new
    seen = new
    if cell_gain is not None:
        seen, _, _, _ = _seen(new, cell_gain, cell_bias, unit, inside, size, eps, ACC)
    output = tl.sigmoid(o) * _tanh(seen)
    if lengths is not None:
        alive = step < tl.load(lengths + row)
        new = tl.where(alive, new, old)
        if CARRIES:
            earlier = tl.load(states + (before * batch + row) * size + unit, mask=inside, other=0.0)
            output = tl.where(alive, output, earlier.to(ACC))
    tl.store(memories + (after * batch + row) * size + unit, new, mask=inside)
    tl.store(out + (to * batch + row) * size + unit, output, mask=inside)


@triton.jit(do_not_specialize=["step", "before", "after"])
def _backward_kernel(
    projected, products, memories, cotangents, carried, d_output, d_cell, d_gates, d_products, d_seen,
    peepholes, gate_gain, cell_gain, cell_bias, lengths, step, before, after, batch, size, eps,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of a row's gates and products, and in place of its memory; `carried` keeps what is over."""
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < size
    here, now = row * size + unit, (step * batch + row) * size + unit
    old = tl.load(memories + (before * batch + row) * size + unit, mask=inside, other=0.0)
    new = tl.load(memories + (after * batch + row) * size + unit, mask=inside, other=0.0)
    at = (step * batch + row) * 4 * size + unit
    i, f, g, o, a_i, a_f, a_g, a_o, rstd = _gates(
        projected, products, peepholes, gate_gain, old, at, unit, inside, size, eps, ACC
    )
    if d_output is not None:
        d_out = tl.load(d_output + here, mask=inside, other=0.0).to(ACC)
    else:
        d_out = tl.load(carried + here, mask=inside, other=0.0).to(ACC)
        d_out += tl.load(cotangents + now, mask=inside, other=0.0).to(ACC)
    d_new = tl.load(d_cell + here, mask=inside, other=0.0)
    alive = True
    if lengths is not None:
        alive = step < tl.load(lengths + row)
        if d_output is None:
            tl.store(carried + here, tl.where(alive, 0.0, d_out), mask=inside)
    passed = d_new

    if peepholes is not None:
        o += tl.load(peepholes + unit + 2 * size, mask=inside, other=0.0).to(ACC) * new
    o = tl.sigmoid(o)
    if cell_gain is not None:
        seen, normal, scale, cell_rstd = _seen(new, cell_gain, cell_bias, unit, inside, size, eps, ACC)
        bounded = _tanh(seen)
        d_normal = d_out * o * (1 - bounded * bounded)
        if lengths is not None:
            d_normal = tl.where(alive, d_normal, 0.0)
        tl.store(d_seen + now, d_normal, mask=inside)
        d_normal = tl.where(inside, d_normal * scale, 0.0)
        mean, along = tl.sum(d_normal, 0) / size, tl.sum(d_normal * normal, 0) / size
        d_new += cell_rstd * (d_normal - mean - normal * along)
    else:
        bounded = _tanh(new)
        d_new += d_out * o * (1 - bounded * bounded)
    d_o = d_out * bounded * o * (1 - o)
    if peepholes is not None:
        d_new += d_o * tl.load(peepholes + unit + 2 * size, mask=inside, other=0.0).to(ACC)
    d_i, d_f, d_g = d_new * g * i * (1 - i), d_new * old * f * (1 - f), d_new * i * (1 - g * g)
    if lengths is not None:
        d_i, d_f = tl.where(alive, d_i, 0.0), tl.where(alive, d_f, 0.0)
        d_g, d_o = tl.where(alive, d_g, 0.0), tl.where(alive, d_o, 0.0)
    d_old = d_new * f
    if peepholes is not None:
        d_old += d_i * tl.load(peepholes + unit, mask=inside, other=0.0).to(ACC)
        d_old += d_f * tl.load(peepholes + unit + size, mask=inside, other=0.0).to(ACC)
    if lengths is not None:
        d_old = tl.where(alive, d_old, passed)
    tl.store(d_cell + here, d_old, mask=inside)
    _store_gates(d_gates + at, d_i, d_f, d_g, d_o, inside, size)

    if gate_gain is not None:
        d_i *= tl.load(gate_gain + unit, mask=inside, other=0.0).to(ACC)
        d_f *= tl.load(gate_gain + unit + size, mask=inside, other=0.0).to(ACC)
        d_g *= tl.load(gate_gain + unit + 2 * size, mask=inside, other=0.0).to(ACC)
        d_o *= tl.load(gate_gain + unit + 3 * size, mask=inside, other=0.0).to(ACC)
        mean = (tl.sum(d_i, 0) + tl.sum(d_f, 0) + tl.sum(d_g, 0) + tl.sum(d_o, 0)) / (4 * size)
        along = tl.sum(d_i * a_i + d_f * a_f + d_g * a_g + d_o * a_o, 0) / (4 * size)
        d_i, d_f = rstd * (d_i - mean - a_i * along), rstd * (d_f - mean - a_f * along)
        d_g, d_o = rstd * (d_g - mean - a_g * along), rstd * (d_o - mean - a_o * along)
        _store_gates(d_products + at, d_i, d_f, d_g, d_o, inside, size)


@triton.jit
def _store_gates(to, i, f, g, o, inside, size):
    tl.store(to, i, mask=inside)
    tl.store(to + size, f, mask=inside)
    tl.store(to + 2 * size, g, mask=inside)
    tl.store(to + 3 * size, o, mask=inside)
