"""Recurrent cells, and the network that runs them. Cells start from a state: zeros hide the gradient of U."""

from collections.abc import Callable
from functools import partial

import torch
from contracts.case import Case
from lamina.layers import GRUCell, LSTMCell, Recurrent, RNNCell
from torch import Tensor


def step(*, state: tuple[int, ...]) -> dict[str, Callable[[torch.dtype], object]]:
    return {
        "args": lambda dtype: (torch.randn(2, 3, dtype=dtype),),
        "kwargs": lambda dtype: {"state": tuple(torch.randn(2, dim, dtype=dtype) for dim in state)},
    }


def sequences(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(2, 7, 3, dtype=dtype),)


def ragged(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.randn(3, 4, 3, dtype=dtype), torch.tensor([4, 0, 3])


PEEPHOLES = partial(LSTMCell, peepholes=True)
NORMALISED = partial(LSTMCell, layer_norm=True)
PAPER = partial(GRUCell, reset_after=False)

CASES = [
    Case("RNNCell", make=lambda **factory: RNNCell(3, 5, **factory), **step(state=(5,))),
    Case(
        "RNNCell relu", make=lambda **factory: RNNCell(3, 5, activation="relu", **factory), **step(state=(5,))
    ),
    Case("LSTMCell", make=lambda **factory: LSTMCell(3, 5, **factory), **step(state=(5, 5))),
    Case(
        "LSTMCell peepholes projection",
        make=lambda **factory: PEEPHOLES(3, 5, projection_dim=2, **factory),
        **step(state=(2, 5)),
    ),
    Case(
        "LSTMCell normalised",
        make=lambda **factory: LSTMCell(3, 5, layer_norm=True, **factory),
        **step(state=(5, 5)),
    ),
    Case("GRUCell", make=lambda **factory: GRUCell(3, 5, **factory), **step(state=(5,))),
    Case("GRUCell paper", make=lambda **factory: PAPER(3, 5, **factory), **step(state=(5,))),
    Case(
        "Recurrent LSTM",
        make=lambda **factory: Recurrent(LSTMCell, 3, 5, num_layers=2, bidirectional=True, **factory),
        args=sequences,
    ),
    Case(
        "Recurrent LSTM projection",
        make=lambda **factory: Recurrent(partial(LSTMCell, projection_dim=2), 3, 5, **factory),
        args=sequences,
    ),
    Case("Recurrent GRU", make=lambda **factory: Recurrent(GRUCell, 3, 5, **factory), args=sequences),
    Case("Recurrent RNN", make=lambda **factory: Recurrent(RNNCell, 3, 5, **factory), args=sequences),
    Case("Recurrent peepholes", make=lambda **factory: Recurrent(PEEPHOLES, 3, 5, **factory), args=sequences),
    Case(
        "Recurrent normalised lengths",
        make=lambda **factory: Recurrent(NORMALISED, 3, 5, bidirectional=True, **factory),
        args=ragged,
        dynamic=((0,), (0,)),
    ),
    Case(
        "Recurrent lengths",
        make=lambda **factory: Recurrent(LSTMCell, 3, 5, num_layers=2, bidirectional=True, **factory),
        args=ragged,
        dynamic=((0,), (0,)),
    ),
    Case(
        "Recurrent paper lengths",
        make=lambda **factory: Recurrent(PAPER, 3, 5, bidirectional=True, **factory),
        args=ragged,
        dynamic=((0,), (0,)),
    ),
]
