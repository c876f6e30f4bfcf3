"""Additive attention scores (Bahdanau et al., 2015, eq. 6).

    score[b, i, j] = sum_h  energy[h] * tanh(query[b, i, h] + key[b, j, h])

The definition materialises the (B, Lq, Lk, H) tanh. No other path does: the kernels hold a tile of scores in
registers and walk over H, on a CPU tiles stay in its cache, and both walk again in the backward pass instead
of having stored anything. Memory falls from O(Lq Lk H) to O(Lq Lk). And hardly any tanh is taken, by

    tanh(a + b) = 1 - 2 / (1 + e^2a e^2b)

whose exponentials belong to one token each. Where they would overflow, or where all tanh are so small that
the difference has few of their digits, another form of the tanh takes the place of this one.
"""

import torch
from torch import Tensor

from .backend import (
    Refusals,
    choose,
    forced_backend,
    forward_derivatives,
    operation,
    transformed,
    triton_refusal,
)

# Up to so many tanh, or with fewer queries or keys, the definition is about as fast on a CPU: what surrounds
# the tiles takes as long then, or the exponentials, of which each token has as many as hidden units.
SMALL, FEW = 2**17, 4


def refusals(query: Tensor, key: Tensor, energy: Tensor) -> Refusals:
    """Of every operation that begins with these scores."""
    found: Refusals = {}
    queries, keys = query.shape[1], key.shape[1]
    if (reason := triton_refusal(query, key, energy)) is not None:
        found["triton"] = reason
    if not query.is_cpu:
        found["torch"] = "PyTorch has no routine for it: the definition is its fastest expression"
    elif forward_derivatives(query, key, energy):
        found["torch"] = "forward-mode derivatives are taken, which a registered operation does not have"
    elif torch.compiler.is_compiling():  # other sizes than 1 would be pinned by a branch
        if forced_backend() is None and (queries == 1 or keys == 1):
            found["torch"] = "to one token as many exponentials as tanh are taken"
    elif transformed():
        found["torch"] = "a transform of torch.func cannot look into a registered operation"
    elif forced_backend() is None and (query.numel() * keys <= SMALL or min(queries, keys) < FEW):
        found["torch"] = f"up to {SMALL} tanh, or below {FEW} tokens, the definition is as fast on a CPU"
    return found


@operation(refusals)
def additive_scores(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    """Scores every query against every key with a one-layer tanh network.

    Time O(Lq Lk H). The definition needs O(Lq Lk H) memory; the kernel and a CPU's tiles O(Lq Lk), and
    O((Lq + Lk) H) for exponentials. All are deterministic, and twice differentiable (the latter two through
    the definition); a forward-mode derivative takes the definition.

    Args:
        query: (B, Lq, H), already projected.
        key: (B, Lk, H), already projected.
        energy: (H,), what each hidden unit adds to a score.

    Returns:
        (B, Lq, Lk) scores, before the softmax.

    Raises:
        ValueError: the three do not share H, query and key do not share B, or the dtypes differ.
    """
    query, key, energy = in_one_dtype(query, key, energy)
    check_tokens(query, key, energy)
    path = choose("additive_scores", refusals(query, key, energy))
    if path == "reference":
        return additive_scores_reference(query, key, energy)
    if path == "torch":
        from ._additive_tiles import tiled_scores

        return tiled_scores(query, key, energy)
    from .fused.additive_scores import additive_scores as fused

    out: Tensor = fused(query.contiguous(), key.contiguous(), energy.contiguous())
    return out


def additive_scores_reference(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    """The definition, in PyTorch: what every other path is tested against."""
    return torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ energy


def in_one_dtype(query: Tensor, key: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast as the projections that led here, by hand: a registered operation gets no autocast."""
    if torch.is_autocast_enabled(query.device.type):
        key, energy = key.to(query.dtype), energy.to(query.dtype)
    return query, key, energy


def check_tokens(query: Tensor, key: Tensor, energy: Tensor) -> None:
    """Raises the ValueError of `additive_scores`."""
    if not (
        (query.ndim, key.ndim, energy.ndim) == (3, 3, 1)
        and query.shape[-1] == key.shape[-1] == energy.shape[-1]
        and query.shape[0] == key.shape[0]
    ):
        raise ValueError(
            "expected query (B, Lq, H), key (B, Lk, H) and energy (H,), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(energy.shape)}"
        )
    if not query.dtype == key.dtype == energy.dtype:
        raise ValueError(
            f"query, key and energy must share one dtype, got {query.dtype}, {key.dtype} and {energy.dtype}"
        )
