"""The quantiser beside `vector_quantize_pytorch.VectorQuantize` holding the same codebook."""

import pytest
import torch
from lamina.layers import VectorQuantizer
from torch import Tensor, nn

SIZES = {"tokens": (8, 1024, 64), "vqgan": (8, 256, 16, 16)}
CODES = 1024
DECAY = 1 - 1e-8  # the averages cost what they cost, and the two codebooks stay equal from call to call


def twins(sizes: tuple[int, ...], ema: bool) -> tuple[VectorQuantizer, nn.Module]:
    library = pytest.importorskip("vector_quantize_pytorch")
    image = len(sizes) == 4
    dim = sizes[1] if image else sizes[-1]
    ours = VectorQuantizer(
        CODES, dim, commitment=1.0, ema_decay=DECAY if ema else None, channel_dim=1 if image else -1
    )
    theirs = library.VectorQuantize(
        dim,
        CODES,
        decay=DECAY,
        rotation_trick=False,
        ema_update=ema,
        learnable_codebook=not ema,
        accept_image_fmap=image,
    )
    with torch.no_grad():
        codebook = torch.randn(CODES, dim)
        ours.codebook.copy_(codebook)
        theirs._codebook.embed.copy_(codebook)
        if ours.ema_sum is not None:
            ours.ema_sum.copy_(codebook)
            theirs._codebook.embed_avg.copy_(codebook)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ours.to(device), theirs.to(device)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("learning", ["averages", "gradient"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "vector-quantize-pytorch"])
def bench_vector_quantizer(benchmark, benchmark_op, how, sizes, learning, direction):
    """Forward is an evaluation, forward and backward a step of training, with its loss and its averages."""
    benchmark.group = f"VectorQuantizer {sizes} {learning} {direction}"
    torch.manual_seed(0)
    backward = direction == "forward+backward"
    ours, theirs = (quantizer.train(backward) for quantizer in twins(sizes, learning == "averages"))

    def lamina(x: Tensor) -> Tensor:
        quantized = ours(x)
        return quantized.output + quantized.loss if backward else quantized.output

    def peer(x: Tensor) -> Tensor:
        output, _, loss = theirs(x)
        if not backward:
            return output
        # Where the codebook learns, one mean square is both terms of their loss: its value is half of ours.
        return output + loss + (loss.detach() if learning == "gradient" else 0)

    timed, other = ((lamina, ours), (peer, theirs)) if how == "lamina" else ((peer, theirs), (lamina, ours))
    benchmark_op(
        timed[0],
        [torch.randn(sizes)],
        backward=backward,
        parameters=list(timed[1].parameters()) if backward else (),
        reference=other[0],
        reference_parameters=list(other[1].parameters()) if backward else (),
    )
