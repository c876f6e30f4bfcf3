"""Reversible layers beside the plain stack, checkpoints and `reformer_pytorch`'s sequence: time, memory."""

import copy

import pytest
import torch
from lamina.layers import FeedForward, MultiHeadAttention, Reversible, ReversibleBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SIZES = {"short": (4, 128, 128, 4), "long": (1, 1024, 256, 4)}
DEPTH = 6


def stack_of(dim: int, heads: int) -> Reversible:
    return Reversible(
        ReversibleBlock(
            nn.Sequential(nn.LayerNorm(dim), MultiHeadAttention(dim, heads)),
            nn.Sequential(nn.LayerNorm(dim), FeedForward(dim)),
        )
        for _ in range(DEPTH)
    )


class Checkpointed(Reversible):
    """What keeps the two streams of every block, and no more."""

    def forward(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        x2 = x1
        for block in self.blocks:
            x1, x2 = checkpoint(block, x1, x2, use_reentrant=False)
        return x1, x2


class Joined(nn.Module):
    """reformer-pytorch's sequence, whose streams are halves of one tensor."""

    def __init__(self, stack: Reversible) -> None:
        super().__init__()
        library = pytest.importorskip("reformer_pytorch.reversible")
        pairs = [nn.ModuleList([block.first, block.second]) for block in copy.deepcopy(stack).blocks]
        self.sequence = library.ReversibleSequence(nn.ModuleList(pairs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y1, y2 = self.sequence(torch.cat([x, x], -1)).chunk(2, -1)
        return y1, y2


def made(how: str, stack: Reversible) -> nn.Module:
    if how == "reformer-pytorch":
        return Joined(stack)
    twin = copy.deepcopy(stack)
    if how == "plain":
        twin.recompute = False
    return Checkpointed(twin.blocks) if how == "checkpoint" else twin


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("how", "beside"),
    [
        ("lamina", "reformer-pytorch"),
        ("lamina", "checkpoint"),
        ("lamina", "plain"),
        ("plain", "lamina"),
        ("checkpoint", "lamina"),
        ("reformer-pytorch", "lamina"),
    ],
)
def bench_reversible(benchmark, benchmark_op, how, beside, sizes, direction):
    """The ratio is that of `how` to `beside`, by turns; the peak memory is that of `how`.

    reformer-pytorch adds the parameters' gradients to `.grad` on the way, and so has them computed too.
    """
    benchmark.group = f"Reversible {sizes} {direction}"
    batch, length, dim, heads = sizes
    stack = stack_of(dim, heads).to("cuda" if torch.cuda.is_available() else "cpu")
    timed, other = made(how, stack), made(beside, stack)
    backward = direction == "forward+backward"

    def joined(module: nn.Module):
        return lambda x: torch.cat(module(x), -1)

    benchmark_op(
        joined(timed),
        [torch.randn(batch, length, dim)],
        backward=backward,
        parameters=list(timed.parameters()) if backward else (),
        reference=joined(other),
        reference_parameters=list(other.parameters()) if backward else (),
    )
