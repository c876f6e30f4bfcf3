"""Dot-product attention at the papers' sizes: ours, its definition, and PyTorch's ways to the same numbers.

    auto         `dot_product_attention` as it chooses; `fused` is Triton's kernel, `reference` the definition
    compiled     the definition under torch.compile
    sdpa         PyTorch's routine as it chooses, or one of its backends; masks and biases are written out
    flex         FlexAttention, compiled; masks and biases are functions
    varlen       PyTorch's attention of sequences that lie one after the other, without padding

What stays from step to step (masks, fixed biases, block masks) is made before the clock runs, in favour of
the peers. What is trained is an input, whose gradient is computed too. An entry that the machine or the
library refuses is skipped, with the reason.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lamina.kernels import (
    DistanceBias,
    TableBias,
    dot_product_attention,
    explain,
    packed_attention,
    use_backend,
)
from lamina.kernels.dot_product_attention import dot_product_attention_reference
from lamina.kernels.masking import combine_masks, mask_of_lengths, window_mask
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

# (B, H, L, D) or (B, H, Lq, Lk, D): the digits' and windows' short sequences, TransGAN's windows of 8 x 8,
# ViT at 224 and 384, BERT, DETR's encoder and decoder. A GPU wants more of each to be full.
CPU_SIZES = {
    "digits-17": (64, 4, 17, 16),
    "window-48": (64, 4, 48, 32),
    "window-64": (64, 4, 64, 32),
    "vit-197": (4, 12, 197, 64),
    "vit-577": (1, 12, 577, 64),
    "bert-512": (2, 12, 512, 64),
    "detr-850": (1, 8, 850, 32),
    "detr-100x850": (2, 8, 100, 850, 32),
    "long-1k": (1, 8, 1024, 64),
}
GPU_SIZES = {
    "window-64": (4096, 4, 64, 32),
    "vit-197": (64, 12, 197, 64),
    "vit-577": (32, 12, 577, 64),
    "bert-512": (32, 12, 512, 64),
    "detr-850": (8, 8, 850, 32),
    "detr-100x850": (16, 8, 100, 850, 32),
    "long-4k": (4, 16, 4096, 64),
    "long-8k": (2, 16, 8192, 128),
    "long-16k": (1, 16, 16384, 64),
}
SIZES = GPU_SIZES if GPU else CPU_SIZES
KINDS = {  # first what PyTorch is slow at: should the time run out, what is missing is the least news
    "bias": "window-64 vit-197 bert-512 long-1k",
    "table": "window-64 bert-512 detr-850",
    "gaussian": "bert-512 long-4k",
    "alibi": "bert-512 long-4k",
    "window": "long-1k long-8k",
    "lengths": "bert-512 detr-850 long-4k",
    "causal": "digits-17 window-48 window-64 vit-197 bert-512 long-4k long-8k long-16k",
    "plain": "digits-17 window-48 window-64 vit-197 vit-577 bert-512 detr-850 detr-100x850",
    "key mask": "digits-17 window-48 window-64 vit-197 bert-512 detr-850",
    "dropout": "window-64 bert-512",
}
# On a GPU few sizes tell of float32, and of what PyTorch is made for.
DTYPES = [torch.bfloat16, torch.float32] if GPU else [torch.float32]
IN_FLOAT32 = {"window-64", "vit-197", "bert-512"} if GPU else set(CPU_SIZES)
CASES = [
    pytest.param(dtype, kind, SIZES[size], id=f"{size}-{kind}" + ("" if dtype.itemsize == 4 else "-bfloat16"))
    for dtype in DTYPES
    for kind, sizes in KINDS.items()
    for size in sizes.split()
    if size in SIZES and (dtype is torch.bfloat16 or size in IN_FLOAT32)
    if not (GPU and kind in ("causal", "key mask") and size in ("window-64", "vit-197"))
]
BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
HOWS = ["auto", "reference", "sdpa", *(["fused", "compiled", "flex", *BACKENDS] if GPU else [])]

Operation = Callable[..., Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Query, key and value, what is `trained` besides, and the options of `dot_product_attention`."""

    inputs: list[Tensor]
    trained: list[Tensor]
    options: Callable[..., Options]
    part: float = 1.0  # of the scores that takes part

    @property
    def lengths(self) -> tuple[int, int]:
        return self.inputs[0].shape[2], self.inputs[1].shape[2]


def problem(kind: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Problem:
    batch, heads, queries, *rest, dim = sizes
    keys = rest[0] if rest else queries

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=DEVICE)

    inputs = [draw(batch, heads, length, dim) for length in (queries, keys, keys)]
    per_head = torch.arange(1, heads + 1, device=DEVICE) / heads
    if kind == "plain":
        return Problem(inputs, [], dict)
    if kind == "causal":
        return Problem(inputs, [], lambda: {"is_causal": True}, 1 / 2)
    if kind == "key mask":  # the last quarter of the keys is padding
        mask = torch.arange(keys, device=DEVICE) < keys * 3 // 4
        return Problem(inputs, [], lambda: {"mask": mask})
    if kind == "lengths":
        lengths = ragged(batch, keys)
        return Problem(inputs, [], lambda: {"key_lengths": lengths}, lengths.sum().item() / (batch * keys))
    if kind == "bias":
        return Problem(inputs, [draw(1, heads, queries, keys)], lambda bias: {"bias": bias})
    if kind == "table":
        places, last = grid(queries, {64: 8, 850: 34}.get(queries, queries))
        table = draw(heads, 2 * last + 1)
        return Problem(inputs, [table], lambda table: {"score_bias": TableBias(table, places + last, places)})
    if kind == "gaussian":
        coefficients = (-0.5 / (per_head * keys / 8) ** 2).to(dtype)
        return Problem(inputs, [coefficients], lambda c: {"score_bias": DistanceBias(c, 2)})
    if kind == "alibi":
        slopes = DistanceBias(-(2.0 ** (-8 * per_head)).to(dtype), 1)
        return Problem(inputs, [], lambda: {"score_bias": slopes, "is_causal": True}, 1 / 2)
    if kind == "window":
        before = min(256, keys // 8)
        return Problem(inputs, [], lambda: {"window": (before, 0)}, before / keys)
    return Problem(inputs, [], lambda: {"dropout": 0.1})


def ragged(batch: int, longest: int) -> Tensor:
    """Lengths from a quarter of the longest up to it."""
    lengths = torch.linspace(longest // 4, longest, batch, device=DEVICE).long()
    return lengths.clamp_min(longest) if batch == 1 else lengths


def grid(length: int, width: int) -> tuple[Tensor, int]:
    """Positions of a grid's cells for `TableBias`, and the greatest: of a line where it is `length` wide."""
    cells = torch.arange(length, device=DEVICE)
    places = (2 * width - 1) * (cells // width) + cells % width
    return places, int(places[-1])


def visible(options: Options, queries: int, keys: int) -> Tensor | None:
    """All that excludes but causality, as one mask."""
    lengths, window = options.get("key_lengths"), options.get("window")
    within = None if lengths is None else mask_of_lengths(lengths, keys)[:, None, None]
    band = window and window_mask(queries, keys, before=window[0], after=window[1], device=DEVICE)
    return combine_masks(options.get("mask"), within, band)


def added(options: Options, queries: int, keys: int) -> Tensor | None:
    """All that is added to the scores, (1, H, Lq, Lk)."""
    made = options.get("score_bias")
    return options.get("bias") if made is None else made.dense(queries, keys)[None]


def definition(given: Problem) -> Operation:
    options = given.options(*given.trained)
    mask, fixed = visible(options, *given.lengths), None if given.trained else added(options, *given.lengths)
    rest = {name: options[name] for name in ("is_causal", "dropout") if name in options}

    def operation(query: Tensor, key: Tensor, value: Tensor, *trained: Tensor) -> Tensor:
        bias = added(given.options(*trained), *given.lengths) if trained else fixed
        return dot_product_attention_reference(query, key, value, mask=mask, bias=bias, **rest)

    return operation


def sdpa(given: Problem) -> Operation:
    options = given.options(*given.trained)
    mask, causal = visible(options, *given.lengths), options.get("is_causal", False)
    if causal and added(options, *given.lengths) is not None:  # SDPA takes its causality or a mask, not both
        causal, mask = False, torch.ones(given.lengths, dtype=torch.bool, device=DEVICE).tril()
    if mask is not None:
        mask = mask.expand(len(mask) if mask.ndim == 4 else 1, 1, *given.lengths)

    def written(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if bias is None:
            return mask
        bias = bias.to(dtype)
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    fixed = None if given.trained else added(options, *given.lengths)
    by_dtype = {dtype: written(fixed, dtype) for dtype in (given.inputs[0].dtype, torch.float32)}

    def operation(query: Tensor, key: Tensor, value: Tensor, *trained: Tensor) -> Tensor:
        dtype, cells = query.dtype, None
        if trained:
            cells = written(added(given.options(*trained), *given.lengths), dtype)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=cells if trained else by_dtype[dtype],
            dropout_p=options.get("dropout", 0.0),
            is_causal=causal,
        )

    return operation


def score_mod(options: Options, queries: int, keys: int) -> Callable[..., Tensor] | None:
    """What FlexAttention adds: the same biases, cell by cell."""
    bias, made = options.get("bias"), options.get("score_bias")
    if bias is not None:
        return lambda score, b, h, i, j: score + bias[0, h, i, j]
    if isinstance(made, TableBias):
        table, places, of_keys = made.table, made.query_positions, made.key_positions
        return lambda score, b, h, i, j: score + table[h, places[i] - of_keys[j]]
    if isinstance(made, DistanceBias):
        coefficients, shift = made.coefficients, keys - queries
        if made.power == 1:
            return lambda score, b, h, i, j: score + coefficients[h] * (i + shift - j).abs()
        return lambda score, b, h, i, j: score + coefficients[h] * ((i + shift - j) * (i + shift - j))
    return None


def mask_mod(options: Options, queries: int, keys: int) -> Callable[..., Tensor] | None:
    """What takes part, for FlexAttention: one of a case's options at most."""
    mask, lengths, window = (options.get(name) for name in ("mask", "key_lengths", "window"))
    shift = keys - queries
    if mask is not None:
        return lambda b, h, i, j: mask[j]
    if lengths is not None:
        return lambda b, h, i, j: j < lengths[b]
    if window is not None:
        before, after = window
        return lambda b, h, i, j: (j >= i + shift - before) & (j <= i + shift + after)
    if options.get("is_causal"):
        return lambda b, h, i, j: j <= i + shift
    return None


def flex(given: Problem, attend: Callable[..., Any]) -> Operation:
    from torch.nn.attention.flex_attention import create_block_mask

    options = given.options(*given.trained)
    takes_part, blocks = mask_mod(options, *given.lengths), None
    if takes_part is not None:
        batch = given.inputs[0].shape[0] if "key_lengths" in options else None
        blocks = create_block_mask(takes_part, batch, None, *given.lengths, device=DEVICE)

    def operation(query: Tensor, key: Tensor, value: Tensor, *trained: Tensor) -> Tensor:
        mod = score_mod(given.options(*trained), *given.lengths)
        return attend(query, key, value, score_mod=mod, block_mask=blocks)

    return operation


def entry(how: str, kind: str, given: Problem) -> tuple[Operation, AbstractContextManager[Any]]:
    """The operation, and within what it runs. Skips what is not for this case."""
    query, key, value = given.inputs
    cells, is_long = query.shape[2] * key.shape[2], key.shape[2] > 1024
    if how in ("auto", "fused"):

        def ours(query: Tensor, key: Tensor, value: Tensor, *trained: Tensor) -> Tensor:
            return dot_product_attention(query, key, value, **given.options(*trained))

        if how == "auto":
            return ours, nullcontext()
        with use_backend("triton"):
            told = explain(dot_product_attention, query, key, value, **given.options(*given.trained))
        if told.chosen != "triton":
            pytest.skip(told.refusals["triton"])
        return ours, use_backend("triton")
    if how in ("reference", "compiled") and cells > 4096**2:
        pytest.skip("the definition's scores would take tens of gigabytes")
    if how == "compiled":
        if is_long or query.dtype is torch.float32:
            pytest.skip("compiling takes seconds: of short sequences in bfloat16 only")
        torch.compiler.reset()  # else the ninth case would meet the limit of recompilations, and run eagerly
        return torch.compile(definition(given), dynamic=False), nullcontext()
    if how == "reference":
        return definition(given), nullcontext()
    if how == "flex":
        if kind == "dropout":
            pytest.skip("FlexAttention has no dropout")
        if query.dtype is torch.float32 or (
            kind in ("plain", "causal", "key mask") and not is_long and cells != 512**2
        ):
            pytest.skip("compiling takes seconds: of each kind in bfloat16, plain ones at BERT's length only")
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        return flex(given, torch.compile(flex_attention, dynamic=False)), nullcontext()
    return sdpa(given), nullcontext() if how == "sdpa" else sdpa_kernel(BACKENDS[how])


def expected(given: Problem) -> Operation:
    """The definition; where its scores do not fit, PyTorch's routine that never makes them."""
    if given.lengths[0] * given.lengths[1] <= 4096**2:
        return definition(given)
    routine = sdpa(given)

    def operation(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return routine(*inputs)

    return operation


def outcome(operation: Operation, inputs: list[Tensor], cotangent: Tensor | None) -> list[Tensor]:
    """The output, and where there is a cotangent the gradients of all inputs."""
    leaves = [t.detach().requires_grad_(cotangent is not None) for t in inputs]
    out = operation(*leaves)
    if cotangent is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def skip_refused(operation: Operation, inputs: list[Tensor], cotangent: Tensor | None) -> None:
    """Skips a peer that does not take the case, with what it says: SDPA says it in warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            outcome(operation, inputs, cotangent)
        except Exception as error:  # each library has its own
            said = [str(w.message).partition(" (Triggered")[0] for w in told] or [str(error)]
            pytest.skip("refused: " + " ".join(" ".join(said).split())[:300])


def check_as_exact(
    operation: Operation, plain: Operation, inputs: list[Tensor], cotangent: Tensor | None
) -> None:
    """In bfloat16 output and gradients err at most twice as much as the definition's, from float32's.

    `benchmark_op` alone allows a relative error of 100 eps, which is 0.78 there.
    """
    eps = torch.finfo(inputs[0].dtype).eps
    truths = outcome(plain, [t.float() for t in inputs], cotangent)
    both = (outcome(of, inputs, cotangent) for of in (plain, operation))
    for n, (truth, p, found) in enumerate(zip(truths, *both, strict=True)):
        error, of_plain = ((t.float() - truth).norm() / truth.norm() for t in (found, p))
        what = f"gradient of input {n - 1}" if n else "output"
        assert error <= 2 * of_plain + eps, (
            f"{what}: relative error {error:.3g}, the definition's {of_plain:.3g}"
        )


@pytest.mark.parametrize("how", ["auto", "reference", "padded", *(["fused", "varlen"] if GPU else [])])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [SIZES[size] for size in ("bert-512", "long-4k") if size in SIZES], ids=str)
def bench_packed_attention(benchmark, benchmark_op, how, sizes, dtype, direction):
    """Sequences one after the other. `padded` goes by a padded batch: there and back."""
    batch, heads, longest, dim = sizes
    name = "" if dtype is torch.float32 else " bfloat16"
    benchmark.group = f"packed_attention {sizes}{name} {direction}"
    torch.manual_seed(0)
    lengths = ragged(batch, longest)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    inputs = [torch.randn(int(starts[-1]), heads, dim, dtype=dtype, device=DEVICE) for _ in range(3)]
    places = torch.arange(longest, device=DEVICE)
    rows = (starts[:-1, None] + places).clamp_max(int(starts[-1]) - 1)
    tokens = (places < lengths[:, None]).flatten().nonzero().squeeze(1)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, starts, longest=(longest, longest))

    def plain(*inputs: Tensor) -> Tensor:
        with use_backend("reference"):
            return ours(*inputs)

    def padded(*inputs: Tensor) -> Tensor:
        out = dot_product_attention(*(t[rows].transpose(1, 2) for t in inputs), key_lengths=lengths)
        return out.transpose(1, 2).flatten(0, 1)[tokens]

    def varlen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attend = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
        return attend(query, key, value, starts, starts, longest, longest)

    operation = {"reference": plain, "padded": padded, "varlen": varlen}.get(how, ours)
    backward = direction == "forward+backward"
    cotangent = torch.randn_like(inputs[0]) if backward else None
    with use_backend("triton") if how == "fused" else nullcontext():
        if how == "varlen":
            skip_refused(operation, inputs, cotangent)
        if dtype is not torch.float32:
            check_as_exact(operation, plain, inputs, cotangent)
        benchmark_op(
            operation,
            inputs,
            backward=backward,
            reference=plain,
            flops=(14 if backward else 4) * heads * dim * lengths.square().sum().item(),
        )


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(("dtype", "kind", "sizes"), CASES)
def bench_dot_product_attention(benchmark, benchmark_op, how, dtype, kind, sizes, direction):
    name = "" if dtype is torch.float32 else " bfloat16"
    benchmark.group = f"dot_product_attention {kind} {sizes}{name} {direction}"
    torch.manual_seed(0)
    given = problem(kind, sizes, dtype)
    inputs = [*given.inputs, *given.trained]
    backward = direction == "forward+backward"
    cotangent = torch.randn_like(given.inputs[0]) if backward else None
    operation, within = entry(how, kind, given)
    plain = None if kind == "dropout" else expected(given)  # what is dropped differs: its tests compare
    with within:
        if how not in ("auto", "fused", "reference"):
            skip_refused(operation, inputs, cotangent)
        if dtype is not torch.float32 and plain is not None:
            check_as_exact(operation, plain, inputs, cotangent)
        query, key = given.inputs[:2]
        benchmark_op(
            operation,
            inputs,
            backward=backward,
            reference=plain,
            flops=(14 if backward else 4) * given.part * query.numel() * key.shape[2],
        )
