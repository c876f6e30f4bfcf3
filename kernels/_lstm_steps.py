"""Some steps of `lamina.kernels.lstm_sequence` in PyTorch, and the way back: in place, few calls a step."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_steps(inputs: Sequence[Any], outputs: Sequence[Tensor], options: tuple[float, bool]) -> None:
    """Writes states and memories (with those before the steps), products, gates, and what is projected.

    A reversed chunk holds its times in their order, too: the steps go from its end.
    """
    projected, hidden, memory, lengths, weight, peepholes, gate_gain, cell_gain, cell_bias, projection = (
        inputs
    )
    eps, reverse = options
    steps, batch, width = projected.shape
    size = width // 4
    earlier, later = (1, 0) if reverse else (0, 1)
    states, memories = outputs[0].unbind(0), outputs[1].unbind(0)
    states[steps * earlier].copy_(hidden)
    memories[steps * earlier].copy_(memory)
    shares, products, gates = (t.unbind(0) for t in (projected, outputs[2], outputs[3]))
    four = outputs[3].view(steps, batch, 4, size)
    inner, (i, f, g, o) = four[:, :, :2].unbind(0), (gate.unbind(0) for gate in four.unbind(2))
    shown = outputs[4].unbind(0) if projection is not None else states[later : steps + later]
    alive = _alive(lengths, steps)
    u = weight.t()
    for t in reversed(range(steps)) if reverse else range(steps):
        old_state, old, new = states[t + earlier], memories[t + earlier], memories[t + later]
        if gate_gain is None:
            torch.addmm(shares[t], old_state, u, out=gates[t])
        else:
            torch.mm(old_state, u, out=products[t])
            torch.add(shares[t], F.layer_norm(products[t], (width,), gate_gain, None, eps), out=gates[t])
        if peepholes is not None:
            inner[t].addcmul_(peepholes[:2], old.unsqueeze(1))
        inner[t].sigmoid_()
        g[t].tanh_()
        torch.mul(f[t], old, out=new)
        new.addcmul_(i[t], g[t])
        if peepholes is not None:
            o[t].addcmul_(peepholes[2], new)
        o[t].sigmoid_()
        seen = new if cell_gain is None else F.layer_norm(new, (size,), cell_gain, cell_bias, eps)
        torch.tanh(seen, out=shown[t]).mul_(o[t])
        if projection is not None:
            torch.mm(shown[t], projection.t(), out=states[t + later])
        if alive is not None:
            torch.where(alive[t], states[t + later], old_state, out=states[t + later])
            torch.where(alive[t], new, old, out=new)


def backward_steps(inputs: Sequence[Any], outputs: Sequence[Tensor], options: tuple[float, bool]) -> None:
    """Writes the gradients of gates, products, normalised memories, outputs, and of what came before.

    What a step's gradients are multiplied by is known of all steps beforehand, and computed at once.
    """
    cotangents, _, memories, products, gates, lengths, weight, peepholes, gate_gain = inputs[:9]
    cell_gain, cell_bias, projection, d_hidden, d_memory = inputs[9:]
    eps, reverse = options
    steps, batch, width = gates.shape
    size = width // 4
    earlier, later = (1, 0) if reverse else (0, 1)
    before, after = (memories[n : steps + n] for n in (earlier, later))
    four = gates.view(steps, batch, 4, size)
    i, f, g, o = four.unbind(2)
    seen = after
    if cell_gain is not None:
        seen, mean, rstd = torch.native_layer_norm(after, (size,), cell_gain, cell_bias, eps)
    bounded = seen.tanh()
    factors = torch.empty_like(four)  # of the memory's gradient for i, f and g, of the output's for o
    torch.mul(g * i, 1 - i, out=factors[:, :, 0])
    torch.mul(before * f, 1 - f, out=factors[:, :, 1])
    torch.addcmul(i, i, g * g, value=-1, out=factors[:, :, 2])
    torch.mul(bounded * o, 1 - o, out=factors[:, :, 3])
    to_memory = torch.addcmul(o, o, bounded * bounded, value=-1)
    alive, ended = _alive(lengths, steps), None
    if alive is not None:  # where a sequence is over, the state's gradients pass as they are
        ended = ~torch.stack(alive)
        factors.masked_fill_(ended.unsqueeze(2), 0.0)
        to_memory.masked_fill_(ended, 0.0)
        f = f.masked_fill(ended, 1.0)
        ended = ended.to(gates.dtype)
    if gate_gain is not None:
        _, gate_mean, gate_rstd = torch.native_layer_norm(products, (width,), gate_gain, None, eps)
    d_gates, d_products, d_seen, d_outputs = (t.unbind(0) for t in outputs[:4])
    d_four = outputs[0].view(steps, batch, 4, size)
    d_inner, (d_i, d_f, _, d_o) = d_four[:, :, :3].unbind(0), (t.unbind(0) for t in d_four.unbind(2))
    of_inner, of_o = factors[:, :, :3].unbind(0), factors[:, :, 3].unbind(0)
    carried, d_cell = outputs[4].copy_(d_hidden), outputs[5].copy_(d_memory)
    for t in range(steps) if reverse else reversed(range(steps)):
        total = d_output = cotangents[t] + carried
        if projection is not None:
            torch.mul(total, 1 if ended is None else 1 - ended[t], out=d_outputs[t])
            d_output = d_outputs[t] @ projection
        torch.mul(d_output, of_o[t], out=d_o[t])
        if cell_gain is None:
            d_cell.addcmul_(d_output, to_memory[t])
        else:
            torch.mul(d_output, to_memory[t], out=d_seen[t])
            d_cell += _through_norm(d_seen[t], after[t], (size,), mean[t], rstd[t], cell_gain, cell_bias)
        if peepholes is not None:
            d_cell.addcmul_(d_o[t], peepholes[2])
        torch.mul(d_cell.unsqueeze(1), of_inner[t], out=d_inner[t])
        d_cell.mul_(f[t])
        if peepholes is not None:
            d_cell.addcmul_(d_i[t], peepholes[0]).addcmul_(d_f[t], peepholes[1])
        d_product = d_gates[t]
        if gate_gain is not None:
            of_norm = (products[t], (width,), gate_mean[t], gate_rstd[t], gate_gain, None)
            d_product = d_products[t].copy_(_through_norm(d_gates[t], *of_norm))
        if ended is None:
            torch.mm(d_product, weight, out=carried)
        else:
            torch.addmm(total * ended[t], d_product, weight, out=carried)


def _through_norm(gradient: Tensor, *of_norm: Any) -> Tensor:
    found: Tensor = torch.ops.aten.native_layer_norm_backward(gradient, *of_norm, [True, False, False])[0]
    return found


def _alive(lengths: Tensor | None, steps: int) -> tuple[Tensor, ...] | None:
    """For every step (B, 1): which sequences are not over."""
    if lengths is None:
        return None
    times = torch.arange(steps, device=lengths.device)
    return (times[:, None, None] < lengths[:, None]).unbind(0)
