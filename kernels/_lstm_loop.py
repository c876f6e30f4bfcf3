"""The loop of `lamina.kernels.lstm_sequence` as one registered operation, forward and backward.

A step is one product and then pointwise arithmetic: PyTorch's, from `_lstm_steps.py`, or a Triton kernel's,
from `fused/lstm_sequence.py`. Nothing goes through autograd a step. The parameters' gradients are taken of
all steps at once, after the loop: what a step has multiplied is still there, as are its products' gradients.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _lstm_steps
from .lstm_sequence import lstm_sequence_reference

Operation = TypeVar("Operation", bound=Callable[..., Any])

LONGEST = 64  # steps that are worked on together, and those of the longest CUDA graph
CACHE = 2**20  # bytes of the gates of steps that a CPU works on together


def without_autocast(operation: Operation) -> Operation:
    """What a registered operation calls is open to autocast, but in and out of buffers goes what they are."""

    @functools.wraps(operation)
    def run(*arguments: Any) -> Any:
        device = next(t.device.type for t in arguments if isinstance(t, Tensor))
        with torch.autocast(device, enabled=False):
            return operation(*arguments)

    return run  # type: ignore[return-value]


def lstm_loop(projected: Tensor, *arguments: Any, fused: bool) -> tuple[Tensor, Tensor]:
    """As `lstm_sequence_reference`, which takes the same; `fused` for the Triton kernels."""
    tensors = [t for t in (projected, *arguments) if isinstance(t, Tensor)]
    kept = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dtype = projected.dtype
    if not fused and dtype in (torch.float16, torch.bfloat16):  # which a CPU computes slower than float32
        arguments = tuple(t.float() if isinstance(t, Tensor) and t.dtype is dtype else t for t in arguments)
        projected = projected.float()
    states, last, *_ = loop(projected, *arguments, fused, kept)
    return states.to(dtype), last.to(dtype)


@torch.library.custom_op("lamina::lstm_sequence", mutates_args=())
@without_autocast
def loop(
    projected: Tensor,
    hidden: Tensor,
    memory: Tensor,
    weight: Tensor,
    peepholes: Tensor | None,
    gate_gain: Tensor | None,
    cell_gain: Tensor | None,
    cell_bias: Tensor | None,
    projection: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    reverse: bool,
    fused: bool,
    kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The states (T + 1, B, P), in order of time, and the last memory (B, H).

    Then, empty unless they are `kept`, what the backward pass reads: the memories (T + 1, B, H), the products
    U h and the gates (T, B, 4 H), of which a path has what it needs, and what was projected, (T, B, H).
    """
    steps = projected.shape[0]
    states = projected.new_empty(steps + 1, *hidden.shape)
    states[steps if reverse else 0] = hidden
    spans = list(chunks(steps, _longest(projected, fused), backwards=reverse))
    rows = steps if kept else max((end - start for start, end in spans), default=0)
    saved = _saved(projected, memory, gate_gain, projection, fused, rows)
    if not (kept or fused):  # a step overwrites the one before, in a CPU's cache
        saved[1:] = [t[:1].expand_as(t) for t in saved[1:]]
    parameters = _dense(weight, peepholes, gate_gain, cell_gain, cell_bias, projection)
    projected, before = projected.contiguous(), memory.to(saved[0].dtype, copy=True)
    for start, end in spans:
        count, at = end - start, start if kept else 0
        left = None if lengths is None else lengths - start
        inputs = [projected[start:end], states[end if reverse else start], before, left, *parameters]
        outputs = [states[start : end + 1], saved[0][at : at + count + 1]]
        outputs += [t[at : at + count] for t in saved[1:]]
        _run("forward_steps", fused, inputs, outputs, (eps, reverse))
        before = outputs[1][0 if reverse else count].clone()
    if not kept:
        saved = _saved(projected, memory, gate_gain, projection, fused, None)
    memories, products, gates, shown = saved
    return states, before.to(memory.dtype, copy=True), memories, products, gates, shown


@loop.register_fake
def _(
    projected: Tensor,
    hidden: Tensor,
    memory: Tensor,
    weight: Tensor,
    peepholes: Tensor | None,
    gate_gain: Tensor | None,
    cell_gain: Tensor | None,
    cell_bias: Tensor | None,
    projection: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    reverse: bool,
    fused: bool,
    kept: bool,
) -> tuple[Tensor, ...]:
    steps = projected.shape[0]
    saved = _saved(projected, memory, gate_gain, projection, fused, steps if kept else None)
    return projected.new_empty(steps + 1, *hidden.shape), memory.new_empty(memory.shape), *saved


@torch.library.custom_op("lamina::lstm_sequence_backward", mutates_args=())
@without_autocast
def loop_backward(
    grad_states: Tensor | None,
    grad_last: Tensor | None,
    states: Tensor,
    memories: Tensor,
    products: Tensor,
    gates: Tensor,
    shown: Tensor,
    needed: Sequence[bool],
    projected: Tensor,
    hidden: Tensor,
    memory: Tensor,
    weight: Tensor,
    peepholes: Tensor | None,
    gate_gain: Tensor | None,
    cell_gain: Tensor | None,
    cell_bias: Tensor | None,
    projection: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    reverse: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first nine inputs of `loop`: of what is not `needed`, nothing to read."""
    steps, batch, width = projected.shape
    size, wide = width // 4, memories.dtype
    if grad_states is None:
        grad_states = torch.zeros_like(states)
    grad_states = grad_states.contiguous()
    parameters = _dense(weight, peepholes, gate_gain, cell_gain, cell_bias, projection)
    projected = projected.contiguous()

    def buffer(*shape: int, present: bool = True) -> Tensor:
        return projected.new_empty(shape if present else (shape[0], 0))

    # Of the gates before their nonlinearities, of the products, of the normalised memories, of the outputs.
    d_gates = buffer(steps, batch, width)
    d_products = buffer(steps, batch, width, present=gate_gain is not None)
    d_seen = buffer(steps, batch, size, present=cell_gain is not None)
    d_outputs = buffer(steps, *hidden.shape, present=projection is not None)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    d_memory = (
        memory.new_zeros(memory.shape, dtype=wide) if grad_last is None else grad_last.to(wide, copy=True)
    )
    d_memory = d_memory.contiguous()
    for start, end in chunks(steps, _longest(projected, fused), backwards=not reverse):
        left = None if lengths is None else lengths - start
        cotangents = grad_states[start:end] if reverse else grad_states[start + 1 : end + 1]
        inputs: list[Tensor | None] = [cotangents, projected[start:end], memories[start : end + 1]]
        inputs += [
            products[start:end],
            gates[start:end],
            left,
            *parameters,
            d_hidden.clone(),
            d_memory.clone(),
        ]
        outputs = [t[start:end] for t in (d_gates, d_products, d_seen, d_outputs)]
        _run("backward_steps", fused, inputs, [*outputs, d_hidden, d_memory], (eps, reverse))
    d_hidden = d_hidden + grad_states[steps if reverse else 0]
    d_memory = d_memory.to(memory.dtype, copy=True)

    of_weight, of_peepholes, of_gate_gain, of_cell_gain, of_cell_bias, of_projection = needed
    earlier, later = (1, 0) if reverse else (0, 1)
    d_weight, d_peepholes, d_gate_gain, d_cell_gain, d_cell_bias, d_projection = (buffer(0) for _ in range(6))
    if of_weight:
        of_product = d_gates if gate_gain is None else d_products
        d_weight = of_product.flatten(0, 1).t() @ states[earlier : steps + earlier].flatten(0, 1)
    if of_peepholes and peepholes is not None:
        before, after = (memories[n : steps + n].unsqueeze(2) for n in (earlier, later))
        four = d_gates.unflatten(2, (4, size))
        sums = _summed(four[:, :, :2], before), _summed(four[:, :, 3:], after)
        d_peepholes = torch.cat(sums).to(peepholes.dtype)
    if of_gate_gain and gate_gain is not None:
        d_gate_gain = _summed(d_gates, products, (width,), eps).to(gate_gain.dtype)
    if of_cell_gain and cell_gain is not None:
        d_cell_gain = _summed(d_seen, memories[later : steps + later], (size,), eps).to(cell_gain.dtype)
    if of_cell_bias and cell_bias is not None:
        d_cell_bias = d_seen.sum((0, 1), dtype=wide).to(cell_bias.dtype)
    if of_projection and projection is not None:
        d_projection = d_outputs.flatten(0, 1).t() @ shown.flatten(0, 1)
    of_parameters = d_weight, d_peepholes, d_gate_gain, d_cell_gain, d_cell_bias, d_projection
    return d_gates, d_hidden, d_memory, *of_parameters


@loop_backward.register_fake
def _(
    grad_states: Tensor | None,
    grad_last: Tensor | None,
    states: Tensor,
    memories: Tensor,
    products: Tensor,
    gates: Tensor,
    shown: Tensor,
    needed: Sequence[bool],
    *inputs: Any,
) -> tuple[Tensor, ...]:
    of_inputs = zip((True, True, True, *needed), inputs[:9], strict=True)
    return tuple(t.new_empty(t.shape) if wanted else states.new_empty(0) for wanted, t in of_inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, _, *saved = output
    *ctx.settings, _ = inputs[10:]
    ctx.save_for_backward(*inputs[:10], states, *saved)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_states: Tensor | None, grad_last: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    inputs, states_and_others = saved[:10], saved[10:]
    wanted = [n for n in range(9) if ctx.needs_input_grad[n]]
    gradients: list[Tensor | None] = [None] * 14
    if torch.is_grad_enabled():  # create_graph: a second derivative is wanted, which the definition has
        outputs = lstm_sequence_reference(*inputs, *ctx.settings[:2])
        pairs = [(o, g) for o, g in zip(outputs, (grad_states, grad_last), strict=True) if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [inputs[n] for n in wanted],
            [g for _, g in pairs],
            create_graph=True,
            materialize_grads=True,
        )
    else:
        needed = list(ctx.needs_input_grad[3:9])
        of_all = loop_backward(grad_states, grad_last, *states_and_others, needed, *inputs, *ctx.settings)
        found = tuple(of_all[n] for n in wanted)
    for n, gradient in zip(wanted, found, strict=True):
        gradients[n] = gradient
    return tuple(gradients)


loop.register_autograd(_backward, setup_context=_setup_context)


def _run(
    steps: str,
    fused: bool,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    options: tuple[float, bool],
) -> None:
    if fused:
        from .fused import lstm_sequence
        from .fused._recurrent_graphs import replay

        replay(getattr(lstm_sequence, steps), inputs, outputs, options)
    else:
        getattr(_lstm_steps, steps)(inputs, outputs, options)


def chunks(steps: int, longest: int, *, backwards: bool) -> Iterator[tuple[int, int]]:
    """Spans of `longest`, then of lesser powers of two: few graphs do for sequences of any length."""
    ends = [0]
    while ends[-1] < steps:
        ends.append(ends[-1] + min(longest, 1 << ((steps - ends[-1]).bit_length() - 1)))
    spans = list(itertools.pairwise(ends))
    return reversed(spans) if backwards else iter(spans)


def _longest(projected: Tensor, fused: bool) -> int:
    if fused:
        return LONGEST
    a_step = max(1, projected.shape[1] * projected.shape[2] * projected.element_size())
    return min(LONGEST, 1 << (max(1, CACHE // a_step).bit_length() - 1))


def _saved(
    projected: Tensor,
    memory: Tensor,
    gate_gain: Tensor | None,
    projection: Tensor | None,
    fused: bool,
    steps: int | None,
) -> list[Tensor]:
    """Memory for what the backward pass reads of so many steps; empty for None, and where a path has none."""
    wide = torch.promote_types(projected.dtype, torch.float32)
    rows = 0 if steps is None else steps
    batch, size = memory.shape
    widths = {
        "products": 4 * size if fused or gate_gain is not None else 0,
        "gates": 0 if fused else 4 * size,
        "shown": 0 if projection is None else size,
    }
    memories = projected.new_empty(0 if steps is None else steps + 1, batch, size, dtype=wide)
    return [memories, *(projected.new_empty(rows, batch, width) for width in widths.values())]


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _summed(
    gradient: Tensor, factor: Tensor, normalised: tuple[int] | None = None, eps: float = 0.0
) -> Tensor:
    """The product, over times and batch; the factor may have to be `normalised` first."""
    total = factor.new_zeros(gradient.shape[2:], dtype=torch.promote_types(factor.dtype, torch.float32))
    for of_chunk, by in zip(gradient.split(LONGEST), factor.split(LONGEST), strict=True):
        by = by.to(total.dtype)
        by = by if normalised is None else F.layer_norm(by, normalised, eps=eps)
        total += (of_chunk.to(total.dtype) * by).sum((0, 1))
    return total
