"""Dot-product attention: its definition, and PyTorch's path against it on every kind of mask."""

import importlib
import itertools
import math
import weakref
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import (
    DistanceBias,
    _tiled_attention,
    dot_product_attention,
    explain,
    packed_attention,
    use_backend,
)
from lamina.kernels.dot_product_attention import attention_weights
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

module = importlib.import_module("lamina.kernels.dot_product_attention")  # the package has its function
seeds = st.integers(0, 2**31)
lengths = st.integers(1, 7)

# (B, H, G, Lq, Lk, D, Dv): primes; one key; longer than the CPU's short rule, and than SDPA's tile.
SIZES = [(2, 3, 3, 5, 7, 11, 11), (1, 6, 2, 3, 13, 5, 5), (2, 1, 1, 1, 1, 1, 1), (1, 2, 1, 61, 53, 7, 7)]
MASKS = ["none", "key", "query-key", "head", "row without keys"]
BIASES = ["none", "shared", "full", "-inf"]
on_the_device = pytest.mark.usefixtures("kernels_device")


def draw(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batch, heads, groups, queries, keys, dim, value_dim = sizes
    shapes = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, value_dim)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def draw_mask(kind: str, sizes: tuple[int, ...]) -> Tensor | None:
    batch, heads, _, queries, keys, *_ = sizes
    if kind == "none":
        return None
    shape = {"key": (batch, 1, 1, keys), "query-key": (queries, keys), "head": (1, heads, queries, keys)}
    mask = torch.rand(shape.get(kind, (batch, 1, queries, keys))) < 0.6
    if kind == "row without keys":
        mask[:, :, 0] = False
    return mask


def draw_bias(kind: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    batch, heads, _, queries, keys, *_ = sizes
    if kind == "none":
        return None
    bias = torch.randn((1, heads, queries, keys) if kind == "shared" else (batch, heads, queries, keys))
    if kind == "-inf":
        bias = bias.masked_fill(torch.rand_like(bias) < 0.3, -math.inf)
        bias[:, :, -1] = -math.inf
    return bias.to(dtype).requires_grad_()


def in_numpy(query, key, value, mask=None, bias=None, is_causal=False):
    """The formula, one query and one key at a time."""
    query, key, value = (t.detach().numpy() for t in (query, key, value))
    (batch, heads, queries, dim), (_, groups, keys, _) = query.shape, key.shape
    shape = (batch, heads, queries, keys)
    mask = np.broadcast_to(True if mask is None else mask.numpy(), shape)
    bias = np.broadcast_to(0.0 if bias is None else bias.detach().numpy(), shape)
    out = np.zeros((batch, heads, queries, value.shape[-1]))
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        seen = [j for j in range(keys) if mask[b, h, i, j] and bias[b, h, i, j] > -np.inf]
        seen = [j for j in seen if not is_causal or j <= i + keys - queries]
        g = h * groups // heads
        scores = [query[b, h, i] @ key[b, g, j] / math.sqrt(dim) + bias[b, h, i, j] for j in seen]
        if seen:
            weights = np.exp(scores - np.max(scores))
            out[b, h, i] = weights / weights.sum() @ value[b, g, seen]
    return torch.from_numpy(out)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_is_the_formula(backend, sizes, mask, bias, is_causal):
    inputs = draw(sizes)
    options = {"mask": draw_mask(mask, sizes), "bias": draw_bias(bias, sizes, torch.float64)}
    with use_backend(backend):
        actual = dot_product_attention(*inputs, **options, is_causal=is_causal)
    torch.testing.assert_close(actual, in_numpy(*inputs, **options, is_causal=is_causal))


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_torch_path_is_as_exact_as_the_definition(sizes, mask, bias, is_causal, dtype, compare):
    inputs, taking_part = draw(sizes, dtype), draw_mask(mask, sizes)
    added = draw_bias(bias, sizes, dtype)

    def operation(query, key, value, bias=None):
        return dot_product_attention(query, key, value, mask=taking_part, bias=bias, is_causal=is_causal)

    compare(operation, inputs if added is None else [*inputs, added], backend="torch")


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("how", ["mask", "bias", "no keys", "causal"])
def test_a_query_without_keys_gives_zero_and_passes_no_gradient(backend, how):
    keys = 0 if how == "no keys" else 3
    query, key, value = draw((2, 3, 3, 5, keys, 7, 7), torch.float32)
    options = {
        "mask": {"mask": torch.zeros(5, keys, dtype=torch.bool)},
        "bias": {"bias": torch.full((5, keys), -math.inf)},
        "no keys": {},
        "causal": {"is_causal": True},  # the first two of five queries come before the first of three keys
    }[how]
    with use_backend(backend):
        out = dot_product_attention(query, key, value, **options)
    blind = slice(0, 2) if how == "causal" else slice(None)
    assert (out[:, :, blind] == 0).all()
    gradients = torch.autograd.grad(out, (query, key, value), torch.randn_like(out))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, :, blind] == 0).all()
    if how != "causal":
        assert all((g == 0).all() for g in gradients)


@on_the_device
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", MASKS)
def test_empty_rows_are_zeroed_where_pytorch_does_not(mask, bias, compare, monkeypatch):
    """As on a GPU, whose paths do not all define them."""
    monkeypatch.setattr(module, "_zeroes_empty_rows", lambda query: False)
    inputs, taking_part = draw(SIZES[1], torch.float32), draw_mask(mask, SIZES[1])
    added = draw_bias(bias, SIZES[1], torch.float32)

    def operation(query, key, value, bias=None):
        return dot_product_attention(query, key, value, mask=taking_part, bias=bias)

    compare(operation, inputs if added is None else [*inputs, added], backend="torch")


@on_the_device
@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (1, 7), (3, 1, 7), (2, 1, 5, 1)])
def test_pytorch_is_given_masks_in_four_dimensions(shape, monkeypatch):
    """In three, as a bias by head has, it would leave its fused path on a CPU."""
    query, key, value = draw((2, 3, 3, 5, 7, 4, 4), torch.float32)
    given, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def watch(*inputs, attn_mask, **options):
        given.append(attn_mask)
        return sdpa(*inputs, attn_mask=attn_mask, **options)

    for option in {"bias": torch.randn(shape)}, {"mask": torch.rand(shape) < 0.7}:
        definition = module.dot_product_attention_reference(query, key, value, **option)
        with monkeypatch.context() as patch, use_backend("torch"):
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
            torch.testing.assert_close(dot_product_attention(query, key, value, **option), definition)
    assert [mask.ndim for mask in given] == [4, 4]


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_queries_and_no_batch(backend):
    with use_backend(backend):
        assert dot_product_attention(*draw((2, 3, 3, 0, 5, 7, 7))).shape == (2, 3, 0, 7)
        assert dot_product_attention(*draw((0, 3, 3, 2, 5, 7, 7))).shape == (0, 3, 2, 7)


def test_gradients_of_the_definition_to_second_order():
    sizes = (1, 2, 1, 3, 2, 5, 5)
    inputs = [*draw(sizes), draw_bias("full", sizes, torch.float64)]
    mask = torch.tensor([[True, True], [False, False], [True, False]])

    def operation(query, key, value, bias):
        return dot_product_attention(query, key, value, mask=mask, bias=bias)

    with use_backend("reference"):
        assert gradcheck(operation, inputs, check_forward_ad=True)
        assert gradgradcheck(operation, inputs)


@on_the_device
def test_forward_derivatives_take_the_definition():
    query, key, value = (t.detach() for t in draw((1, 2, 2, 61, 53, 7, 7)))
    tangent = torch.randn_like(query)

    def operation(query):
        return dot_product_attention(query, key, value)

    _, actual = torch.func.jvp(operation, (query,), (tangent,))
    with use_backend("reference"):
        _, expected = torch.func.jvp(operation, (query,), (tangent,))
    assert actual.abs().max() > 0
    torch.testing.assert_close(actual, expected)


@on_the_device
@given(seed=seeds, queries=lengths, keys=lengths)
def test_weights_are_a_distribution_over_the_keys_that_take_part(seed, queries, keys):
    torch.manual_seed(seed)
    sizes = (2, 3, 1, queries, keys, 5, 5)
    query, key, _ = draw(sizes)
    mask = torch.rand(2, 3, queries, keys) < 0.5
    weights = attention_weights(query, key, mask=mask)
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(weights.sum(-1), mask.any(-1).double())


@on_the_device
@given(seed=seeds, queries=lengths, keys=lengths, change=st.integers(0, 6))
def test_causal_sees_no_later_key(seed, queries, keys, change):
    torch.manual_seed(seed)
    query, key, value = draw((1, 2, 2, queries, keys, 3, 3))
    before = dot_product_attention(query, key, value, is_causal=True)
    changed = change % keys
    key, value = key.detach().clone(), value.detach().clone()
    key[:, :, changed] += 1.0
    value[:, :, changed] += 1.0
    after = dot_product_attention(query, key, value, is_causal=True)
    early = [i for i in range(queries) if i + keys - queries < changed]
    torch.testing.assert_close(after[:, :, early], before[:, :, early], rtol=0, atol=0)
    late = [i for i in range(queries) if i not in early]
    assert not late or not torch.equal(after[:, :, late], before[:, :, late])


@given(seed=seeds, keys=lengths)
def test_the_order_of_the_keys_does_not_matter(seed, keys):
    torch.manual_seed(seed)
    query, key, value = draw((1, 2, 2, 3, keys, 5, 5))
    order = torch.randperm(keys)
    torch.testing.assert_close(
        dot_product_attention(query, key[:, :, order], value[:, :, order]),
        dot_product_attention(query, key, value),
    )


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dropout_keeps_the_mean_and_drops_its_part(backend):
    query, key = torch.zeros(1, 1, 400, 2), torch.zeros(1, 1, 50, 2)
    with use_backend(backend):
        out = dot_product_attention(query, key, torch.eye(50)[None, None], dropout=0.3)
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert out.mean().item() == pytest.approx(1 / 50, rel=0.02)
    assert out.max().item() == pytest.approx(1 / 50 / 0.7)


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_scale_is_one_over_the_root_of_the_head_size_unless_given(backend):
    query, key, value = draw((1, 2, 2, 3, 5, 4, 4))
    with use_backend(backend):
        default = dot_product_attention(query, key, value)
        torch.testing.assert_close(dot_product_attention(2 * query, key, value, scale=0.25), default)
        assert not torch.allclose(dot_product_attention(query, key, value, scale=0.25), default)


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("sizes", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)], ids=str)
def test_compiles_whole_and_keeps_its_numbers(backend, sizes):
    inputs, mask = draw(sizes, torch.float32), draw_mask("query-key", sizes)

    def operation(query, key, value):
        return dot_product_attention(query, key, value, mask=mask, is_causal=True)

    expected = operation(*inputs)
    cotangent = torch.randn_like(expected)
    with use_backend(backend):
        actual = torch.compile(operation, fullgraph=True, dynamic=True)(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


def calls_sdpa(inputs: list[Tensor]) -> bool:
    with torch.profiler.profile() as profile:
        dot_product_attention(*inputs)
    return any("scaled_dot_product" in event.name for event in profile.events())


def test_takes_the_path_that_it_says():
    short, long = draw((1, 2, 2, 5, 48, 4, 4)), draw((1, 2, 2, 5, 49, 4, 4))
    assert explain(dot_product_attention, *short).chosen == "reference"
    assert explain(dot_product_attention, *long).chosen == "torch"
    assert calls_sdpa(long)
    assert not calls_sdpa(short)
    with use_backend("torch"):
        assert calls_sdpa(short)


@on_the_device
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"bias": True}, {"mask": True}], ids=str)
def test_second_derivatives_on_every_path(options):
    inputs = draw((1, 2, 1, 3, 4, 2, 3))
    if options.pop("bias", False):
        inputs.append(torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    if options.pop("mask", False):
        options = {"mask": torch.rand(1, 2, 3, 4) < 0.6}

    def operation(query, key, value, bias=None):
        return dot_product_attention(query, key, value, bias=bias, **options)

    def loss(query):
        return operation(query, *inputs[1:]).square().sum()

    grad, query = torch.func.grad, inputs[0].detach()
    with use_backend("torch"):
        assert calls_sdpa(inputs[:3])
        assert gradgradcheck(operation, inputs)
        actual = torch.func.hessian(loss)(query), grad(lambda q: grad(loss)(q).sum())(query)
    with use_backend("reference"):
        expected = torch.func.hessian(loss)(query), grad(lambda q: grad(loss)(q).sum())(query)
    torch.testing.assert_close(actual, expected)


@on_the_device
@pytest.mark.parametrize("groups", [1, 2])
def test_a_second_backward_pass_over_a_kept_graph(groups):
    inputs = draw((1, 2, groups, 60, 70, 4, 4))
    out = dot_product_attention(*inputs)
    cotangent = torch.randn_like(out)
    with_graph = torch.autograd.grad(out, [inputs[0], inputs[2]], cotangent, create_graph=True)
    first = torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
    again = torch.autograd.grad(out, inputs, cotangent, create_graph=True)
    torch.testing.assert_close(first, tuple(g.detach() for g in again))
    torch.testing.assert_close((first[0], first[2]), with_graph)
    torch.autograd.grad(with_graph, inputs, [torch.randn_like(g) for g in with_graph])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_backward_pass_lets_go_of_the_inputs(groups):
    """As autograd does of what it has saved: layer by layer, not when the whole graph goes."""
    inputs = [t.detach().requires_grad_() for t in draw((1, 2, groups, 60, 70, 4, 4))]
    moved = [t * 1 for t in inputs]
    kept = [weakref.ref(t) for t in moved]
    out = dot_product_attention(*moved)
    del moved
    torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert [ref() is None for ref in kept] == [True] * 3
    assert out.grad_fn is not None


TILES = {"_TILED_DROPOUT": 2 * 60 * 70, "_TILED_TRAINING": 2 * 60 * 70, "_TILED_BIAS": 2 * 60 * 70}


@pytest.mark.parametrize(
    ("trained", "dropout", "training", "tiled", "chosen"),
    [
        (True, 0.0, True, True, "torch"),
        (True, 0.0, False, False, "torch"),
        (False, 0.0, True, False, "torch"),
        (False, 0.1, True, True, "torch"),
        (False, 0.1, False, True, "torch"),
    ],
)
@pytest.mark.parametrize("length", [60, 59])
def test_tiles_of_a_cpu_take_what_pytorch_writes_out(
    trained, dropout, training, tiled, chosen, length, monkeypatch
):
    calls = []
    for name, scores in TILES.items():
        monkeypatch.setattr(module, name, scores)
    original = _tiled_attention.tiled_attention
    monkeypatch.setattr(
        _tiled_attention, "tiled_attention", lambda *inputs: calls.append(1) or original(*inputs)
    )
    inputs = draw((1, 2, 1, length, 70, 4, 4), torch.float32)
    bias = torch.randn(2, length, 70, requires_grad=trained)
    with torch.set_grad_enabled(training):
        out = dot_product_attention(*inputs, bias=bias, dropout=dropout)
        found = explain(dot_product_attention, *inputs, bias=bias, dropout=dropout).chosen
    tiled = tiled and length == 60
    assert len(calls) == tiled
    assert found == (chosen if tiled or not dropout else "reference")
    if not dropout:
        expected = module.dot_product_attention_reference(*inputs, bias=bias)
        torch.testing.assert_close(out, expected)
    for mode in torch.autocast("cpu", torch.bfloat16), torch.func.vmap:
        if mode is torch.func.vmap:
            mode(lambda q: dot_product_attention(q, *inputs[1:], bias=bias))(inputs[0][None])
        else:
            with mode:
                dot_product_attention(*inputs, bias=bias)
    assert len(calls) == tiled


def test_dropout_of_tiles_keeps_the_mean_and_drops_its_part(monkeypatch):
    monkeypatch.setattr(module, "_TILED_DROPOUT", 1)
    query = key = torch.zeros(2, 3, 60, 8)
    left = dot_product_attention(query, key, torch.eye(60).expand(2, 3, 60, 60), dropout=0.25) * 60
    assert (left == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert left.mean().item() == pytest.approx(1, abs=0.03)


def on_a_gpu(options) -> str:
    """What would be chosen there: fake tensors have the device, and nothing to compute with."""
    with FakeTensorMode():
        inputs = [torch.empty(2, 4, 256, 64, device="cuda", dtype=options.pop("dtype", torch.float16))] * 3
        made = {n: value() if callable(value) else value for n, value in options.items()}
        return explain(dot_product_attention, *inputs, **made).chosen


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "torch"),
        ({"is_causal": True}, "torch"),
        ({"dropout": 0.1}, "torch"),
        ({"dtype": torch.float64, "window": (3, 3)}, "torch"),
        ({"window": (3, 3)}, "triton"),
        ({"bias": lambda: torch.empty(4, 256, 256, device="cuda")}, "triton"),
        ({"mask": lambda: torch.empty(256, 256, device="cuda", dtype=torch.bool)}, "triton"),
        ({"key_lengths": lambda: torch.empty(2, device="cuda", dtype=torch.long)}, "triton"),
        ({"score_bias": lambda: DistanceBias(torch.empty(4, device="cuda"))}, "triton"),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given),
)
def test_the_rules_of_a_gpu(options, chosen):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    assert on_a_gpu(dict(options)) == chosen


@pytest.mark.parametrize(
    ("dtype", "widths", "message"),
    [
        (torch.float16, (64, 257), "at most 256 wide in the kernel, these 257"),
        (torch.float64, (64, 64), "float64 the kernel is made for tests"),
        (torch.float32, (160, 64), "float32 heads wider than 128"),
        (torch.float8_e4m3fn, (64, 64), "the kernel has no torch.float8_e4m3fn"),
        (torch.float16, (256, 256), None),
        (torch.float32, (128, 128), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_the_kernel_of_a_gpu_refuses(dtype, widths, message, packed):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with FakeTensorMode():
        shapes = [(9, 2, width) if packed else (1, 2, 9, width) for width in (widths[0], *widths)]
        inputs = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
        if packed:
            starts = torch.empty(2, device="cuda", dtype=torch.int32)
            refusals = explain(packed_attention, *inputs, starts).refusals
        else:
            refusals = explain(dot_product_attention, *inputs, window=(3, 3)).refusals
    assert ("triton" in refusals) == (message is not None)
    assert message is None or message in refusals["triton"]


@pytest.mark.parametrize(
    ("options", "training", "most"),
    [
        ({}, True, 48),
        ({}, False, 32),
        ({"is_causal": True}, True, 20),
        ({"mask": torch.ones(1, dtype=torch.bool)}, True, 20),
        ({"window": (3, 3)}, True, 20),
        ({"is_causal": True}, False, -1),
        ({"bias": torch.zeros(1)}, False, -1),
        ({"bias": torch.zeros(1, requires_grad=True)}, True, 48),
    ],
    ids=str,
)
def test_short_sequences_of_a_cpu_take_the_definition(options, training, most):
    for length in {1, max(most, 1), most + 2, 100}:
        for queries, keys in (length, 1), (1, length):
            inputs = draw((1, 1, 1, queries, keys, 4, 4))
            with torch.set_grad_enabled(training):
                chosen = explain(dot_product_attention, *inputs, **options).chosen
            assert chosen == ("reference" if length <= most else "torch")


def shapes(*given: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape) for shape in given]


Q, K = (2, 3, 5, 7), (2, 3, 11, 7)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (shapes(Q[1:], K, K), {}, r"expected query \(B, H, Lq, D\).*got query \(3, 5, 7\)"),
        (shapes(Q, (1, *K[1:]), K), {}, r"got query .* key \(1, 3, 11, 7\)"),
        (shapes(Q, K, (2, 3, 13, 7)), {}, r"value \(2, 3, 13, 7\)"),
        (shapes(Q, (2, 3, 11, 5), K), {}, r"key \(2, 3, 11, 5\)"),
        (shapes(Q, (2, 2, 11, 7), (2, 2, 11, 7)), {}, "heads must be a multiple of the key's, got 3 and 2"),
        (shapes(Q, K, K), {"mask": torch.ones(5, 11)}, "mask must be boolean.*got torch.float32"),
        (shapes(Q, K, K), {"mask": torch.ones(11, 5).bool()}, r"mask must broadcast to \(2, 3, 5, 11\)"),
        (shapes(Q, K, K), {"bias": torch.ones(5, 11).bool()}, "bias must be a float.*got torch.bool"),
        (shapes(Q, K, K), {"bias": torch.ones(2, 2, 3, 5, 11)}, "bias must broadcast"),
        (shapes(Q, K, K), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ([torch.zeros(Q), torch.zeros(K).double(), torch.zeros(K)], {}, "must share one dtype"),
    ],
)
def test_bad_input_is_named(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(*inputs, **options)
