"""Whole sequences of the LSTMs that PyTorch has no routine for: peepholes, layer normalisation, both.

    a_t = N(U h_{t-1}) + x_t,   N(y) = gain * (y - mean) / deviation over all 4 H, or y
    i = sigmoid(a_i + p_i c_{t-1}),  f = sigmoid(a_f + p_f c_{t-1}),  g = tanh(a_g)
    c_t = f c_{t-1} + i g
    o = sigmoid(a_o + p_o c_t),  h_t = R (o tanh(N'(c_t)))

x_t, the input's share in the gates, is taken of all steps at once by whoever calls. What is left of a step is
one product and pointwise arithmetic: in one kernel on a GPU, where the steps are replayed from CUDA graphs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Refusals, choose, forward_derivatives, operation, transformed, triton_refusal
from .masking import mask_of_lengths

_WIDEST = 4096  # units that one program of the kernel normalises


def _refusals(
    projected: Tensor,
    weight: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    peepholes: Tensor | None = None,
    gate_gain: Tensor | None = None,
    cell_gain: Tensor | None = None,
    cell_bias: Tensor | None = None,
    projection: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    eps: float = 1e-5,
) -> Refusals:
    given = (projected, weight, *(state or ()), peepholes, gate_gain, cell_gain, cell_bias, projection)
    tensors = [t for t in given if t is not None]
    if not torch.compiler.is_compiling() and transformed():
        reason = "a transform of torch.func runs, which takes no registered operation"
        return {"triton": reason, "torch": reason}
    if forward_derivatives(*tensors):
        reason = "forward-mode derivatives are taken, which a registered operation has none of"
        return {"triton": reason, "torch": reason}
    refusals: Refusals = {}
    if projected.device.type != "cpu" and projected.dtype in (torch.float16, torch.bfloat16):
        refusals["torch"] = "it computes half precision in float32, which is no gain on a GPU"
    normalises = gate_gain is not None or cell_gain is not None
    if (reason_of_triton := triton_refusal(*tensors)) is not None:
        refusals["triton"] = reason_of_triton
    elif normalises and projected.shape[-1] // 4 > _WIDEST:
        refusals["triton"] = f"no program has the registers to normalise more than {_WIDEST} units"
    return refusals


@operation(_refusals)
def lstm_sequence(
    projected: Tensor,
    weight: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    peepholes: Tensor | None = None,
    gate_gain: Tensor | None = None,
    cell_gain: Tensor | None = None,
    cell_bias: Tensor | None = None,
    projection: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An LSTM along sequences of which the input's share in the gates is known: T steps as one operation.

    A plain LSTM is better off in `torch.nn.LSTM`, which cuDNN and oneDNN run; this is for peepholes and layer
    normalisation, which they have not. Time O(T B H P) in T products, one after the other. Where gradients
    are wanted, 5 T B H numbers are kept (the products and the memory; on a CPU 5 to 9), and the backward pass
    is a loop of its own, with one product for the gradient of U after it. Without gradients nothing is kept
    but the output.

    Deterministic where PyTorch's matrix product is. On a GPU the steps are captured, once for each size, in
    CUDA graphs of up to 64 steps, whose buffers stay (of the 32 that were used last); under
    `torch.use_deterministic_algorithms(True)`, on a stream of one's own and inside another capture they are
    launched one by one. Second derivatives, forward-mode derivatives and transforms of `torch.func` take the
    definition.

    Args:
        projected: (T, B, 4 H), time first; the gates in the order i, f, g, o, with every bias.
        weight: U, (4 H, P).
        state: the output (B, P) and the memory (B, H) before the first step; zeros where it is not given.
        peepholes: (3, H) for i, f and o.
        gate_gain: (4 H,); with it U h is normalised over all 4 H. (The bias of that normalisation is one with
            the other biases, in `projected`.)
        cell_gain: (H,); with it the memory is normalised on its way to the output, not in the memory itself.
        cell_bias: (H,), beside `cell_gain`; zeros where it is not given.
        projection: R, (P, H); P = H without it.
        lengths: (B,) of integers: from step `lengths[b]` on, sequence b is over. Which they are is not looked
            at.
        reverse: whether to run from the last step to the first, each sequence from its own last.
        eps: added to the variances.

    Returns:
        The outputs (T, B, P), zero behind a sequence's end, and the last state: the output (B, P) and the
        memory (B, H) after each sequence's last step (`reverse`: after its first). In the dtype of
        `projected`; the memory is carried in float32 at the least.

    Raises:
        ValueError: a shape or dtype does not fit `projected`, or there is a `cell_bias` without its gain.

    Reference:
        Gers, Schraudolph, Schmidhuber. Learning Precise Timing with LSTM Recurrent Networks. JMLR 3, 2002.
        Ba, Kiros, Hinton. Layer Normalization. 2016. arXiv:1607.06450. Equations 20 to 22.

    Example:
        >>> projected, weight = torch.randn(7, 2, 20), torch.randn(20, 5)
        >>> output, (hidden, memory) = lstm_sequence(projected, weight, gate_gain=torch.ones(20))
        >>> output.shape, memory.shape
        (torch.Size([7, 2, 5]), torch.Size([2, 5]))
    """
    if not projected.is_meta and torch.is_autocast_enabled(projected.device.type):
        # By hand: a registered operation gets no autocast, and the products of its steps shall have it.
        like = projected.dtype
        if like is not torch.float64:
            like = torch.get_autocast_dtype(projected.device.type)
        projected = projected.to(like)
        state = None if state is None else (state[0].to(like), state[1].to(like))
        weight = weight.to(like)
        peepholes, gate_gain, cell_gain, cell_bias, projection = (
            None if t is None else t.to(like)
            for t in (peepholes, gate_gain, cell_gain, cell_bias, projection)
        )
    _check(projected, weight, state, peepholes, gate_gain, cell_gain, cell_bias, projection, lengths)
    path = choose(
        "lstm_sequence",
        _refusals(
            projected,
            weight,
            state,
            peepholes=peepholes,
            gate_gain=gate_gain,
            cell_gain=cell_gain,
            cell_bias=cell_bias,
            projection=projection,
        ),
    )
    batch = projected.shape[1]
    if state is None:
        state = projected.new_zeros(batch, weight.shape[1]), projected.new_zeros(batch, weight.shape[0] // 4)
    if cell_gain is not None and cell_bias is None:
        cell_bias = torch.zeros_like(cell_gain)
    arguments = (
        *state,
        weight,
        peepholes,
        gate_gain,
        cell_gain,
        cell_bias,
        projection,
        lengths,
        eps,
        reverse,
    )
    if path == "reference":
        hidden, memory = lstm_sequence_reference(projected, *arguments)
    else:
        from ._lstm_loop import lstm_loop

        hidden, memory = lstm_loop(projected, *arguments, fused=path == "triton")
    output, last = (hidden[:-1], hidden[0]) if reverse else (hidden[1:], hidden[-1])
    if lengths is not None:
        over = ~mask_of_lengths(lengths, projected.shape[0]).T
        output = output.masked_fill(over.unsqueeze(-1), 0.0)
    return output, (last, memory)


def lstm_sequence_reference(
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
) -> tuple[Tensor, Tensor]:
    """The definition, in PyTorch: the states (T + 1, B, P), from the given one on, and the last memory."""
    steps, size = projected.shape[0], memory.shape[1]
    mask = None if lengths is None else mask_of_lengths(lengths, steps).T.unsqueeze(-1)
    states = [hidden]
    for t in reversed(range(steps)) if reverse else range(steps):
        product = F.linear(hidden, weight)
        if gate_gain is not None:
            product = F.layer_norm(product, (4 * size,), gate_gain, None, eps)
        i, f, g, o = (projected[t] + product).chunk(4, dim=-1)
        if peepholes is not None:
            i, f = i + peepholes[0] * memory, f + peepholes[1] * memory
        new = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        if peepholes is not None:
            o = o + peepholes[2] * new
        seen = new if cell_gain is None else F.layer_norm(new, (size,), cell_gain, cell_bias, eps)
        out = o.sigmoid() * seen.tanh()
        if projection is not None:
            out = F.linear(out, projection)
        # Where a sequence is over, or going back has not begun, its state stays.
        hidden = out if mask is None else torch.where(mask[t], out, hidden)
        memory = new if mask is None else torch.where(mask[t], new, memory)
        states.append(hidden)
    return torch.stack(states[::-1] if reverse else states), memory


def _check(
    projected: Tensor,
    weight: Tensor,
    state: tuple[Tensor, Tensor] | None,
    peepholes: Tensor | None,
    gate_gain: Tensor | None,
    cell_gain: Tensor | None,
    cell_bias: Tensor | None,
    projection: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if projected.ndim != 3 or projected.shape[2] % 4 or not projected.is_floating_point():
        found = f"{tuple(projected.shape)} of {projected.dtype}"
        raise ValueError(f"projected must be (T, B, 4 H) of floats, got {found}")
    batch, width = projected.shape[1:]
    size = width // 4
    outputs = size if projection is None or projection.ndim != 2 else projection.shape[0]
    wanted = {
        "weight": (weight, (width, outputs)),
        "state[0]": (None if state is None else state[0], (batch, outputs)),
        "state[1]": (None if state is None else state[1], (batch, size)),
        "peepholes": (peepholes, (3, size)),
        "gate_gain": (gate_gain, (width,)),
        "cell_gain": (cell_gain, (size,)),
        "cell_bias": (cell_bias, (size,)),
        "projection": (projection, (outputs, size)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != projected.dtype):
            found = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{name} must be {shape} of {projected.dtype}, got {found}")
    if cell_bias is not None and cell_gain is None:
        raise ValueError("cell_bias is added where the memory is normalised, which needs a cell_gain")
    if lengths is not None and (
        tuple(lengths.shape) != (batch,) or lengths.is_floating_point() or lengths.dtype is torch.bool
    ):
        found = f"{tuple(lengths.shape)} of {lengths.dtype}"
        raise ValueError(f"lengths must be ({batch},) of integers, got {found}")
