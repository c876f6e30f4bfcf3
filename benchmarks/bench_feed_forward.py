"""The feed-forward network in chunks beside the whole one, checkpointing, and `reformer_pytorch`'s chunks."""

import pytest
import torch
from lamina.layers import ChunkedFeedForward, FeedForward
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SIZES = {"chunks of 64": (1, 4096, 256, 64), "chunks of 256": (1, 4096, 256, 256)}  # B, L, dim, tokens


class Checkpointed(FeedForward):
    """Chunks as `torch.utils.checkpoint` recomputes them: the peer that keeps as little."""

    chunk_size = 64

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.flatten(0, 1).split(self.chunk_size)
        run = super().forward
        return torch.cat([checkpoint(run, chunk, use_reentrant=False) for chunk in chunks]).view(x.shape)


def made(how: str, whole: FeedForward, length: int, dim: int, chunk_size: int) -> nn.Module:
    if how == "reformer-pytorch":
        library = pytest.importorskip("reformer_pytorch.reformer_pytorch")
        layer = library.Chunk(
            length // chunk_size, library.FeedForward(dim, activation=nn.GELU), along_dim=-2
        )
        layer.fn.w1.load_state_dict(whole.up.state_dict())
        layer.fn.w2.load_state_dict(whole.down.state_dict())
        return layer
    layer = {
        "whole": lambda: FeedForward(dim),
        "lamina": lambda: ChunkedFeedForward(dim, chunk_size=chunk_size),
        "lamina kept": lambda: ChunkedFeedForward(dim, chunk_size=chunk_size, recompute=False),
        "checkpoint": lambda: Checkpointed(dim),
    }[how]()
    layer.load_state_dict(whole.state_dict())
    if how == "checkpoint":
        layer.chunk_size = chunk_size
    return layer


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("how", "beside"),
    [
        ("lamina", "checkpoint"),
        ("lamina", "reformer-pytorch"),
        ("lamina", "whole"),
        ("lamina kept", "reformer-pytorch"),
        ("whole", "lamina"),
        ("checkpoint", "lamina"),
        ("reformer-pytorch", "lamina"),
    ],
)
def bench_chunked_feed_forward(benchmark, benchmark_op, how, beside, sizes, direction):
    """The ratio is that of `how` to `beside`, by turns; the peak memory is that of `how`."""
    batch, length, dim, chunk_size = sizes
    benchmark.group = f"ChunkedFeedForward {sizes} {direction}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = FeedForward(dim)
    timed, other = (made(name, whole, length, dim, chunk_size).to(device) for name in (how, beside))
    backward = direction == "forward+backward"
    benchmark_op(
        timed,
        [torch.randn(batch, length, dim)],
        backward=backward,
        parameters=list(timed.parameters()) if backward else (),
        reference=other,
        reference_parameters=list(other.parameters()) if backward else (),
        flops=(12 if backward else 4) * batch * length * dim * 4 * dim,
    )
