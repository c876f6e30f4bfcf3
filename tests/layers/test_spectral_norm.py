"""Spectral norm: the true largest singular value, torch's own layer step by step, and ways to load one."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import SpectralConv2d, SpectralLinear
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm

DOUBLE = {"dtype": torch.float64}
CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "all options": {
        "kernel_size": (3, 2),
        "stride": 2,
        "padding": (2, 1),
        "dilation": (1, 2),
        "groups": 2,
        "padding_mode": "reflect",
        "bias": False,
    },
}
LAYERS = {
    "linear": (SpectralLinear, nn.Linear, (7, 5), {}, (3, 11, 7)),
    "tall": (SpectralLinear, nn.Linear, (5, 7), {"bias": False}, (3, 5)),
    **{
        name: (SpectralConv2d, nn.Conv2d, (4, 6), options, (3, 4, 7, 11))
        for name, options in CONVOLUTIONS.items()
    },
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def matrix(layer) -> torch.Tensor:
    return layer.weight.detach().flatten(1)


def singular_values(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(weight.detach().flatten(1))


def twins(kind: str):
    """Ours and torch's parametrized layer, with the same weight and vectors, and an input."""
    ours_class, theirs_class, sizes, options, shape = LAYERS[kind]
    ours = ours_class(*sizes, **options, **DOUBLE)
    theirs = parametrizations.spectral_norm(theirs_class(*sizes, **options, **DOUBLE))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, torch.randn(shape, **DOUBLE, requires_grad=True)


@every_layer
def test_converges_to_the_largest_singular_value(kind):
    layer = twins(kind)[0]
    nn.init.normal_(layer.weight)
    for _ in range(300):
        weight = layer.normalized_weight()
    torch.testing.assert_close(weight, layer.weight / singular_values(layer.weight)[0])
    layer.eval()
    torch.testing.assert_close(singular_values(layer.normalized_weight())[0], torch.ones((), **DOUBLE))


def test_a_call_in_training_is_the_formula():
    layer, x = SpectralLinear(7, 5, eps=0.0, **DOUBLE), torch.randn(3, 7, **DOUBLE)
    nn.init.normal_(layer.weight)
    w, v = matrix(layer).numpy(), layer.v.numpy().copy()
    u = w @ v / np.sqrt(((w @ v) ** 2).sum())
    v = u @ w / np.sqrt(((u @ w) ** 2).sum())
    sigma = sum(u[o] * w[o, i] * v[i] for o in range(5) for i in range(7))
    expected = x.numpy() @ w.T / sigma + layer.bias.detach().numpy()
    torch.testing.assert_close(layer(x), torch.from_numpy(expected))
    torch.testing.assert_close((layer.u, layer.v), (torch.from_numpy(u), torch.from_numpy(v)))


@every_layer
def test_trains_as_the_parametrization_of_torch(kind):
    ours, theirs, x = twins(kind)
    for module in ours, theirs:
        nn.init.normal_(module.weight if module is ours else module.parametrizations.weight.original)
    ours.load_state_dict(theirs.state_dict())
    cotangent = torch.randn_like(ours.eval()(x))
    for step in range(5):
        training = step != 3
        results = []
        for module in ours, theirs:
            y = module.train(training)(x)
            parameters = list(module.parameters())
            gradients = torch.autograd.grad(y, [x, *parameters], cotangent)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients[1:], strict=True):
                    parameter -= 0.1 * gradient
            named = zip([name for name, _ in module.named_parameters()], gradients[1:], strict=True)
            by_name = {"bias" if name == "bias" else "weight": gradient for name, gradient in named}
            results.append([y, gradients[0], by_name])
        torch.testing.assert_close(*results)
        vectors = theirs.parametrizations.weight[0]
        torch.testing.assert_close((ours.u, ours.v), (vectors._u, vectors._v))


def test_several_iterations_in_a_call_are_several_calls():
    torch.manual_seed(1)
    often = SpectralLinear(7, 5, **DOUBLE)
    nn.init.normal_(often.weight)
    once = SpectralLinear(7, 5, power_iterations=3, **DOUBLE)
    once.load_state_dict(often.state_dict())
    for _ in range(3):
        often.normalized_weight()
    once.normalized_weight()
    torch.testing.assert_close(often.state_dict(), once.state_dict())


@every_layer
def test_evaluation_keeps_the_vectors(kind):
    layer, _, x = twins(kind)
    layer.weight.data.normal_()
    before = copy.deepcopy(layer.state_dict())
    first = layer.eval()(x)
    torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    sigma = before["u"] @ matrix(layer) @ before["v"]
    torch.testing.assert_close(layer.normalized_weight(), layer.weight / sigma)


@given(seed=st.integers(0, 2**31), outputs=st.integers(1, 7), inputs=st.integers(1, 7))
def test_stretches_no_difference(seed, outputs, inputs):
    torch.manual_seed(seed)
    layer = SpectralLinear(inputs, outputs, power_iterations=200, **DOUBLE)
    layer.weight.data.normal_()
    a, b = torch.randn(2, 5, inputs, **DOUBLE)
    # Whether or not the vectors have found the largest singular value, the norm is at least that of u W v.
    largest = singular_values(layer.normalized_weight())[0]
    assert largest < 1.05
    assert ((layer(a) - layer(b)).norm(dim=-1) <= 1.05 * (a - b).norm(dim=-1)).all()


def test_a_convolution_stretches_by_its_overlap_at_most():
    conv = SpectralConv2d(2, 3, 3, padding=1, bias=False, power_iterations=300, **DOUBLE)
    conv.weight.data.fill_(1.0)
    x = torch.zeros(1, 2, 5, 6, **DOUBLE)
    operator = torch.autograd.functional.jacobian(conv, x).reshape(3 * 5 * 6, 2 * 5 * 6)
    stretch = torch.linalg.svdvals(operator)[0]
    assert 1.5 < stretch <= 3


def test_two_calls_before_a_backward_pass():
    """A critic sees real and fake images before its loss is known."""
    critic, x = SpectralLinear(7, 5), torch.randn(2, 3, 7)
    critic.weight.data.normal_()
    start, cotangent = copy.deepcopy(critic), torch.randn(2, 3, 5)
    gradients = torch.autograd.grad([critic(x[0]), critic(x[1])], critic.weight, [*cotangent])[0]
    apart = [torch.autograd.grad(start(x[i]), start.weight, cotangent[i])[0] for i in (0, 1)]
    torch.testing.assert_close(gradients, apart[0] + apart[1])
    assert not torch.equal(*apart)


def test_a_step_in_training_leaves_an_earlier_evaluation_its_vectors():
    layer, x = SpectralLinear(7, 5), torch.randn(3, 7)
    layer.weight.data.normal_()
    expected = torch.autograd.grad(layer.eval()(x).square().sum(), layer.weight)[0]
    y = layer(x).square().sum()
    layer.train()(x)
    torch.testing.assert_close(torch.autograd.grad(y, layer.weight)[0], expected)


@every_layer
def test_gradients(kind):
    layer, _, x = twins(kind)
    x = x.detach()[:2, ..., :7, :5] if x.dim() == 4 else x.detach()[:2]
    weight = layer.eval().weight.detach().clone().requires_grad_()

    def call(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    inputs = x.clone().requires_grad_(), weight
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_the_gradient_penalty_of_a_critic():
    critic = nn.Sequential(SpectralLinear(7, 5), nn.Tanh(), SpectralLinear(5, 1)).double()
    x = torch.randn(3, 7, **DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    gradients = torch.autograd.grad((slope.norm(dim=-1) - 1).square().mean(), critic[0].weight)[0]
    assert gradients.isfinite().all()
    assert gradients.abs().max() > 0


def test_the_state_dict_has_plain_names():
    shapes = {name: tuple(t.shape) for name, t in SpectralLinear(7, 5).state_dict().items()}
    assert shapes == {"weight": (5, 7), "bias": (5,), "u": (5,), "v": (7,)}
    shapes = {name: tuple(t.shape) for name, t in SpectralConv2d(2, 5, 3).state_dict().items()}
    assert shapes == {"weight": (5, 2, 3, 3), "bias": (5,), "u": (5,), "v": (18,)}
    assert {name for name, _ in SpectralLinear(7, 5).named_parameters()} == {"weight", "bias"}


@every_layer
def test_a_plain_layer_of_torch_loads_and_its_vectors_are_found(kind):
    ours, theirs, sizes, options, _ = LAYERS[kind]
    net, plain = nn.ModuleList([ours(*sizes, **options)]), nn.ModuleList([theirs(*sizes, **options)])
    nn.init.normal_(plain[0].weight, mean=3.0)
    state = torch.get_rng_state()
    net.load_state_dict(plain.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(net[0].weight, plain[0].weight)
    largest = singular_values(net.eval()[0].normalized_weight())[0]
    assert abs(largest - 1) < 1e-4


def test_a_plain_layer_loads_into_one_without_memory():
    layer = SpectralLinear(7, 5, device="meta").to_empty(device="cpu")
    plain = nn.Linear(7, 5)
    for buffer in layer.buffers():
        buffer.fill_(torch.nan)
    layer.load_state_dict(plain.state_dict())
    assert layer.eval()(torch.randn(2, 7)).isfinite().all()
    assigned = SpectralLinear(7, 5, device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    torch.testing.assert_close(assigned.state_dict(), layer.state_dict())


@pytest.mark.parametrize("how", [parametrizations.spectral_norm, hooked_spectral_norm])
@every_layer
def test_what_torch_saved_loads(how, kind):
    ours_class, theirs_class, sizes, options, shape = LAYERS[kind]
    theirs, x = how(theirs_class(*sizes, **options)), torch.randn(shape)
    for _ in range(3):
        theirs(x)
    ours = nn.ModuleDict({"layer": ours_class(*sizes, **options)})
    ours.load_state_dict(nn.ModuleDict({"layer": theirs}).state_dict())
    torch.testing.assert_close(ours["layer"].eval()(x), theirs.eval()(x))


def test_half_of_the_vectors_is_an_error():
    layer = SpectralLinear(7, 5)
    state = layer.state_dict()
    del state["u"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"u"'):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"scale"'):
        layer.load_state_dict({**layer.state_dict(), "scale": torch.ones(1)})


def test_reset_parameters_is_as_torchs_and_finds_the_vectors_again():
    layer, plain = SpectralLinear(70, 50), nn.Linear(70, 50)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(3.0)
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    plain.reset_parameters()
    torch.testing.assert_close((layer.weight, layer.bias), (plain.weight, plain.bias))
    largest = singular_values(layer.eval().normalized_weight())[0]
    assert 1 - 1e-5 < largest < 1.2
    torch.testing.assert_close(torch.stack([layer.u.norm(), layer.v.norm()]), torch.ones(2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, training):
    layer = SpectralLinear(300, 50, dtype=dtype).train(training)
    layer.weight.data.mul_(3e4)  # float16 holds the norm, but its reciprocal with few digits
    exact = SpectralLinear(300, 50, **DOUBLE).train(training)
    exact.load_state_dict(layer.state_dict())
    weight, expected = layer.normalized_weight(), exact.normalized_weight()
    assert weight.dtype is layer.u.dtype is dtype
    rounded_once = (expected.to(dtype).double() - expected).norm()
    assert (weight.double() - expected).norm() <= 1.1 * rounded_once
    assert layer(torch.randn(2, 300, dtype=dtype)).isfinite().all()


def test_autocast_does_not_lower_the_precision_of_the_norm():
    layer = SpectralLinear(7, 5).eval()
    expected = layer.normalized_weight()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.normalized_weight(), expected, rtol=0, atol=0)
        assert layer(torch.randn(2, 7)).dtype is torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_autocast_is_off_within_the_norm(monkeypatch, training):
    """On a GPU it would round a matrix times a vector; on a CPU it does not, so its state is read."""
    layer, seen, product = SpectralLinear(7, 5).train(training), set(), torch.mv
    monkeypatch.setattr(
        torch, "mv", lambda *args: seen.add(torch.is_autocast_enabled("cpu")) or product(*args)
    )
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 7))
    assert seen == {False}


@every_layer
def test_training_compiles_whole_and_keeps_the_vectors(kind):
    layer, _, x = twins(kind)
    layer.weight.data.normal_()
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=True)
    for _ in range(2):
        expected, actual = layer(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(twin.state_dict(), layer.state_dict())
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, [x, twin.weight], cotangent),
            torch.autograd.grad(expected, [x, layer.weight], cotangent),
        )


def test_in_training_it_is_pickled_with_its_vectors():
    layer = SpectralConv2d(2, 3, 3)
    layer(torch.randn(1, 2, 5, 5))
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer)).state_dict(), layer.state_dict())


def test_no_tokens_are_no_error():
    assert SpectralLinear(7, 5)(torch.randn(2, 0, 7)).shape == (2, 0, 5)


@pytest.mark.parametrize(
    "make", [lambda **o: SpectralLinear(7, 5, **o), lambda **o: SpectralConv2d(2, 5, 3, **o)]
)
def test_a_wrong_number_of_iterations_is_named(make):
    with pytest.raises(ValueError, match="power_iterations must be at least 1, got power_iterations=0"):
        make(power_iterations=0)


def test_repr_tells_sizes():
    assert repr(SpectralLinear(7, 5)) == (
        "SpectralLinear(in_features=7, out_features=5, bias=True, power_iterations=1)"
    )
    assert repr(SpectralConv2d(2, 5, 3, power_iterations=2)) == (
        "SpectralConv2d(2, 5, kernel_size=(3, 3), stride=(1, 1), power_iterations=2)"
    )
