"""Additive attention as an operation: its definition, and the Triton kernel against it."""

import pytest
import torch
from lamina.kernels import additive_attention, additive_scores, explain, use_backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

SIZES = (2, 17, 11, 3, 6)  # B, Lq, Lk, H, Dv: off the tiles
TERMS = 4.0  # what cancels in a gradient of a softmax
SUMMED = 16.0  # in float32, where of one key nothing is left
FEATURES = ("mask", "mask by key", "bias", "bias by key", "causal")
BIASES = {"bias": (0, 1, 1), "bias by key": (1, 0, 1)}


def draw(sizes, dtype: torch.dtype) -> list[Tensor]:
    batch, queries, keys, hidden, width = sizes
    shapes = (batch, queries, hidden), (batch, keys, hidden), (hidden,), (batch, keys, width)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def attend(names, sizes, dtype: torch.dtype):
    """The operation with these features as a function of its differentiable inputs, and the inputs."""
    inputs, options = draw(sizes, dtype), {}
    for name in names:
        if name in BIASES:
            shape = [n if own else 1 for n, own in zip(sizes, BIASES[name], strict=False)]
            inputs.append(torch.randn(shape, dtype=dtype, requires_grad=True))
        elif name == "causal":
            options["is_causal"] = True
        else:
            options["mask"] = torch.rand(sizes[0], sizes[1] if name == "mask" else 1, sizes[2]) < 0.7

    def operation(query, key, energy, value, bias=None):
        return additive_attention(query, key, energy, value, bias=bias, **options)

    return operation, inputs


def test_is_the_mean_under_the_softmax_of_the_scores():
    query, key, energy, value = draw((2, 3, 5, 7, 11), torch.float64)
    bias, mask = torch.randn(3, 5).double(), torch.rand(2, 1, 5) < 0.7
    mask[0] = False
    out = additive_attention(query, key, energy, value, bias=bias, mask=mask)
    weights = (additive_scores(query, key, energy) + bias).exp() * mask
    expected = weights @ value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out[1], expected[1])
    assert (out[0] == 0).all()


def test_derivatives_of_the_definition():
    operation, inputs = attend(["bias", "causal"], (1, 2, 3, 2, 2), torch.float64)
    with use_backend("reference"):
        assert gradcheck(operation, inputs)
        assert gradgradcheck(operation, inputs)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [*FEATURES, "plain"])
def test_each_feature(name, dtype, compare):
    operation, inputs = attend([] if name == "plain" else [name], SIZES, dtype)
    compare(operation, inputs, terms=TERMS)


@pytest.mark.parametrize(
    "pair",
    [(a, b) for n, a in enumerate(FEATURES) for b in FEATURES[n + 1 :] if a[:4] != b[:4]],
    ids=" and ".join,
)
def test_each_pair_of_features(pair, compare):
    operation, inputs = attend(pair, SIZES, torch.float32)
    compare(operation, inputs, terms=TERMS)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1),
        (2, 1, 67, 4, 9),  # a decoder's step
        (1, 2, 1, 3, 4),
        (1, 17, 65, 2, 130),  # a tile and a row, of queries and of keys; wide values
        (1, 16, 64, 8, 16),
        (1, 3, 40, 2, 256),
        (0, 2, 3, 4, 5),
        (2, 0, 3, 4, 5),
        (2, 3, 0, 4, 5),
        (1, 3, 4, 0, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bias by key", "causal"])
def test_sizes(name, sizes, compare):
    operation, inputs = attend([name], sizes, torch.float32)
    compare(operation, inputs, terms=SUMMED)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_shapes(seed, compare):
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    lengths = one_of(1, 2, 15, 16, 17), one_of(1, 3, 8, 70)
    sizes = (one_of(1, 1, 2), *lengths, one_of(1, 2, 4), one_of(1, 8, 24, 140))
    dtype = one_of(torch.float32, torch.float16, torch.bfloat16)
    names = [n for n in FEATURES if torch.rand((), device="cpu") < 0.25]
    names = [n for k, n in enumerate(names) if all(n[:4] != m[:4] for m in names[:k])]
    operation, inputs = attend(names, sizes, dtype)
    with use_backend("triton"):
        assert explain(additive_attention, *inputs[:4]).chosen == "triton"
    compare(operation, inputs, terms=SUMMED if dtype is torch.float32 else TERMS)


def test_a_query_without_keys_gives_zero_and_passes_no_gradient():
    inputs = draw((2, 9, 4, 3, 5), torch.float32)
    mask = torch.ones(2, 9, 4, dtype=torch.bool)
    mask[1, 7] = False
    with use_backend("triton"):
        out = additive_attention(*inputs, mask=mask, is_causal=True)
    gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(g.isfinite().all() for g in gradients)
    for of in out, gradients[0]:
        assert (of[:, :5] == 0).all()
        assert (of[1, 7] == 0).all()
        assert (of[0, 7] != 0).any()


def test_a_bias_of_minus_infinity_excludes(compare):
    bias = torch.randn(17, 11).masked_fill(torch.rand(17, 11) < 0.5, -torch.inf)
    bias[3] = -torch.inf
    compare(lambda *t: additive_attention(*t, bias=bias), draw(SIZES, torch.float32), terms=TERMS)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_inputs_of_any_stride(layout, compare):
    def laid_out(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.mT.contiguous().mT if t.ndim > 1 else t.repeat_interleave(2)[::2]
        if layout == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        return t[:1].expand(t.shape)

    operation, inputs = attend(["bias"], SIZES, torch.float32)
    inputs = [laid_out(t.detach()).requires_grad_() for t in inputs]
    compare(operation, inputs, terms=TERMS)


@pytest.mark.parametrize("how", ["stride 0", "transposed", "in part"])
def test_cotangents_of_any_stride(how):
    operation, inputs = attend(["bias"], SIZES, torch.float32)
    cotangent = {
        "stride 0": torch.ones(()).expand(2, 17, 6),
        "transposed": torch.randn(6, 17, 2).permute(2, 1, 0),
        "in part": torch.randn(2, 17, 12)[..., ::2],
    }[how]
    found = []
    for path in "reference", "triton":
        with use_backend(path):
            found.append(torch.autograd.grad(operation(*inputs), inputs, cotangent))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [4], [0, 4], [2, 3]])
def test_gradients_of_some_inputs_alone(wanted):
    operation, inputs = attend(["bias by key"], SIZES, torch.float32)
    cotangent = torch.randn(2, 17, 6)
    with use_backend("reference"):
        expected = torch.autograd.grad(operation(*inputs), inputs, cotangent)
    for n, tensor in enumerate(inputs):
        tensor.requires_grad_(n in wanted)
    with use_backend("triton"):
        actual = torch.autograd.grad(operation(*inputs), [inputs[n] for n in wanted], cotangent)
    torch.testing.assert_close(actual, tuple(expected[n] for n in wanted), atol=1e-4, rtol=1e-4)


def test_first_and_second_derivatives():
    operation, inputs = attend(["bias by key"], (1, 2, 2, 1, 1), torch.float64)
    with use_backend("triton"):
        assert gradcheck(operation, inputs)
        assert gradgradcheck(operation, inputs)


def test_is_registered():
    from lamina.kernels.fused.additive_attention import additive_attention as fused

    inputs = draw((1, 3, 4, 2, 3), torch.float32)
    bias = torch.randn(1, 3, 4, requires_grad=True)
    torch.library.opcheck(fused, [*inputs, torch.rand(1, 1, 4) < 0.7, bias, True, True])
    torch.library.opcheck(fused, [*(t.detach() for t in inputs), None, None, False, False])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("path", ["reference", "torch", "triton"])
def test_compiles_whole_and_keeps_its_numbers(path, dynamic):
    operation, inputs = attend(["bias", "causal"], (2, 5, 7, 3, 4), torch.float32)
    cotangent = torch.randn(2, 5, 4)
    with use_backend(path):
        expected = operation(*inputs)
        actual = torch.compile(operation, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(o, inputs, cotangent) for o in (actual, expected)))


def test_backward_passes_are_equal():
    operation, inputs = attend(["bias by key"], (1, 3, 5, 2, 4), torch.float32)
    cotangent = torch.randn(1, 3, 4)
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend("triton"):
            runs = [torch.autograd.grad(operation(*inputs), inputs, cotangent) for _ in range(6)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_autocast_brings_the_inputs_together(kernels_device):
    query, key, energy, value = draw((2, 3, 5, 7, 4), torch.float32)
    for path in "reference", "triton", "torch":
        with torch.autocast(kernels_device, torch.bfloat16), use_backend(path):
            out = additive_attention(query.bfloat16(), key.bfloat16(), energy, value)
        assert out.dtype is torch.bfloat16


@pytest.mark.filterwarnings("ignore:.* does not run on:UserWarning")
def test_forward_derivatives_take_the_definition():
    inputs = [t.detach() for t in draw((2, 3, 5, 7, 4), torch.float64)]
    tangents = [torch.randn_like(t) for t in inputs]
    found = []
    for path in "triton", "torch", "reference":
        with use_backend(path):
            found.append(torch.func.jvp(additive_attention, tuple(inputs), tuple(tangents))[1])
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_what_the_kernel_does_not_take_goes_to_that_of_the_scores(compare):
    inputs = draw((1, 3, 4, 2, 257), torch.float32)
    with use_backend("triton"):
        assert "at most 256 wide" in explain(additive_attention, *inputs).refusals["triton"]
        mixed = [*inputs[:3], inputs[3].double()]
        assert "torch.float64" in explain(additive_attention, *mixed).refusals["triton"]
        with pytest.warns(UserWarning, match="at most 256 wide"):
            out = additive_attention(*inputs)
    torch.testing.assert_close(out, additive_attention(*inputs))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 4), (2, 5, 6), (4,), (2, 5, 3)), {}, r"expected query \(B, Lq, H\)"),
        (((2, 3, 4), (2, 5, 4), (4,), (2, 6, 3)), {}, r"value must be \(B, Lk, Dv\) = \(2, 5, Dv\)"),
        (((2, 3, 4), (2, 5, 4), (4,), (5, 3)), {}, "value must be"),
        (
            ((2, 3, 4), (2, 5, 4), (4,), (2, 5, 3)),
            {"mask": torch.ones(2, 1, 3, 5, dtype=torch.bool)},
            r"mask must broadcast to \(2, 3, 5\)",
        ),
        (((2, 3, 4), (2, 5, 4), (4,), (2, 5, 3)), {"bias": torch.ones(3, 4)}, "bias must broadcast"),
        (((2, 3, 4), (2, 5, 4), (4,), (2, 5, 3)), {"mask": torch.ones(3, 5)}, "mask must be boolean"),
    ],
)
def test_what_does_not_fit_is_named(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        additive_attention(*map(torch.randn, shapes), **options)


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [
        ("bfloat16", "64 step masked"),
        ("float32", "256"),
        pytest.param("float32", "64 100 step masked", marks=pytest.mark.slow),
        pytest.param("float16", "64 100 256 step masked", marks=pytest.mark.slow),
        pytest.param("float64", "64 256 step masked", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_hopper(for_sm90, dtype, cases):
    cases = [f"{dtype}-attention-{case}" for case in cases.split()]
    compiled = for_sm90("additive_scores.py", *cases, spilled=32)
    assert [k["kernel"] for k in compiled] == ["spread_kernel", "spread_kernel", "attention_kernel"] * len(
        cases
    )
    for kernel in compiled:
        assert kernel["atomics"] == 0, kernel
        assert kernel["spilled"] == 0 or kernel["kernel"] == "attention_kernel", kernel
        has_product = kernel["kernel"] == "attention_kernel" and "step" not in kernel["case"]
        assert (kernel["tensor_cores"] > 0) == (has_product and dtype != "float64"), kernel
