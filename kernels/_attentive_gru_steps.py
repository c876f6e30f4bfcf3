"""Some steps of `lamina.kernels.attentive_gru` in PyTorch, and the way back: in place, few calls a step.

tanh(q + k) is 1 - 2 / (1 + e^2q e^2k): the exponentials are of a query's and a key's numbers, and what is
left for every pair is a product and a reciprocal. Where a number is so large that one would overflow, tanh is
taken of the sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .masking import masked_softmax

_BOUND = 40.0  # e^80 and e^-80 are float32s
_FEW = 2**13  # pairs of numbers, of which as many tanh are taken as fast


def forward_steps(inputs: Sequence[Any], outputs: Sequence[Tensor], options: tuple[int, ...]) -> None:
    """Writes states (from the given one on), contexts, weights, gates, and the states' products."""
    projected, state, joint, of_candidate, context_weight, keys, values, energy, key_mask = inputs
    size, hidden = state.shape[1], len(energy)
    states, contexts, weights, gates, products = (t.unbind(0) for t in outputs)
    r_z, n = (t.unbind(0) for t in outputs[3].split((2 * size, size), dim=-1))
    r, z = (t.unbind(0) for t in outputs[3][..., : 2 * size].chunk(2, dim=-1))
    queries, gates_of_state = (t.unbind(0) for t in outputs[4].split((hidden, 2 * size), dim=-1))
    as_rows = outputs[1].unsqueeze(2).unbind(0)
    shares, of_state, of_context, of_reset = (
        projected.unbind(0),
        joint.t(),
        context_weight.t(),
        of_candidate.t(),
    )
    states[0].copy_(state)
    pairs = Pairs(keys, energy)
    for t in range(len(shares)):
        torch.mm(states[t], of_state, out=products[t])
        scores = pairs.scores(queries[t])
        if key_mask is None:
            torch.softmax(scores, -1, out=weights[t])
        else:
            weights[t].copy_(masked_softmax(scores, key_mask))
        torch.bmm(weights[t].unsqueeze(1), values, out=as_rows[t])
        torch.addmm(shares[t], contexts[t], of_context, out=gates[t])
        r_z[t].add_(gates_of_state[t]).sigmoid_()
        n[t].addmm_(r[t] * states[t], of_reset).tanh_()
        torch.lerp(n[t], states[t], z[t], out=states[t + 1])


def backward_steps(inputs: Sequence[Any], outputs: Sequence[Tensor], options: tuple[int, ...]) -> None:
    """Writes the gradients of gates, products and contexts, and adds to those of state, keys and energy."""
    d_states, d_own_contexts, d_own_weights, states, weights, gates, products = inputs[:7]
    joint, of_candidate, context_weight, keys, values, energy, d_state, d_keys, d_energy = inputs[7:]
    d_gates, d_products, d_contexts, carried, of_keys, of_energy = outputs
    size, hidden = d_state.shape[1], len(energy)
    carried.copy_(d_state)
    of_keys.copy_(d_keys)
    of_energy.copy_(d_energy)
    pairs = Pairs(keys, energy)
    # What a step's gradients are multiplied by is known of all steps beforehand.
    r, z, n = gates.chunk(3, dim=-1)
    before = states[:-1]
    to_n, to_z = (1 - z) * (1 - n * n), (before - n) * z * (1 - z)
    to_r = before * r * (1 - r)
    for t in reversed(range(len(gates))):
        total = d_states[t] + carried
        d_r, d_z, d_n = d_gates[t].chunk(3, dim=-1)
        torch.mul(total, to_n[t], out=d_n)
        torch.mul(total, to_z[t], out=d_z)
        d_reset = d_n @ of_candidate
        torch.mul(d_reset, to_r[t], out=d_r)
        torch.addmm(d_own_contexts[t], d_gates[t], context_weight, out=d_contexts[t])
        d_weights = torch.bmm(values, d_contexts[t].unsqueeze(-1)).squeeze(-1)
        if d_own_weights is not None:
            d_weights += d_own_weights[t]
        d_scores = weights[t] * (d_weights - (weights[t] * d_weights).sum(-1, keepdim=True))
        d_query, d_gates_of_state = d_products[t].split((hidden, 2 * size), dim=-1)
        d_query.copy_(pairs.backward(products[t][:, :hidden], d_scores, of_keys, of_energy))
        d_gates_of_state.copy_(d_gates[t][:, : 2 * size])
        torch.mul(total, z[t], out=carried).addcmul_(d_reset, r[t]).addmm_(d_products[t], joint)


class Pairs:
    """The scores of all keys for a query, and their gradients, in memory that is used again."""

    def __init__(self, keys: Tensor, energy: Tensor) -> None:
        self.keys, self.energy, self.total = keys, energy, energy.sum()
        self.factored = keys.numel() >= _FEW and bool(keys.abs().max() <= _BOUND)
        self.of_keys = (2 * keys).exp_() if self.factored else None
        self.pairs, self.slopes = torch.empty_like(keys), torch.empty_like(keys)

    def scores(self, queries: Tensor) -> Tensor:
        """(B, S), of queries (B, A)."""
        halves = self._halves(queries)
        if halves is None:
            return torch.add(self.keys, queries.unsqueeze(1), out=self.pairs).tanh_() @ self.energy
        return torch.add(self.total, halves @ self.energy, alpha=-2)

    def backward(self, queries: Tensor, d_scores: Tensor, d_keys: Tensor, d_energy: Tensor) -> Tensor:
        """The queries' gradients; those of keys and energy are added to."""
        halves = self._halves(queries)
        if halves is None:
            tanh = torch.add(self.keys, queries.unsqueeze(1), out=self.pairs).tanh_()
            d_energy += d_scores.flatten() @ tanh.flatten(0, 1)
            torch.addcmul(self.energy, self.energy * tanh, tanh, value=-1, out=self.slopes)
        else:
            d_energy += d_scores.sum() - 2 * (d_scores.flatten() @ halves.flatten(0, 1))
            torch.addcmul(halves, halves, halves, value=-1, out=self.slopes)  # a quarter of 1 - tanh^2
            self.slopes *= 4 * self.energy
        d_keys.addcmul_(self.slopes, d_scores.unsqueeze(-1))
        return torch.bmm(d_scores.unsqueeze(1), self.slopes).squeeze(1)

    def _halves(self, queries: Tensor) -> Tensor | None:
        """(1 - tanh) / 2; or None where the exponentials cannot be taken apart, or that is no gain."""
        if self.of_keys is None or not bool((queries.abs() <= _BOUND).all()):
            return None
        of_queries = (2 * queries).exp_().unsqueeze(1)
        return torch.mul(self.of_keys, of_queries, out=self.pairs).add_(1).reciprocal_()
