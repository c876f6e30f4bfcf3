"""Dot-product attention at the papers' lengths: what is chosen, the definition, PyTorch's routine."""

import pytest
import torch
import torch.nn.functional as F
from lamina.kernels import dot_product_attention, use_backend
from lamina.kernels.dot_product_attention import dot_product_attention_reference

# (B, H, L, D): the digits' and windows' short sequences, ViT at 224, DETR's encoder, BERT.
SIZES = {
    "digits-17": (64, 4, 17, 16),
    "window-48": (64, 4, 48, 32),
    "window-64": (64, 4, 64, 32),
    "vit-197": (4, 12, 197, 64),
    "bert-512": (2, 12, 512, 64),
}
KINDS = {"plain": {}, "causal": {"is_causal": True}}


def masked(query, key, value, **options):
    """The last quarter of the keys is padding."""
    mask = torch.arange(key.shape[2], device=key.device) < key.shape[2] * 3 // 4
    return dot_product_attention(query, key, value, mask=mask, **options)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["auto", "reference", "sdpa"])
def bench_dot_product_attention(benchmark, benchmark_op, how, sizes, kind, direction):
    benchmark.group = f"dot_product_attention {kind} {sizes} {direction}"
    batch, heads, length, dim = sizes
    options = KINDS[kind]
    operation = {
        "auto": dot_product_attention,
        "reference": dot_product_attention_reference,
        "sdpa": F.scaled_dot_product_attention,
    }[how]
    backward = direction == "forward+backward"
    benchmark_op(
        lambda q, k, v: operation(q, k, v, **options),
        [torch.randn(sizes) for _ in range(3)],
        backward=backward,
        reference=lambda q, k, v: dot_product_attention_reference(q, k, v, **options),
        flops=(4 if not backward else 14) * batch * heads * length**2 * dim / (2 if options else 1),
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["auto", "reference"])
def bench_key_mask(benchmark, benchmark_op, how, sizes, direction):
    benchmark.group = f"dot_product_attention key mask {sizes} {direction}"

    def forced(query, key, value):
        if how == "auto":
            return masked(query, key, value)
        with use_backend("reference"):
            return masked(query, key, value)

    inputs = [torch.randn(sizes) for _ in range(3)]
    benchmark_op(forced, inputs, backward=direction == "forward+backward", reference=masked)
