"""A decoder with attention in its loop (Bahdanau et al., 2015, appendix A): all T steps as one operation.

    score[j] = energy . tanh(W s_{t-1} + key[j]),  c_t = sum_j softmax_j(score) value[j]
    r, z = sigmoid(x_t + U s_{t-1} + C c_t),  n = tanh(x_t + U (r * s_{t-1}) + C c_t)
    s_t = (1 - z) n + z s_{t-1}

x_t, what a step knows beforehand, is projected for all steps at once by whoever calls, as the keys are. What
is left of a step is small, and waits for the step before: launches are what it costs, so that on a GPU they
are few, and replayed from CUDA graphs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Refusals, choose, forward_derivatives, operation, transformed, triton_refusal
from .checks import check_key_mask
from .masking import masked_softmax

_LONGEST = 8192  # keys whose scores a program holds


def _refusals(
    projected: Tensor,
    state: Tensor,
    weight: Tensor,
    context_weight: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    energy: Tensor,
    *,
    key_mask: Tensor | None = None,
) -> Refusals:
    tensors = (projected, state, weight, context_weight, query_weight, keys, values, energy)
    if not torch.compiler.is_compiling() and transformed():
        reason = "a transform of torch.func runs, which takes no registered operation"
        return {"triton": reason, "torch": reason}
    if forward_derivatives(*tensors):
        reason = "forward-mode derivatives are taken, which a registered operation has none of"
        return {"triton": reason, "torch": reason}
    refusals: Refusals = {}
    if projected.device.type != "cpu":
        refusals["torch"] = "its exponentials are looked at for overflow, for which a GPU would be waited for"
    if (reason_of_triton := triton_refusal(*tensors)) is not None:
        refusals["triton"] = reason_of_triton
    elif keys.ndim == 3 and keys.shape[1] > _LONGEST:
        refusals["triton"] = f"a program holds the scores of {_LONGEST} keys at most, not {keys.shape[1]}"
    return refusals


@operation(_refusals)
def attentive_gru(
    projected: Tensor,
    state: Tensor,
    weight: Tensor,
    context_weight: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    energy: Tensor,
    *,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A GRU of the papers' form (`GRUCell(reset_after=False)`) whose every step attends with its last state.

    With teacher forcing the whole decoder is one call; a decoder that feeds on its own words calls it a step
    at a time. Time O(T B (S (A + C) + H (H + A + C))). The definition keeps T tensors of (B, S, A) for its
    backward pass; the other paths keep O(T B (S + A + C + H)), and compute the rest again.

    Deterministic where PyTorch's matrix product is. On a GPU the steps are captured in CUDA graphs, as those
    of `lstm_sequence`. Second derivatives, forward-mode derivatives and transforms of `torch.func` take the
    definition.

    Args:
        projected: (T, B, 3 H), time first; the gates in the order r, z, n, with every bias.
        state: (B, H), before the first step.
        weight: U, (3 H, H).
        context_weight: C, (3 H, C).
        query_weight: W, (A, H).
        keys: (B, S, A), the annotations' side of the scores, already projected.
        values: (B, S, C), the annotations.
        energy: (A,).
        key_mask: (B, S) of bool, True where a key takes part. Without any, the context is zero.

    Returns:
        The states s_1 to s_T (T, B, H), the contexts c_1 to c_T (T, B, C), and the attention weights
        (T, B, S), all differentiable.

    Raises:
        ValueError: a shape or dtype does not fit the others.

    Reference:
        Bahdanau, Cho, Bengio. Neural Machine Translation by Jointly Learning to Align and Translate. ICLR
        2015. Appendices A.1.2 and A.2.2. What z multiplies is as in `GRUCell`.

    Example:
        >>> B, S, T, A, C, H = 2, 7, 3, 4, 6, 5
        >>> weights = [torch.randn(3 * H, size) for size in (H, C)] + [torch.randn(A, H)]
        >>> memory = torch.randn(B, S, A), torch.randn(B, S, C), torch.randn(A)
        >>> words, state = torch.randn(T, B, 3 * H), torch.zeros(B, H)
        >>> states, contexts, _ = attentive_gru(words, state, *weights, *memory)
        >>> states.shape, contexts.shape
        (torch.Size([3, 2, 5]), torch.Size([3, 2, 6]))
    """
    arguments = (projected, state, weight, context_weight, query_weight, keys, values, energy)
    device = projected.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and projected.dtype is not torch.float64:
        # By hand: a registered operation gets no autocast, and the products of its steps shall have it.
        dtype = torch.get_autocast_dtype(device)
        projected, state, weight, context_weight = (t.to(dtype) for t in arguments[:4])
        query_weight, keys, values, energy = (t.to(dtype) for t in arguments[4:])
        arguments = (projected, state, weight, context_weight, query_weight, keys, values, energy)
    _check(*arguments, key_mask)
    path = choose("attentive_gru", _refusals(*arguments, key_mask=key_mask))
    if path == "reference":
        states, contexts, weights = attentive_gru_reference(*arguments, key_mask)
    else:
        from ._attentive_gru_loop import attentive_loop

        states, contexts, weights = attentive_loop(*arguments, key_mask, fused=path == "triton")
    return states[1:], contexts, weights


def attentive_gru_reference(
    projected: Tensor,
    state: Tensor,
    weight: Tensor,
    context_weight: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    energy: Tensor,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in PyTorch: the states (T + 1, B, H) from the given one on, contexts and weights."""
    sizes = (2 * state.shape[1], state.shape[1])
    of_gates, of_candidate = weight.split(sizes)
    states, contexts, weights = [state], [], []
    for step in projected:
        scores = torch.tanh(F.linear(state, query_weight).unsqueeze(1) + keys) @ energy
        alignment = masked_softmax(scores, key_mask)
        context = (alignment.unsqueeze(1) @ values).squeeze(1)
        gates, candidate = (step + F.linear(context, context_weight)).split(sizes, dim=-1)
        r, z = (gates + F.linear(state, of_gates)).sigmoid().chunk(2, dim=-1)
        n = (candidate + F.linear(r * state, of_candidate)).tanh()
        state = n + z * (state - n)
        states.append(state)
        contexts.append(context)
        weights.append(alignment)
    if not contexts:
        (batch, length), size = keys.shape[:2], values.shape[2]
        return state.unsqueeze(0), values.new_zeros(0, batch, size), values.new_zeros(0, batch, length)
    return torch.stack(states), torch.stack(contexts), torch.stack(weights)


def _check(
    projected: Tensor,
    state: Tensor,
    weight: Tensor,
    context_weight: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    energy: Tensor,
    key_mask: Tensor | None,
) -> None:
    if projected.ndim != 3 or projected.shape[2] % 3 or not projected.is_floating_point():
        found = f"{tuple(projected.shape)} of {projected.dtype}"
        raise ValueError(f"projected must be (T, B, 3 H) of floats, got {found}")
    for name, tensor in ("keys", keys), ("values", values):
        if tensor.ndim != 3:
            raise ValueError(f"{name} must be (B, S, size), got {tuple(tensor.shape)}")
    batch, width = projected.shape[1:]
    size, (length, hidden), context = width // 3, keys.shape[1:], values.shape[2]
    wanted = {
        "state": (state, (batch, size)),
        "weight": (weight, (width, size)),
        "context_weight": (context_weight, (width, context)),
        "query_weight": (query_weight, (hidden, size)),
        "keys": (keys, (batch, length, hidden)),
        "values": (values, (batch, length, context)),
        "energy": (energy, (hidden,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != projected.dtype:
            found = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{name} must be {shape} of {projected.dtype}, got {found}")
    if key_mask is not None and tuple(key_mask.shape) != (batch, length):
        raise ValueError(f"key_mask must be {(batch, length)}, got {tuple(key_mask.shape)}")
    check_key_mask(key_mask, (batch, length), "(B, S)")
