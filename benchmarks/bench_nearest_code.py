"""The nearest code at the sizes of an audio or token codebook and of VQGAN's two; larger ones on a GPU.

There the kernel is timed beside PyTorch's products, eager and compiled, and the sums of the vectors of each
code beside `index_add_`.
"""

import pytest
import torch
from lamina.kernels import code_sums, nearest_code, use_backend
from torch import Tensor

GPU = torch.cuda.is_available()
SIZES = {"tokens": (8192, 1024, 64), "vqgan-1024": (2048, 1024, 256), "vqgan-16384": (512, 16384, 256)}
if GPU:
    SIZES |= {"tokens of a batch": (2**18, 1024, 64), "images of a batch": (2**16, 16384, 256)}
    SIZES |= {"wide": (2**15, 8192, 512)}
DTYPES = ("float32", "bfloat16") if GPU else ("float32",)  # a CPU is not asked for halves


def cdist(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x.float(), codebook.float()).argmin(-1)  # it takes no halves


def product(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(-1), x, codebook.T, alpha=-2).argmin(-1)


def broadcast(x: Tensor, codebook: Tensor) -> Tensor:
    return (x[:, None] - codebook).square().sum(-1).argmin(-1)


def on(backend: str):
    def search(x: Tensor, codebook: Tensor) -> Tensor:
        with use_backend(backend):
            return nearest_code(x, codebook)

    return search


HOW = {"lamina": nearest_code, "cdist": cdist, "one product": product, "broadcast": broadcast}
if GPU:
    HOW |= {"triton": on("triton"), "torch": on("torch"), "compiled product": torch.compile(product)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", HOW)
def bench_nearest_code(benchmark, benchmark_op, how, sizes, dtype):
    benchmark.group = f"nearest_code {sizes} {dtype}"
    count, codes, dim = sizes
    if how != "lamina" and count * codes > 2**28 and how not in ("triton", "torch"):
        pytest.skip("all distances at once: 4 GB and more")
    if how == "broadcast" and count * codes * dim > 2**29:
        pytest.skip("all differences at once: over 2 GB")
    torch.manual_seed(0)
    x, codebook = torch.randn(count, dim), torch.randn(codes, dim)

    def distances(search):
        """Two codes may be as near: what is compared is how near. Of halves each path may round otherwise."""
        return lambda x, codebook: (x - codebook[search(x, codebook)]).square().sum(-1)

    exact = how in ("lamina", "triton", "torch") or dtype == "float32"
    benchmark_op(
        distances(HOW[how]),
        [x.to(getattr(torch, dtype)), codebook.to(getattr(torch, dtype))],
        backward=False,
        reference=distances(_reference(how, count * codes)) if exact else None,
        flops=2 * count * codes * dim,
        bytes_moved=(count + codes) * dim * x.to(getattr(torch, dtype)).element_size() + 8 * count,
    )


def _reference(how: str, scores: int):
    if how != "lamina":
        return nearest_code
    return cdist if scores <= 2**28 else on("torch")


def index_add(x: Tensor, indices: Tensor, codes: int) -> Tensor:
    return x.new_zeros(codes, x.shape[1]).index_add_(0, indices, x)


@pytest.mark.parametrize("spread", ["even", "one code"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina", "index_add"])
def bench_code_sums(benchmark, benchmark_op, how, sizes, direction, spread):
    """As the codes are evenly chosen, and as they have collapsed to one, which a GPU's atomics wait for."""
    benchmark.group = f"code_sums {sizes} {spread} {direction}"
    count, codes, dim = sizes
    torch.manual_seed(0)
    indices = torch.randint(codes if spread == "even" else 1, (count,), device="cuda" if GPU else "cpu")
    ways = {"lamina": code_sums, "index_add": index_add}
    other = ways["index_add" if how == "lamina" else "lamina"]
    benchmark_op(
        lambda x: ways[how](x, indices, codes),
        [torch.randn(count, dim)],
        backward=direction == "forward+backward",
        reference=lambda x: other(x, indices, codes),
        bytes_moved=(count + codes) * dim * 4 * (2 if "backward" in direction else 1) + 8 * count,
    )
