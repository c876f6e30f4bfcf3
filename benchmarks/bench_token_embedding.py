"""Token embedding beside `nn.Embedding` times sqrt(dim); tied logits beside `F.linear` on its weight."""

import pytest
import torch
import torch.nn.functional as F
from lamina.layers import TokenEmbedding
from torch import Tensor, nn

# Vocabulary, dim, batch, length.
SIZES = {"transformer": (37_000, 512, 16, 50), "bert": (30_522, 768, 4, 128), "small": (10_000, 256, 64, 20)}


def twins(vocab_size: int, dim: int) -> tuple[TokenEmbedding, nn.Embedding]:
    ours = TokenEmbedding(vocab_size, dim, padding_id=0, scale=True)
    theirs = nn.Embedding(vocab_size, dim, padding_idx=0)
    theirs.load_state_dict(ours.state_dict())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ours.to(device), theirs.to(device)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["torch.nn", "lamina"])
def bench_token_embedding(benchmark, benchmark_op, how, sizes, direction):
    vocab_size, dim, batch, length = sizes
    benchmark.group = f"TokenEmbedding {sizes} {direction}"
    ours, theirs = twins(vocab_size, dim)
    scale, backward = dim**0.5, direction == "forward+backward"

    def peer(ids: Tensor) -> Tensor:
        return theirs(ids) * scale

    entries = [(ours, ours), (peer, theirs)]
    (timed, layer), (other, others) = entries if how == "lamina" else entries[::-1]
    benchmark_op(
        timed,
        [torch.randint(1, vocab_size, (batch, length))],
        backward=backward,
        parameters=list(layer.parameters()) if backward else (),
        reference=other,
        reference_parameters=list(others.parameters()) if backward else (),
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("how", ["torch.nn", "lamina"])
def bench_tied_logits(benchmark, benchmark_op, how, direction):
    vocab_size, dim, tokens = 10_000, 256, 256
    benchmark.group = f"TokenEmbedding.logits {(vocab_size, dim, tokens)} {direction}"
    ours, theirs = twins(vocab_size, dim)
    backward = direction == "forward+backward"

    def peer(hidden: Tensor) -> Tensor:
        return F.linear(hidden, theirs.weight)

    entries = [(ours.logits, ours), (peer, theirs)]
    (timed, layer), (other, others) = entries if how == "lamina" else entries[::-1]
    benchmark_op(
        timed,
        [torch.randn(tokens, dim)],
        backward=backward,
        parameters=list(layer.parameters()) if backward else (),
        reference=other,
        reference_parameters=list(others.parameters()) if backward else (),
        flops=(6 if backward else 2) * tokens * dim * vocab_size,
    )
