"""The Triton kernels of dot-product attention against its definition, for every feature and pairs of them.

On a CPU they run in Triton's interpreter; on a GPU, where TRITON_INTERPRET=0 is set, they are compiled.
"""

import itertools

import pytest
import torch
from lamina.kernels import (
    DistanceBias,
    TableBias,
    dot_product_attention,
    explain,
    packed_attention,
    use_backend,
)
from lamina.kernels.dot_product_attention import attention_weights
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

# B, heads of queries and of keys, Lq, Lk, D, Dv: off the tiles, shorter than one, and longer.
SIZES = (2, 2, 1, 37, 53, 24, 16)
MORE_HEADS = (2, 4, 2, 37, 53, 24, 16)
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
TERMS = 4.0  # what cancels in a gradient of a softmax: dP and its mean, of inputs drawn from N(0, 1)
SUMMED = 16.0  # in float32, where of one key nothing is left, and a parameter's gradient sums what is
FEATURES = (
    "mask",
    "full bias",
    "bias by head",
    "bias by key",
    "one bias",
    "table",
    "one table",
    "ALiBi",
    "Gaussian",
    "lengths",
    "causal",
    "window",
    "one side",
)
BIASES = {"full bias": (1, 1, 1), "bias by head": (0, 1, 1), "bias by key": (1, 0, 0), "one bias": (0, 0, 1)}
ALONE = [{"table", "one table", "ALiBi", "Gaussian"}, {"window", "one side"}, {*BIASES}]  # one of each
PAIRS = [
    pair for pair in itertools.combinations(FEATURES, 2) if not any(set(pair) <= alone for alone in ALONE)
]


def draw(sizes, dtype: torch.dtype) -> list[Tensor]:
    batch, heads, groups, queries, keys, dim, value_dim = sizes
    shapes = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, value_dim)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def feature(name: str, sizes, dtype: torch.dtype):
    """What it hands over: tensors with a gradient, and how the options are made from them."""
    batch, heads, _, queries, keys, *_ = sizes
    if name == "mask":
        mask = torch.rand(batch, 1, queries, keys) < 0.7
        return [], lambda: {"mask": mask}
    if name in BIASES:
        shape = [n if own else 1 for n, own in zip(sizes[:2], BIASES[name], strict=False)]
        shape += [queries if BIASES[name][2] else 1, keys]
        return [torch.randn(shape, dtype=dtype, requires_grad=True)], lambda bias: {"bias": bias}
    if name in ("table", "one table"):
        table = torch.randn(heads if name == "table" else 1, queries + keys, dtype=dtype, requires_grad=True)
        places = torch.arange(queries) + keys - 1, torch.arange(keys)
        return [table], lambda table: {"score_bias": TableBias(table, *places)}
    if name in ("ALiBi", "Gaussian"):
        power = 1 if name == "ALiBi" else 2
        coefficients = (-4 * torch.rand(heads, dtype=dtype)).requires_grad_()
        longest = (queries + keys) ** power
        return [coefficients], lambda c: {"score_bias": DistanceBias(c.to(widest(c)) / longest, power)}
    options = {
        "lengths": {"key_lengths": torch.randint(0, keys + 1, (batch,))},
        "causal": {"is_causal": True},
        "window": {"window": (11, 5)},
        "one side": {"window": (7, None)},
    }[name]
    return [], lambda: options


def widest(tensor: Tensor) -> torch.dtype:
    """As layers hand over such parameters: in float32 at the least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def features(names, sizes, dtype: torch.dtype):
    """The differentiable inputs of these features, and how the operation's options are made from them."""
    extras, makers = [], []
    for name in names:
        extra, make = feature(name, sizes, dtype)
        makers.append((len(extra), make))
        extras += extra

    def options(*given) -> dict:
        rest, made = iter(given), {}
        for count, make in makers:
            made |= make(*itertools.islice(rest, count))
        return made

    return extras, options


def attend(names, sizes, dtype: torch.dtype):
    """The operation with these features as a function of its differentiable inputs, and the inputs."""
    extras, options = features(names, sizes, dtype)

    def operation(query, key, value, *given):
        return dot_product_attention(query, key, value, **options(*given))

    return operation, [*draw(sizes, dtype), *extras]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(name, dtype, compare):
    operation, inputs = attend([name], MORE_HEADS if dtype is torch.float32 else SIZES, dtype)
    compare(operation, inputs, terms=TERMS)


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_each_pair_of_features(pair, compare):
    operation, inputs = attend(pair, SIZES, torch.float32)
    compare(operation, inputs, terms=TERMS)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 8, 8),
        (1, 2, 1, 1, 67, 40, 40),
        (1, 2, 2, 67, 1, 16, 8),
        (2, 3, 3, 65, 64, 80, 72),  # a tile and a row; heads off a power of two
        (1, 4, 1, 16, 130, 128, 128),
        (1, 1, 1, 33, 31, 192, 256),
        (0, 2, 1, 5, 7, 16, 16),
        (2, 2, 1, 0, 7, 16, 16),
        (2, 2, 1, 5, 0, 16, 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bias by head", "causal"])
def test_sizes(name, sizes, compare):
    operation, inputs = attend([name], sizes, torch.float32)
    compare(operation, inputs, terms=TERMS)


def random_case(seed: int):
    """Sizes, features and a dtype, drawn over all that the kernel takes."""
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    heads = one_of(1, 2, 3, 4)
    groups = one_of(*(n for n in (1, 2, 3) if heads % n == 0))
    dims = one_of(8, 13, 16, 32, 40, 64, 72, 96), one_of(8, 16, 24, 64, 80)
    lengths = one_of(1, 2, 15, 16, 17, 31, 48, 70), one_of(1, 3, 15, 16, 33, 50, 64, 90)
    sizes = (one_of(1, 1, 2), heads, groups, *lengths, *dims)
    dtype = one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16)
    names = [n for n in FEATURES if torch.rand((), device="cpu") < 0.25]
    for alone in ALONE:
        names = [n for n in names if n not in [m for m in names if m in alone][1:]]
    return names, sizes, dtype


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_shapes(seed, compare):
    names, sizes, dtype = random_case(seed)
    operation, inputs = attend(names, sizes, dtype)
    with use_backend("triton"):
        assert explain(dot_product_attention, *inputs[:3]).chosen == "triton"
    compare(operation, inputs, terms=SUMMED if dtype is torch.float32 else TERMS)


@pytest.mark.parametrize("name", ["causal", "window", "lengths"])
def test_a_query_without_keys_gives_zero_and_passes_no_gradient(name):
    query, key, value = draw((2, 2, 2, 9, 4, 16, 16), torch.float32)
    options = {
        "causal": {"is_causal": True},
        "window": {"window": (2, 0)},
        "lengths": {"key_lengths": torch.tensor([0, 4])},
    }[name]
    with use_backend("triton"):
        out = dot_product_attention(query, key, value, **options)
    gradients = torch.autograd.grad(out, (query, key, value), torch.randn_like(out))
    blind = (slice(0, 1), slice(None)) if name == "lengths" else (slice(None), slice(0, 5))
    assert (out[blind[0], :, blind[1]] == 0).all()
    assert (gradients[0][blind[0], :, blind[1]] == 0).all()
    assert all(g.isfinite().all() for g in gradients)


WEIGHED = [["mask"], ["full bias", "causal"], ["table"], ["one table"], ["Gaussian", "bias by key"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", WEIGHED, ids=" and ".join)
def test_weights_are_written_by_a_kernel(names, dtype, compare):
    """Nothing else runs: the definition is asked for their gradient alone."""
    query, key, _ = draw(SIZES, dtype)
    extras, options = features(names, SIZES, dtype)

    def operation(query, key, *given):
        return attention_weights(query, key, **options(*given))

    compare(operation, [query, key, *extras], terms=TERMS)
    with use_backend("triton"):
        assert "attention_weights" in str(operation(query, key, *extras).grad_fn)


def test_weights_are_registered_and_twice_differentiable():
    from lamina.kernels.fused.attention_weights import attention_weights as fused

    query, key, _ = draw((1, 2, 1, 3, 4, 8, 8), torch.float32)
    bias = torch.randn(1, 2, 3, 4, requires_grad=True)
    torch.library.opcheck(fused, [query, key, None, bias, None, None, None, None, 0, -1, 0, 0.3])
    inputs = [t.detach().double()[..., :2].requires_grad_() for t in (query, key)]
    with use_backend("triton"):
        assert gradgradcheck(
            lambda *inputs: attention_weights(*inputs, is_causal=True), inputs, fast_mode=True
        )


def test_a_bias_of_minus_infinity_excludes(compare):
    bias = torch.randn(2, 37, 53).masked_fill(torch.rand(2, 37, 53) < 0.5, -torch.inf)
    bias[:, 3] = -torch.inf
    compare(
        lambda *inputs: dot_product_attention(*inputs, bias=bias), draw(SIZES, torch.float32), terms=TERMS
    )


def test_what_lies_beyond_the_lengths_is_not_read():
    query, key, value = (t.detach() for t in draw(SIZES, torch.float32))
    lengths = torch.tensor([31, 20])
    key[0, :, 31:] = key[1, :, 20:] = value[0, :, 31:] = value[1, :, 20:] = torch.nan
    inputs = [t.requires_grad_() for t in (query, key, value)]
    with use_backend("triton"):
        out = dot_product_attention(*inputs, key_lengths=lengths)
    gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(t.isfinite().all() for t in (out, *gradients))
    assert (gradients[1][0, :, 31:] == 0).all()


@pytest.mark.parametrize("layout", ["tokens", "sliced", "transposed", "expanded"])
def test_inputs_of_any_stride(layout, compare):
    def laid_out(t: Tensor) -> Tensor:
        if layout == "tokens":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        if layout == "transposed":
            return t.mT.contiguous().mT
        return t[:1].expand(t.shape)

    inputs = [laid_out(t.detach()).requires_grad_() for t in draw(SIZES, torch.float32)]
    bias = laid_out(torch.randn(2, 2, 37, 53)).requires_grad_()
    compare(lambda q, k, v, b: dot_product_attention(q, k, v, bias=b), [*inputs, bias], terms=TERMS)


@pytest.mark.parametrize(
    "shape", [(), (1,), (53,), (37, 1), (37, 53), (2, 1, 53), (2, 1, 37, 53), (1, 2, 1, 1)]
)
def test_biases_that_broadcast(shape, compare):
    bias = torch.randn(shape, requires_grad=True)
    compare(
        lambda q, k, v, b: dot_product_attention(q, k, v, bias=b),
        [*draw(SIZES, torch.float32), bias],
        terms=TERMS,
    )


@pytest.mark.parametrize("how", ["stride 0", "transposed", "in part"])
def test_cotangents_of_any_stride(how):
    operation, inputs = attend(["bias by head"], SIZES, torch.float32)
    cotangent = {
        "stride 0": torch.ones(()).expand(2, 2, 37, 16),
        "transposed": torch.randn(16, 37, 2, 2).permute(3, 2, 1, 0),
        "in part": torch.randn(2, 2, 37, 32)[..., ::2],
    }[how]
    with use_backend("reference"):
        expected = torch.autograd.grad(operation(*inputs), inputs, cotangent)
    with use_backend("triton"):
        actual = torch.autograd.grad(operation(*inputs), inputs, cotangent)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [0, 3]])
def test_gradients_of_some_inputs_alone(wanted):
    operation, inputs = attend(["one bias"], SIZES, torch.float32)
    cotangent = torch.randn(2, 2, 37, 16)
    with use_backend("reference"):
        expected = torch.autograd.grad(operation(*inputs), inputs, cotangent)
    for n, tensor in enumerate(inputs):
        tensor.requires_grad_(n in wanted)
    with use_backend("triton"):
        actual = torch.autograd.grad(operation(*inputs), [inputs[n] for n in wanted], cotangent)
    torch.testing.assert_close(actual, tuple(expected[n] for n in wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "names", [["full bias", "ALiBi"], ["table", "causal"], ["lengths", "Gaussian"]], ids=str
)
def test_second_derivatives(names):
    operation, inputs = attend(names, (1, 1, 1, 2, 3, 1, 1), torch.float64)
    with use_backend("triton"):
        assert gradcheck(operation, inputs)
        assert gradgradcheck(operation, inputs, fast_mode=True)


def dropped(seed: int, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    torch.manual_seed(seed)
    with use_backend("triton"):
        return dot_product_attention(query, key, value, dropout=0.3, **options)


def test_dropout_drops_its_part_and_keeps_the_mean():
    query = key = torch.zeros(2, 4, 64, 16)  # every weight is 1 / 64
    left = dropped(0, query, key, torch.eye(64).expand(2, 4, 64, 64)) * 64
    assert ((left == 0) | ((left - 1 / 0.7).abs() < 1e-5)).all()
    assert (left == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    rows, heads = left.flatten(0, 2), left.transpose(0, 1).flatten(1)
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(heads[0], heads[1])


def test_dropout_comes_from_the_seed():
    inputs = [t.detach() for t in draw(SIZES, torch.float32)]
    assert torch.equal(dropped(1, *inputs), dropped(1, *inputs))
    assert not torch.equal(dropped(1, *inputs), dropped(2, *inputs))


@pytest.mark.parametrize("names", [[], ["bias by head"], ["mask", "causal"]], ids=str)
def test_gradients_drop_what_the_output_dropped(names):
    """Against the definition, which is told what was left: by `create_graph`, which takes it."""
    operation, inputs = attend(names, SIZES, torch.float64)

    def gradients(create_graph: bool) -> list[Tensor]:
        torch.manual_seed(3)
        with use_backend("triton"):
            out = with_dropout(operation)(*inputs)
        return [out, *torch.autograd.grad(out, inputs, cotangent, create_graph=create_graph)]

    cotangent = torch.randn(2, 2, 37, 16, dtype=torch.float64)
    torch.testing.assert_close(gradients(False), gradients(True))


def with_dropout(operation):
    def run(*inputs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "dot_product_attention", attend_with_dropout)
            return operation(*inputs)

    attend_with_dropout = lambda *inputs, **options: _attention(*inputs, dropout=0.3, **options)  # noqa: E731
    return run


_attention = dot_product_attention


def test_the_definition_of_the_second_derivative_gives_the_same_output():
    from lamina.kernels.fused.dot_product_attention import attention, definition

    query, key, value = draw(SIZES, torch.float64)
    seed, lengths = torch.tensor([7]), torch.tensor([50, 9])
    mask, bias = torch.rand(2, 2, 37, 53) < 0.7, torch.randn(1, 2, 1, 53, dtype=torch.float64)
    options = [None, None, None, None, 0, lengths, None, None, [], 20, 3, 0.2, 0.3, seed]
    actual, expected = (f(query, key, value, mask, bias, *options) for f in (attention, definition))
    torch.testing.assert_close(actual, expected)


def test_the_mass_of_the_softmax_has_a_gradient():
    from lamina.kernels.fused.dot_product_attention import attention, definition

    inputs = draw(SIZES, torch.float64)
    options = [None] * 6 + [0, None, None, None, [], -1, 0, 0.2, 0.0, None]
    cotangent = torch.randn(2, 2, 37, dtype=torch.float64)
    actual, expected = (
        torch.autograd.grad(f(*inputs, *options)[1], inputs[:2], cotangent) for f in (attention, definition)
    )
    torch.testing.assert_close(actual, expected)


def test_is_registered():
    from lamina.kernels.fused.dot_product_attention import attention, kept_weights

    inputs = draw((1, 2, 1, 5, 7, 8, 8), torch.float32)
    mask, bias = torch.rand(1, 1, 5, 7) < 0.7, torch.randn(1, 2, 5, 7, requires_grad=True)
    table, places = torch.randn(2, 12, requires_grad=True), torch.arange(7, dtype=torch.int32)
    torch.library.opcheck(
        attention,
        [
            *inputs,
            mask,
            bias,
            table,
            places[:5] + 6,
            places,
            None,
            0,
            None,
            None,
            None,
            [],
            -1,
            0,
            0.3,
            0.0,
            None,
        ],
    )
    coefficients, lengths = torch.randn(2, requires_grad=True), torch.tensor([6])
    torch.library.opcheck(
        attention,
        [*inputs, *[None] * 5, coefficients, 2, lengths, None, None, [], 3, 1, 0.3, 0.2, torch.tensor([5])],
    )
    torch.library.opcheck(kept_weights, [torch.tensor([5]), 0.2, [1, 2, 5, 7], 7, 0])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("names", [["bias by head", "causal"], ["table"], ["Gaussian", "lengths"]], ids=str)
def test_compiles_whole_and_keeps_its_numbers(names, dynamic):
    operation, inputs = attend(names, (1, 2, 1, 19, 23, 16, 8), torch.float32)
    cotangent = torch.randn(1, 2, 19, 8)
    with use_backend("triton"):
        expected = operation(*inputs)
        actual = torch.compile(operation, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


def test_thirty_backward_passes_are_equal(kernels_device):
    operation, inputs = attend(["one bias", "table"], (2, 1, 1, 9, 13, 16, 16), torch.float32)
    cotangent = torch.randn(2, 1, 9, 16)
    count = 30 if kernels_device == "cuda" else 3  # the interpreter has one thread
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend("triton"):
            runs = [torch.autograd.grad(operation(*inputs), inputs, cotangent) for _ in range(count)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_autocast_casts_what_is_multiplied(kernels_device):
    inputs = draw(SIZES, torch.float32)
    bias = torch.randn(2, 37, 53, requires_grad=True)
    with torch.autocast(kernels_device, torch.bfloat16), use_backend("triton"):
        out = dot_product_attention(*inputs, bias=bias)
    assert out.dtype is torch.bfloat16
    gradients = torch.autograd.grad(out, [*inputs, bias], torch.randn_like(out))
    assert all(g.dtype is torch.float32 for g in gradients)


def test_forward_derivatives_take_the_definition():
    inputs = [t.detach() for t in draw(SIZES, torch.float64)]
    tangents = [torch.randn_like(t) for t in inputs]
    with use_backend("triton"), pytest.warns(UserWarning, match="forward-mode"):
        _, actual = torch.func.jvp(dot_product_attention, tuple(inputs), tuple(tangents))
    with use_backend("reference"):
        _, expected = torch.func.jvp(dot_product_attention, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(actual, expected)


STARTS = torch.tensor([0, 5, 42, 42, 62]), torch.tensor([0, 7, 48, 51, 70])


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 4)}, {"dropout": 0.2}], ids=str)
def test_packed_sequences(options, compare, kernels_device):
    query, key, value = draw(
        (1, 4, 2, 62, 70, 24, 16), torch.float64 if "dropout" in options else torch.float32
    )
    inputs = [t.detach()[0].transpose(0, 1).requires_grad_() for t in (query, key, value)]
    coefficients = (-torch.rand(4, dtype=query.dtype)).requires_grad_()
    starts = [s.to(kernels_device) for s in STARTS]

    def operation(query, key, value, coefficients):
        torch.manual_seed(5)
        return packed_attention(query, key, value, *starts, score_bias=DistanceBias(coefficients), **options)

    if "dropout" not in options:
        compare(operation, [*inputs, coefficients], terms=TERMS)
        return
    with use_backend("triton"):
        out = operation(*inputs, coefficients)
    found = [
        torch.autograd.grad(
            out, [*inputs, coefficients], torch.ones_like(out), create_graph=True, retain_graph=True
        )
        for out in [out] * 2
    ]
    plain = torch.autograd.grad(out, [*inputs, coefficients], torch.ones_like(out))
    torch.testing.assert_close(plain, tuple(g.detach() for g in found[0]))


@pytest.mark.gpu
def test_addresses_beyond_31_bits():
    shapes = (16, 33, 2**16, 64), (16, 33, 16, 64), (16, 33, 16, 64)  # of the queries 2.2e9 numbers
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    with use_backend("triton"):
        out = dot_product_attention(query, key, value)
    with use_backend("reference"):
        expected = dot_product_attention(query[-1:], key[-1:], value[-1:])
    torch.testing.assert_close(out[-1:], expected, atol=2e-2, rtol=2e-2)
