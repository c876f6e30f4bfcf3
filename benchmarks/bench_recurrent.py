"""Recurrent networks beside torch.nn's with the same weights: in one call, as a loop, and ragged."""

from functools import partial

import pytest
import torch
from lamina.kernels import use_backend
from lamina.layers import GRUCell, LSTMCell, Recurrent
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

SIZES = {"B32-T50-H512": (32, 50, 512), "B1-T50-H128": (1, 50, 128), "B8-T100-H128": (8, 100, 128)}
CELLS = {"lstm": (LSTMCell, nn.LSTM, 4), "gru": (GRUCell, nn.GRU, 3)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

directions = pytest.mark.parametrize("direction", ["forward", "forward+backward"])


def twins(kind: str, dim: int) -> tuple[Recurrent, nn.RNNBase]:
    cell, peer, _ = CELLS[kind]
    theirs = peer(dim, dim, batch_first=True)
    ours = Recurrent(partial(cell, recurrent_bias=True), dim, dim)
    ours.load_torch_state_dict(theirs.state_dict())
    return ours.to(DEVICE), theirs.to(DEVICE)


def flops(kind: str, batch: int, steps: float, dim: int, direction: str) -> float:
    return (2 if direction == "forward" else 6) * batch * steps * CELLS[kind][2] * 2 * dim**2


@directions
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "torch.nn", "loop"])
@pytest.mark.parametrize("kind", CELLS)
def bench_recurrent(benchmark, benchmark_op, kind, how, sizes, direction):
    batch, steps, dim = sizes
    benchmark.group = f"Recurrent {kind} {sizes} {direction}"
    ours, theirs = twins(kind, dim)
    module = theirs if how == "torch.nn" else ours
    backward = direction == "forward+backward"
    with use_backend("reference" if how == "loop" else "torch"):
        benchmark_op(
            lambda input: module(input)[0],
            [torch.randn(batch, steps, dim)],
            backward=backward,
            parameters=list(module.parameters()) if backward else (),
            reference=lambda input: theirs(input)[0],
            reference_parameters=list(theirs.parameters()) if backward else (),
            flops=flops(kind, batch, steps, dim, direction),
        )


@directions
@pytest.mark.parametrize("how", ["lamina", "torch.nn"])
@pytest.mark.parametrize("kind", CELLS)
def bench_ragged(benchmark, benchmark_op, kind, how, direction):
    """Lengths from 1 to 50, which torch.nn wants packed by hand."""
    batch, steps, dim = 32, 50, 128
    benchmark.group = f"Recurrent {kind} lengths 1 to {steps} {direction}"
    ours, theirs = twins(kind, dim)
    lengths = torch.linspace(1, steps, batch).long()

    def packed(input):
        sequence = pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(theirs(sequence)[0], batch_first=True, total_length=steps)[0]

    backward = direction == "forward+backward"
    benchmark_op(
        packed if how == "torch.nn" else lambda input: ours(input, lengths)[0],
        [torch.randn(batch, steps, dim)],
        backward=backward,
        parameters=list((theirs if how == "torch.nn" else ours).parameters()) if backward else (),
        reference=packed,
        reference_parameters=list(theirs.parameters()) if backward else (),
        flops=flops(kind, batch, float(lengths.double().mean()), dim, direction),
    )


@directions
@pytest.mark.parametrize("how", ["lamina", "cell by cell"])
def bench_peepholes(benchmark, benchmark_op, how, direction):
    """No routine has peepholes: what taking the input's share of all steps at once saves."""
    batch, steps, dim = SIZES["B8-T100-H128"]
    benchmark.group = f"Recurrent peepholes {direction}"
    network = Recurrent(partial(LSTMCell, peepholes=True), dim, dim).to(DEVICE)
    backward = direction == "forward+backward"
    with use_backend("torch" if how == "lamina" else "reference"):
        benchmark_op(
            lambda input: network(input)[0],
            [torch.randn(batch, steps, dim)],
            backward=backward,
            parameters=list(network.parameters()) if backward else (),
            reference=lambda input: network(input)[0],
            flops=flops("lstm", batch, steps, dim, direction),
        )
