"""Additive attention scores (Bahdanau et al., 2015, eq. 6).

    score[b, i, j] = sum_h  energy[h] * tanh(query[b, i, h] + key[b, j, h])

The definition materialises the (B, Lq, Lk, H) tanh. The fused kernels never do: they hold one
tile of scores in registers and walk over H, and the backward pass walks again instead of having
stored it. Memory falls from O(Lq * Lk * H) to O(Lq * Lk).
"""

import torch
from torch import Tensor

from .backend import Refusals, choose, operation, triton_refusal


def _refusals(query: Tensor, key: Tensor, energy: Tensor) -> Refusals:
    refusals: Refusals = {"torch": "PyTorch has no routine for it: the definition is its fastest expression"}
    if (reason := triton_refusal(query, key, energy)) is not None:
        refusals["triton"] = reason
    return refusals


@operation(_refusals)
def additive_scores(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    """Scores every query against every key with a one-layer tanh network.

    Time O(Lq Lk H). The definition needs O(Lq Lk H) memory, the kernel O(Lq Lk). Both are deterministic, and
    twice differentiable (the kernel through the definition); a forward-mode derivative takes the definition.

    Args:
        query: (B, Lq, H), already projected.
        key: (B, Lk, H), already projected.
        energy: (H,), what each hidden unit adds to a score.

    Returns:
        (B, Lq, Lk) scores, before the softmax.

    Raises:
        ValueError: the three do not share H, query and key do not share B, or the dtypes differ.
    """
    if not (
        (query.ndim, key.ndim, energy.ndim) == (3, 3, 1)
        and query.shape[-1] == key.shape[-1] == energy.shape[-1]
        and query.shape[0] == key.shape[0]
    ):
        raise ValueError(
            "expected query (B, Lq, H), key (B, Lk, H) and energy (H,), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(energy.shape)}"
        )
    if torch.is_autocast_enabled(query.device.type):
        # By hand: a registered operation gets no autocast, and the projections that led here did.
        key, energy = key.to(query.dtype), energy.to(query.dtype)
    if not query.dtype == key.dtype == energy.dtype:
        raise ValueError(
            f"query, key and energy must share one dtype, got {query.dtype}, {key.dtype} and {energy.dtype}"
        )
    if choose("additive_scores", _refusals(query, key, energy)) == "triton":
        from .fused import additive_scores as fused

        return fused.additive_scores(query.contiguous(), key.contiguous(), energy.contiguous())
    return additive_scores_reference(query, key, energy)


def additive_scores_reference(query: Tensor, key: Tensor, energy: Tensor) -> Tensor:
    """The definition, in PyTorch: what the kernels are tested against, and the path on a CPU."""
    return torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ energy
