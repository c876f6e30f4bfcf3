"""One hop beside the expression that ports write: words embedded, weighted and summed, softmax, sum."""

import pytest
import torch
import torch.nn.functional as F
from lamina.layers import MemoryHop, SentenceEncoding
from torch import Tensor

# Batch, memories, words of a sentence (0: a memory is a word), vocabulary, dim.
SIZES = {
    "babi": (32, 50, 7, 180, 20),
    "babi-joint": (32, 50, 11, 200, 50),
    "language-model": (128, 100, 0, 10_000, 150),
    "long-sentences": (32, 50, 30, 20_000, 128),
}


def expression(hop: MemoryHop, words: int):
    """The weights of the places are made once, as ports do; the padding's embedding is zero."""
    device = hop.input_embedding.weight.device
    places = hop.encoding.weights(words).to(device) if words else None

    def represent(table: Tensor, temporal: Tensor, ids: Tensor) -> Tensor:
        embedded = F.embedding(ids, table, padding_idx=0)
        sentences = embedded if places is None else (embedded * places).sum(2)
        return sentences + temporal[: ids.shape[1]].flip(0)

    def call(state: Tensor, ids: Tensor) -> Tensor:
        keys = represent(hop.input_embedding.weight, hop.input_temporal.weight, ids)
        values = represent(hop.output_embedding.weight, hop.output_temporal.weight, ids)
        weights = torch.softmax((keys * state.unsqueeze(1)).sum(-1), -1)
        return state + (weights.unsqueeze(-1) * values).sum(1)

    return call


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["expression", "lamina"])
def bench_memory_hop(benchmark, benchmark_op, how, sizes, direction):
    batch, memories, words, vocab_size, dim = sizes
    benchmark.group = f"MemoryHop {sizes} {direction}"
    encoding = SentenceEncoding(dim, form="code", max_words=words or None)
    hop = MemoryHop(dim, vocab_size=vocab_size, max_memories=memories, encoding=encoding, padding_id=0)
    hop.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(1, vocab_size, (batch, memories, words) if words else (batch, memories))
    if words:
        ids = ids * (torch.arange(words) < torch.randint(1, words + 1, (batch, memories, 1)))
    backward = direction == "forward+backward"
    entries = [hop, expression(hop, words)]
    timed, other = entries if how == "lamina" else entries[::-1]
    parameters = list(hop.parameters()) if backward else ()
    benchmark_op(
        timed,
        [torch.randn(batch, dim), ids],
        backward=backward,
        parameters=parameters,
        reference=other,
        reference_parameters=parameters,
    )
