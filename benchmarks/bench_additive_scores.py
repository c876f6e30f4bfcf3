"""Additive scores, and attention by them, at sizes of a translation batch, a document and a decoder's step.

    reference    the definition, which writes every tanh out
    compiled     the same under torch.compile, which writes none: the peer, as there is no other
    auto         as the operation chooses: a CPU's tiles, or Triton's kernel on a GPU
    fused        Triton's kernel

A score takes H reciprocals, the floor on a GPU: 16 a clock on a multiprocessor, and half as many by pairs.
"""

from contextlib import nullcontext

import pytest
import torch
from lamina.kernels import additive_attention, additive_scores, use_backend
from lamina.kernels.additive_scores import additive_scores_reference
from torch import Tensor

SIZES = {"translation": (32, 50, 50, 512), "document": (2, 128, 512, 512), "step": (32, 1, 50, 512)}
ON_GPU = torch.cuda.is_available()
WIDTH = 256  # of the values
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]


def attention_reference(query: Tensor, key: Tensor, energy: Tensor, value: Tensor) -> Tensor:
    return additive_scores_reference(query, key, energy).softmax(-1) @ value


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["auto", "reference", "compiled", "fused"])
@pytest.mark.parametrize("what", ["scores", "attention"])
def bench_additive(benchmark, benchmark_op, what, how, sizes, dtype, direction):
    if how == "fused" and not ON_GPU:
        pytest.skip("the kernel runs on a GPU only")
    name = "" if dtype is torch.float32 else " bfloat16"
    benchmark.group = f"additive_{what} {sizes}{name} {direction}"
    batch, queries, keys, hidden = sizes
    shapes = [(batch, queries, hidden), (batch, keys, hidden), (hidden,), (batch, keys, WIDTH)]
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes[: 3 if what == "scores" else 4]]
    if what == "scores":
        ours, plain = additive_scores, additive_scores_reference
    else:
        ours, plain = additive_attention, attention_reference
    if how == "compiled":
        torch.compiler.reset()
    operation = {"reference": plain, "compiled": torch.compile(plain, dynamic=False)}.get(how, ours)
    backward = direction == "forward+backward"
    tokens = batch * (queries + keys) * hidden
    outputs = batch * queries * (keys if what == "scores" else WIDTH)
    with use_backend("triton") if how == "fused" else nullcontext():
        benchmark_op(
            operation,
            inputs,
            backward=backward,
            reference=plain,
            # A product, a sum, a reciprocal and a product a tanh; the backward pass walks twice.
            flops=(12 if backward else 4) * batch * queries * keys * hidden,
            bytes_moved=(3 if backward else 1) * (tokens + outputs) * dtype.itemsize,
        )
