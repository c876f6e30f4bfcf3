"""Additive scores at the sizes of a translation batch, of a document, and of one decoding step."""

import pytest
import torch
from lamina.kernels import additive_scores, use_backend
from lamina.kernels.additive_scores import additive_scores_reference

SIZES = {"translation": (32, 50, 50, 512), "document": (2, 128, 512, 512), "step": (32, 1, 50, 512)}
ON_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["reference", "compiled", pytest.param("triton", marks=pytest.mark.gpu)])
def bench_additive_scores(benchmark, benchmark_op, how, sizes, direction):
    if how == "triton" and not ON_GPU:
        pytest.skip("the kernel runs on a GPU only")
    benchmark.group = f"additive_scores {sizes} {direction}"
    batch, queries, keys, hidden = sizes
    operation = torch.compile(additive_scores_reference) if how == "compiled" else additive_scores
    with use_backend("triton" if how == "triton" else "reference"):
        benchmark_op(
            operation,
            [torch.randn(batch, queries, hidden), torch.randn(batch, keys, hidden), torch.randn(hidden)],
            backward=direction == "forward+backward",
            reference=additive_scores_reference,
            flops=4 * batch * queries * keys * hidden,
        )
