"""The nearest code at the sizes of an audio or token codebook and of VQGAN's two."""

import pytest
import torch
from lamina.kernels import nearest_code
from torch import Tensor

SIZES = {"tokens": (8192, 1024, 64), "vqgan-1024": (2048, 1024, 256), "vqgan-16384": (512, 16384, 256)}


def cdist(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(-1)


def product(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(-1), x, codebook.T, alpha=-2).argmin(-1)


HOW = {"lamina": nearest_code, "cdist": cdist, "one product": product}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", HOW)
def bench_nearest_code(benchmark, benchmark_op, how, sizes):
    benchmark.group = f"nearest_code {sizes}"
    count, codes, dim = sizes
    torch.manual_seed(0)

    def distances(search):
        """Two codes may be as near: what is compared is how near."""
        return lambda x, codebook: (x - codebook[search(x, codebook)]).square().sum(-1)

    benchmark_op(
        distances(HOW[how]),
        [torch.randn(count, dim), torch.randn(codes, dim)],
        backward=False,
        reference=distances(cdist if how == "lamina" else nearest_code),
        flops=2 * count * codes * dim,
    )
