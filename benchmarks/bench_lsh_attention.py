"""LSH attention beside reformer-pytorch, transformers and all pairs: four rounds, chunks of 64, causal.

    lamina            `lsh_attention` as it chooses; `reference` the definition, where that is another path
    reformer-pytorch  its attention of one head after the other
    sdpa              PyTorch's attention of every pair at equal length: what one pays for not hashing

Each pays for its own hashing, and is then given the same buckets: float32 hashes near a tie differ. The first
tokens are left out of the comparison: they see only themselves, where the peers' float32 is off by 0.75 %.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from lamina.kernels import lsh_attention, lsh_buckets, use_backend
from lamina.layers import LSHAttention
from lamina.layers._heads import split_heads
from torch import Tensor, nn

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float32] if GPU else [torch.float32]
HEADS, HEAD_DIM, CHUNK, ROUNDS = 8, 64, 64, 4
LENGTHS = [4096, 8192, 16384, 65536] if GPU else [1024, 4096, 8192]
both_directions = pytest.mark.parametrize("direction", ["forward", "forward+backward"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


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
@each_dtype
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("how", ["lamina", *(["reference"] if GPU else []), "reformer-pytorch", "sdpa"])
def bench_lsh_attention(benchmark, benchmark_op, how, length, dtype, direction):
    of_dtype = " bfloat16" if dtype is torch.bfloat16 else ""
    benchmark.group = f"lsh_attention L={length} {direction}{of_dtype}"
    backward = direction != "forward"
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, device=DEVICE, dtype=dtype) for _ in range(2)]
    if how == "sdpa":

        def every_pair(query_key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                query_key, F.normalize(query_key, dim=-1), value, is_causal=True, scale=1.0
            )

        flops = 2 * HEADS * length**2 * HEAD_DIM
        benchmark_op(every_pair, inputs, backward=backward, flops=flops * (3.5 if backward else 1))
        return
    reformer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    count = length // CHUNK
    rotations = torch.randn(HEADS, HEAD_DIM, ROUNDS, count // 2, device=DEVICE)
    buckets = lsh_buckets(inputs[0], rotations, num_buckets=count)
    theirs = reformer.LSHAttention(bucket_size=CHUNK, n_hashes=ROUNDS, causal=True)
    theirs.hash_vectors = paying(theirs.hash_vectors, offset(buckets, count).flatten(0, 1))

    def ours(query_key: Tensor, value: Tensor) -> Tensor:
        with use_backend("reference") if how == "reference" else nullcontext():
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

    timed, other = (peer, ours) if how == "reformer-pytorch" else (ours, peer)
    # The products of the hash and of a chunk with two; with a backward pass, of five more with three chunks
    # in each direction. Bytes: what is given and got once, and what a round gives, written and read.
    rows = HEADS * length * HEAD_DIM
    flops = ROUNDS * rows * (count + (32 if backward else 8) * CHUNK)
    moved = dtype.itemsize * rows * (3 + 2 * ROUNDS + ((6 + 4 * ROUNDS) if backward else 0))
    benchmark_op(timed, inputs, backward=backward, reference=other, flops=flops, bytes_moved=moved)


@each_dtype
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("how", ["lamina", *(["reference"] if GPU else []), "reformer-pytorch"])
def bench_lsh_buckets(benchmark, benchmark_op, how, length, dtype):
    """The hashing alone; its results near a tie differ, so that nothing is compared here (the tests do)."""
    benchmark.group = f"lsh_buckets L={length}" + (" bfloat16" if dtype is torch.bfloat16 else "")
    count = length // CHUNK
    tokens = torch.randn(1, HEADS, length, HEAD_DIM, device=DEVICE, dtype=dtype)
    rotations = torch.randn(HEADS, HEAD_DIM, ROUNDS, count // 2, device=DEVICE)

    def ours(x: Tensor) -> Tensor:
        with use_backend("reference") if how == "reference" else nullcontext():
            return lsh_buckets(x, rotations, num_buckets=count).float()

    def peer(x: Tensor) -> Tensor:
        reformer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
        theirs = reformer.LSHAttention(bucket_size=CHUNK, n_hashes=ROUNDS, causal=True)
        return theirs.hash_vectors(count, x.flatten(0, 1)).float()

    flops = ROUNDS * HEADS * length * HEAD_DIM * count
    benchmark_op(peer if how == "reformer-pytorch" else ours, [tokens], backward=False, flops=flops)


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
@pytest.mark.parametrize("length", LENGTHS[:2])
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
        buckets, _ = layer._hash(split_heads(layer.query_key(tokens), HEADS), None)
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
