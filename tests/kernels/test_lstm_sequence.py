"""LSTM sequences: the definition by a formula in NumPy, PyTorch's loop against it, what must always hold."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import explain, lstm_sequence, use_backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

seeds = st.integers(0, 2**31)
OPTIONS = ("peepholes", "gate_gain", "cell_gain", "projection", "lengths", "reverse")
VARIANTS = {
    "plain": (),
    "peepholes": ("peepholes",),
    "norms": ("gate_gain", "cell_gain"),
    "all": OPTIONS[:5],
    "all reversed": OPTIONS,
}
on_the_device = pytest.mark.usefixtures("kernels_device")


def draw(names, sizes=(7, 3, 5), dtype=torch.float64):
    """The operation as a function of its differentiable inputs, giving one tensor; and these inputs."""
    steps, batch, size = sizes
    outputs = max(1, size // 2) if "projection" in names else size

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    shapes = {
        "peepholes": [(3, size)],
        "gate_gain": [(4 * size,)],
        "cell_gain": [(size,), (size,)],
        "projection": [(outputs, size)],
    }
    inputs = [some(steps, batch, 4 * size), some(4 * size, outputs), some(batch, outputs), some(batch, size)]
    keys = [key for name in names if name in shapes for key in (name, "cell_bias")[: len(shapes[name])]]
    inputs += [some(*shape) for name in names for shape in shapes.get(name, [])]
    options = {"reverse": "reverse" in names}
    if "lengths" in names:
        options["lengths"] = torch.randint(0, steps + 1, (batch,))

    def operation(projected, weight, hidden, memory, *rest):
        given = dict(zip(keys, rest, strict=True))
        output, (hidden, memory) = lstm_sequence(projected, weight, (hidden, memory), **given, **options)
        return torch.cat([output.flatten(), hidden.flatten(), memory.flatten()])

    operation.options = options
    operation.keys = keys
    return operation, inputs


def by_formula(inputs, keys, lengths=None, reverse=False):
    """One sequence, one unit after the other, in NumPy."""
    x, u, h0, c0, *rest = (t.detach().numpy() for t in inputs)
    p = dict(zip(keys, rest, strict=True))
    steps, batch, _ = x.shape
    outputs = np.zeros((steps, *h0.shape))
    last = h0.copy(), c0.copy()

    def normalised(v):
        return (v - v.mean()) / np.sqrt(v.var() + 1e-5)

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    for b in range(batch):
        h, c = h0[b], c0[b]
        length = steps if lengths is None else int(lengths[b])
        for t in reversed(range(length)) if reverse else range(length):
            a = u @ h
            if "gate_gain" in p:
                a = normalised(a) * p["gate_gain"]
            i, f, g, o = np.split(a + x[t, b], 4)
            if "peepholes" in p:
                i, f = i + p["peepholes"][0] * c, f + p["peepholes"][1] * c
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            if "peepholes" in p:
                o = o + p["peepholes"][2] * c
            seen = normalised(c) * p["cell_gain"] + p["cell_bias"] if "cell_gain" in p else c
            h = sigmoid(o) * np.tanh(seen)
            if "projection" in p:
                h = p["projection"] @ h
            outputs[t, b] = h
        last[0][b], last[1][b] = h, c
    return np.concatenate([outputs.ravel(), last[0].ravel(), last[1].ravel()])


every_variant = pytest.mark.parametrize("names", VARIANTS.values(), ids=VARIANTS)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@every_variant
def test_equals_the_formula(names, backend):
    operation, inputs = draw(names)
    with use_backend(backend):
        actual = operation(*inputs)
    expected = by_formula(inputs, operation.keys, **operation.options)
    np.testing.assert_allclose(actual.detach(), expected, rtol=1e-9, atol=1e-12)


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_variant
def test_pytorchs_loop(names, dtype, compare):
    operation, inputs = draw(names, dtype=dtype)
    compare(operation, inputs, "torch")


@on_the_device
@pytest.mark.parametrize(
    "sizes", [(7, 0, 5), (1, 1, 1), (1, 3, 5), (67, 2, 3), (130, 1, 8), (9, 64, 160)], ids=str
)
@pytest.mark.parametrize("names", [("peepholes", "lengths"), OPTIONS], ids=["forward", "all reversed"])
def test_sizes(names, sizes, compare):
    """One step, several chunks, chunks of less than 64 for what a cache holds."""
    operation, inputs = draw(names, sizes, torch.float32)
    compare(operation, inputs, "torch", terms=16.0)


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_step_changes_nothing(backend):
    operation, inputs = draw(OPTIONS, (0, 3, 5))
    with use_backend(backend):
        out = operation(*inputs)
    torch.testing.assert_close(out, torch.cat([inputs[2].flatten(), inputs[3].flatten()]), rtol=0, atol=0)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, cotangent, materialize_grads=True)
    torch.testing.assert_close(torch.cat([g.flatten() for g in gradients[2:4]]), cotangent)
    assert not any(g.any() for g in (*gradients[:2], *gradients[4:]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@every_variant
def test_derivatives(names, backend):
    operation, inputs = draw(names, (3, 2, 3))
    with use_backend(backend):
        assert gradcheck(operation, inputs, fast_mode=True)
        assert gradgradcheck(operation, inputs, fast_mode=True)


@on_the_device
@pytest.mark.parametrize("steps", [7, 70])
@every_variant
def test_without_gradients_it_is_the_same(names, steps):
    operation, inputs = draw(names, (steps, 3, 5))
    expected = operation(*inputs).detach()
    with torch.no_grad():
        torch.testing.assert_close(operation(*inputs), expected, rtol=0, atol=1e-14)


@given(
    seed=seeds, reverse=st.booleans(), norms=st.booleans(), backend=st.sampled_from(["reference", "torch"])
)
def test_what_is_behind_the_end_has_no_influence(seed, reverse, norms, backend):
    torch.manual_seed(seed)
    names = ("peepholes", "lengths", *(("gate_gain", "cell_gain") if norms else ()))
    operation, inputs = draw((*names, "reverse") if reverse else names)
    behind = torch.arange(7).unsqueeze(1) >= operation.options["lengths"]
    poisoned = [inputs[0].detach().masked_fill(behind.unsqueeze(-1), torch.nan).requires_grad_(), *inputs[1:]]
    outcomes = []
    for given_inputs in inputs, poisoned:
        with use_backend(backend):
            out = operation(*given_inputs)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        outcomes.append([out, *torch.autograd.grad(out, given_inputs, cotangent)])
    if backend == "torch":  # the definition's gradients pass through what it does not choose
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=0, atol=0)
    assert not outcomes[0][1][behind].any()


@on_the_device
@given(seed=seeds, cut=st.integers(0, 7), projects=st.booleans())
def test_the_state_carries_over(seed, cut, projects):
    torch.manual_seed(seed)
    names = ("peepholes", "gate_gain", *(("projection",) if projects else ()))
    operation, (projected, weight, hidden, memory, *rest) = draw(names)
    options = dict(zip(operation.keys, rest, strict=True))
    whole, last = lstm_sequence(projected, weight, (hidden, memory), **options)
    first, state = lstm_sequence(projected[:cut], weight, (hidden, memory), **options)
    second, state = lstm_sequence(projected[cut:], weight, state, **options)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(state, last)


@on_the_device
@given(seed=seeds)
def test_reversed_is_the_reversed_sequence(seed):
    torch.manual_seed(seed)
    _, (projected, weight, hidden, memory, peepholes) = draw(("peepholes",))
    backward, last = lstm_sequence(projected, weight, (hidden, memory), peepholes=peepholes, reverse=True)
    forward, expected = lstm_sequence(projected.flip(0), weight, (hidden, memory), peepholes=peepholes)
    torch.testing.assert_close(backward.flip(0), forward)
    torch.testing.assert_close(last, expected)


def test_without_a_state_and_a_bias_they_are_zero():
    _, (projected, weight, hidden, memory, gain, bias) = draw(("cell_gain",))
    zero = torch.zeros_like(hidden), torch.zeros_like(memory)
    expected = lstm_sequence(projected, weight, zero, cell_gain=gain, cell_bias=torch.zeros_like(bias))
    torch.testing.assert_close(lstm_sequence(projected, weight, cell_gain=gain), expected)


def test_transforms_take_the_definition():
    operation, inputs = draw(("peepholes", "gate_gain"), (3, 2, 5))
    expected = torch.autograd.grad(operation(*inputs).square().sum(), inputs[1])[0]
    loss = lambda weight: operation(inputs[0], weight, *inputs[2:]).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(inputs[1]), expected)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    plain = tuple(t.detach() for t in inputs)
    _, actual = torch.func.jvp(operation, plain, tangents)
    with use_backend("reference"):
        _, expected = torch.func.jvp(operation, plain, tangents)
    torch.testing.assert_close(actual, expected)
    many = torch.stack([inputs[0], inputs[0] + 1])
    actual = torch.func.vmap(lambda projected: operation(projected, *inputs[1:]))(many)
    torch.testing.assert_close(actual, torch.stack([operation(t, *inputs[1:]) for t in many]))


def test_explains_its_paths():
    _, inputs = draw(())
    told = explain(lstm_sequence, *inputs[:2], tuple(inputs[2:]))
    assert told.chosen == "torch"
    assert "not on a CUDA device" in told.refusals["triton"]
    wide = torch.zeros(1, 1, 4 * 5000), torch.zeros(4 * 5000, 5000)
    with use_backend("triton"):
        assert explain(lstm_sequence, *wide).chosen == "triton"
        told = explain(lstm_sequence, *wide, cell_gain=torch.ones(5000))
    assert "4096" in told.refusals["triton"]


def test_refuses_what_does_not_fit():
    x, u = torch.zeros(7, 3, 20), torch.zeros(20, 5)
    h, c = torch.zeros(3, 5), torch.zeros(3, 5)
    cases = {
        r"projected must be \(T, B, 4 H\) of floats, got \(3, 20\)": lambda: lstm_sequence(x[0], u),
        "projected must be": lambda: lstm_sequence(x[..., :19], u),
        "of torch.int64": lambda: lstm_sequence(x.long(), u),
        r"weight must be \(20, 5\) of torch.float32, got \(20, 4\)": lambda: lstm_sequence(x, u[:, :4]),
        "got .* of torch.float64": lambda: lstm_sequence(x, u.double()),
        r"state\[0\] must be \(3, 5\)": lambda: lstm_sequence(x, u, (h[:2], c)),
        r"state\[1\] must be \(3, 5\)": lambda: lstm_sequence(x, u, (h, c[:, :2])),
        r"peepholes must be \(3, 5\)": lambda: lstm_sequence(x, u, peepholes=torch.zeros(4, 5)),
        r"gate_gain must be \(20,\)": lambda: lstm_sequence(x, u, gate_gain=torch.zeros(5)),
        r"cell_gain must be \(5,\)": lambda: lstm_sequence(x, u, cell_gain=torch.zeros(20)),
        "cell_bias is added where": lambda: lstm_sequence(x, u, cell_bias=torch.zeros(5)),
        r"projection must be \(2, 5\)": lambda: lstm_sequence(x, u[:, :2], projection=torch.zeros(2, 4)),
        r"lengths must be \(3,\) of integers, got \(3,\) of torch.float32": lambda: lstm_sequence(
            x, u, lengths=torch.ones(3)
        ),
        r"lengths must be .* got \(2,\)": lambda: lstm_sequence(x, u, lengths=torch.ones(2).long()),
    }
    for match, call in cases.items():
        with pytest.raises(ValueError, match=match):
            call()
