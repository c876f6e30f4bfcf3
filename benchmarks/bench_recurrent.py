"""Recurrent networks beside torch.nn's with the same weights: in one call, as a loop, ragged.

Variants that torch.nn lacks, which `lstm_sequence` runs, and `attentive_gru` stand beside their own loops.
"""

import math
from functools import partial

import pytest
import torch
from lamina.kernels import attentive_gru, use_backend
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


VARIANTS = {
    "peepholes": {"peepholes": True},
    "layer norm": {"layer_norm": True},
    "both, projected": {"peepholes": True, "layer_norm": True, "projection_dim": 64},
}


@directions
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["triton", "torch", "compiled", "cell by cell"])
@pytest.mark.parametrize("variant", VARIANTS)
def bench_variants(benchmark, benchmark_op, variant, how, sizes, direction):
    """LSTMs that no routine runs. On a GPU the first calls record CUDA graphs, before anything is timed."""
    batch, steps, dim = sizes
    if how == "triton" and DEVICE == "cpu":
        pytest.skip("Triton needs a CUDA device")
    if how == "compiled" and (DEVICE == "cpu" or steps > 50):
        pytest.skip("an unrolled loop takes minutes to compile")
    benchmark.group = f"Recurrent {variant} {sizes} {direction}"
    network = Recurrent(partial(LSTMCell, **VARIANTS[variant]), dim, dim).to(DEVICE)
    backward = direction == "forward+backward"
    # From a state of zero, a layer norm divides rounding errors by next to nothing; and with products as
    # large as it makes them, a hundred steps are chaos. Neither can be compared.
    state = tuple(torch.randn_like(part) for part in network.initial_state(batch))
    for name, parameter in network.named_parameters():
        if name.endswith("gain_hh"):
            torch.nn.init.constant_(parameter, 0.1)

    def run(backend: str, input: torch.Tensor) -> torch.Tensor:
        with use_backend(backend):
            return network(input, state=state)[0]

    loop = partial(run, "reference")
    operation = {
        "compiled": torch.compile(loop) if how == "compiled" else loop,
        "cell by cell": loop,
    }.get(how) or partial(run, how)
    outputs, b = network.output_dim, torch.finfo(torch.float32).bits // 8
    products = batch * steps * 8 * dim * (dim + outputs) + 2 * batch * steps * dim * (outputs % dim)
    # Of a step the recurrent weights are read, which stay in a cache, and what it has of its own.
    once = batch * steps * (dim + 4 * dim + outputs) * b + 4 * dim * (dim + outputs) * b
    benchmark_op(
        operation,
        [torch.randn(batch, steps, dim)],
        backward=backward,
        parameters=list(network.parameters()) if backward else (),
        reference=loop,
        reference_parameters=list(network.parameters()) if backward else (),
        flops=(3 if backward else 1) * products,
        bytes_moved=(3 if backward else 1) * once,
    )


# T, B, H, C, A, S: a small decoder, and the paper's with 50 words a sentence.
DECODERS = {
    "B32-T20-S20-H128": (20, 32, 128, 256, 128, 20),
    "B80-T50-S50-H1000": (50, 80, 1000, 2000, 1000, 50),
}


@directions
@pytest.mark.parametrize("sizes", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("how", ["triton", "torch", "compiled", "step by step"])
def bench_attentive_gru(benchmark, benchmark_op, how, sizes, direction):
    """A decoder that attends at every step, with teacher forcing."""
    T, B, H, C, A, S = sizes
    if DEVICE == "cpu" and (how in ("triton", "compiled") or H > 128):
        pytest.skip("for a CUDA device")
    benchmark.group = f"attentive_gru {sizes} {direction}"
    shapes = [(T, B, 3 * H), (B, H), (3 * H, H), (3 * H, C), (A, H), (B, S, A), (B, S, C), (A,)]

    def run(backend: str, *inputs: torch.Tensor) -> torch.Tensor:
        with use_backend(backend):
            states, contexts, _ = attentive_gru(*inputs)
        return torch.cat([states, contexts], -1)

    loop, backward = partial(run, "reference"), direction == "forward+backward"
    operations = {"compiled": torch.compile(loop), "step by step": loop}
    products = 2 * T * B * (3 * H * (H + C) + A * H + S * (A + C))
    benchmark_op(
        operations.get(how) or partial(run, how),
        [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes],
        backward=backward,
        reference=loop,
        flops=(3 if backward else 1) * products,
        bytes_moved=(3 if backward else 1) * 4 * sum(math.prod(shape) for shape in shapes),
    )
