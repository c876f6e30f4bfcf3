"""LSH attention beside reformer-pytorch and transformers: four rounds, chunks of 64, causal.

Each pays for its own hashing, and is then given the same buckets: float32 hashes near a tie differ. The first
tokens are left out of the comparison: they see only themselves, where the peers' float32 is off by 0.75 %.
"""

from collections.abc import Callable

import pytest
import torch
from lamina.kernels import lsh_attention, lsh_buckets
from lamina.layers import LSHAttention
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, HEAD_DIM, CHUNK, ROUNDS = 8, 64, 64, 4
LENGTHS = [1024, 4096]
both_directions = pytest.mark.parametrize("direction", ["forward", "forward+backward"])


def offset(buckets: Tensor, num_buckets: int) -> Tensor:
    """(B, H, R L), as the peers number them: a bucket of another round is another bucket."""
    return (buckets + num_buckets * torch.arange(ROUNDS, device=buckets.device)[:, None]).flatten(2)


def paying(hashing: Callable[..., Tensor], buckets: Tensor) -> Callable[..., Tensor]:
    """Runs the hashing, and gives these buckets."""

    def run(*args, **kwargs) -> Tensor:
        hashing(*args, **kwargs)
        return buckets

    return run


@both_directions
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("how", ["lamina", "reformer-pytorch"])
def bench_lsh_attention(benchmark, benchmark_op, how, length, direction):
    benchmark.group = f"lsh_attention L={length} {direction}"
    reformer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    count = length // CHUNK
    rotations = torch.randn(HEADS, HEAD_DIM, ROUNDS, count // 2, device=DEVICE)
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, device=DEVICE) for _ in range(2)]
    buckets = lsh_buckets(inputs[0], rotations, num_buckets=count)
    theirs = reformer.LSHAttention(bucket_size=CHUNK, n_hashes=ROUNDS, causal=True)
    theirs.hash_vectors = paying(theirs.hash_vectors, offset(buckets, count).flatten(0, 1))

    def ours(query_key: Tensor, value: Tensor) -> Tensor:
        lsh_buckets(query_key, rotations, num_buckets=count)
        out = lsh_attention(
            query_key,
            value,
            buckets,
            num_buckets=count,
            chunk_size=CHUNK,
            circular=True,
            is_causal=True,
            scale=HEAD_DIM**-0.5,
        )
        return out[:, :, length // 8 :]

    def peer(query_key: Tensor, value: Tensor) -> Tensor:
        out = theirs(query_key.flatten(0, 1), value.flatten(0, 1))[0]
        return out.view_as(value)[:, :, length // 8 :]

    timed, other = (ours, peer) if how == "lamina" else (peer, ours)
    benchmark_op(timed, inputs, backward=direction != "forward", reference=other)


def reformer_pytorch(ours: LSHAttention, buckets: Tensor, count: int) -> nn.Module:
    reformer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    dim = ours.dim
    theirs = reformer.LSHSelfAttention(dim, HEADS, bucket_size=CHUNK, n_hashes=ROUNDS, causal=True).to(DEVICE)
    with torch.no_grad():
        theirs.toqk.weight.copy_(ours.query_key.weight)
        theirs.tov.weight.copy_(ours.value.weight)
        theirs.to_out.weight.copy_(ours.out.weight)
    theirs.to_out.bias = None
    inner = theirs.lsh_attn
    inner.hash_vectors = paying(inner.hash_vectors, offset(buckets, count).flatten(0, 1))
    return theirs


def transformers(ours: LSHAttention, buckets: Tensor, count: int) -> nn.Module:
    config = pytest.importorskip("transformers").ReformerConfig(
        hidden_size=ours.dim,
        num_attention_heads=HEADS,
        attention_head_size=HEAD_DIM,
        lsh_attn_chunk_length=CHUNK,
        num_hashes=ROUNDS,
        num_buckets=count,
        is_decoder=True,
        lsh_attention_probs_dropout_prob=0.0,
    )
    modeling = pytest.importorskip("transformers.models.reformer.modeling_reformer")

    class Peer(nn.Module):
        """With the output projection, which is a module of its own there."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = modeling.LSHSelfAttention(config)
            self.out = nn.Linear(HEADS * HEAD_DIM, ours.dim, bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.attention(tokens).hidden_states)

    theirs = Peer().to(DEVICE)
    inner = theirs.attention
    with torch.no_grad():
        inner.query_key.weight.copy_(ours.query_key.weight)
        inner.value.weight.copy_(ours.value.weight)
        theirs.out.weight.copy_(ours.out.weight)
    inner._hash_vectors = paying(inner._hash_vectors, offset(buckets, count))
    return theirs


@both_directions
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("peer", [reformer_pytorch, transformers], ids=lambda p: p.__name__)
@pytest.mark.parametrize("how", ["lamina", "peer"])
def bench_lsh_attention_layer(benchmark, benchmark_op, how, peer, length, direction):
    """The whole layer; the ring of all chunks and the peer's scale, so that outputs are equal."""
    benchmark.group = f"LSHAttention L={length} {direction} beside {peer.__name__}"
    dim, count = HEADS * HEAD_DIM, length // CHUNK
    layer = LSHAttention(
        dim,
        HEADS,
        chunk_size=CHUNK,
        num_hashes=ROUNDS,
        num_buckets=count,
        circular=True,
        scale=HEAD_DIM**-0.5 if peer is reformer_pytorch else None,
    ).to(DEVICE)
    nn.init.normal_(layer.query_key.weight, std=dim**-0.5)  # queries of order one
    tokens = torch.randn(1, length, dim, device=DEVICE)
    with torch.no_grad():
        buckets, _ = layer._hash(layer._split(layer.query_key(tokens)), None)
    theirs = peer(layer, buckets, count)

    def ours(x: Tensor) -> Tensor:
        return layer(x, is_causal=True)[:, length // 8 :]

    def others(x: Tensor) -> Tensor:
        return theirs(x)[:, length // 8 :]

    backward = direction != "forward"
    timed, other = ((ours, layer), (others, theirs)) if how == "lamina" else ((others, theirs), (ours, layer))
    benchmark_op(
        timed[0],
        [tokens],
        backward=backward,
        parameters=list(timed[1].parameters()) if backward else (),
        reference=other[0],
        reference_parameters=list(other[1].parameters()) if backward else (),
    )
