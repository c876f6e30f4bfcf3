"""The LSTM cell: torch.nn's, the papers' peepholes and projection by a formula, counts of parameters."""

import numpy as np
import pytest
import torch
from lamina.layers import LSTMCell
from torch import nn


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_formula(cell, x, h, c):
    """One step in NumPy, gate by gate, from the papers' equations."""
    H = cell.hidden_dim
    p = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    W, U, b, b2 = (
        dict(zip("ifgo", p[name].reshape(4, H, -1), strict=True)) if name in p else dict.fromkeys("ifgo", 0.0)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )

    def normalised(y):
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)

    def products(weights, vectors, gain):
        """Of every gate; with layer normalisation over all of them together."""
        all_gates = np.concatenate([np.einsum("hi,bi->bh", weights[gate], vectors) for gate in "ifgo"], -1)
        all_gates = normalised(all_gates) * p[gain] if gain in p else all_gates
        return dict(zip("ifgo", np.split(all_gates, 4, -1), strict=True))

    of_input, of_state = products(W, x, "gain_ih"), products(U, h, "gain_hh")

    def affine(gate):
        bias = (b[gate] + b2[gate]).reshape(-1) if "bias_ih" in p else 0.0
        return of_input[gate] + of_state[gate] + bias

    see_i, see_f, see_o = p.get("weight_peephole", np.zeros((3, H)))
    new = sigmoid(affine("f") + see_f * c) * c + sigmoid(affine("i") + see_i * c) * np.tanh(affine("g"))
    seen = normalised(new) * p["gain_cell"] + p["bias_cell"] if "gain_cell" in p else new
    out = sigmoid(affine("o") + see_o * new) * np.tanh(seen)
    return (np.einsum("ph,bh->bp", p["weight_hr"], out) if "weight_hr" in p else out), new


OPTIONS = {
    "standard": {},
    "second bias": {"recurrent_bias": True},
    "no bias": {"bias": False},
    "peepholes": {"peepholes": True},
    "projection": {"projection_dim": 2},
    "layer norm": {"layer_norm": True},
    "layer norm, no bias": {"layer_norm": True, "bias": False},
    "all": {"peepholes": True, "layer_norm": True, "projection_dim": 2, "recurrent_bias": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def drawn(options):
    """A cell with parameters of order one, an input and a state for it."""
    cell = LSTMCell(3, 5, **options, dtype=torch.float64)
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    return cell, *(torch.randn(7, dim, dtype=torch.float64) for dim in (3, cell.output_dim, 5))


@every_option
def test_equals_the_papers_formula(options):
    cell, x, h, c = drawn(options)
    output, state = cell(x, (h, c))
    expected = by_formula(cell, *(t.numpy() for t in (x, h, c)))
    np.testing.assert_allclose(state[0].detach(), expected[0], rtol=1e-12)
    np.testing.assert_allclose(state[1].detach(), expected[1], rtol=1e-12)
    torch.testing.assert_close(output, state[0], rtol=0, atol=0)


@every_option
def test_gradients(options):
    cell, *inputs = drawn(options)
    names, parameters = zip(*cell.named_parameters(), strict=True)

    def step(x, h, c, *values):
        return torch.func.functional_call(cell, dict(zip(names, values, strict=True)), (x, (h, c)))[1]

    arguments = [t[:2].clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(step, (*arguments, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(step, (*arguments, *parameters), fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch(bias):
    theirs, ours = nn.LSTMCell(3, 5, bias=bias), LSTMCell(3, 5, bias=bias, recurrent_bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x, h, c = torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(ours(x, (h, c))[1], theirs(x, (h, c)))
    torch.testing.assert_close(ours(x)[1], theirs(x))


def test_shut_gates_keep_the_memory():
    """Forget gate open, input gate shut: c is carried unchanged, the constant error carousel."""
    cell, x, h, c = drawn({})
    with torch.no_grad():
        cell.bias_ih[:5], cell.bias_ih[5:10] = -1e3, 1e3
    torch.testing.assert_close(cell(x, (h, c))[1][1], c, rtol=0, atol=0)


@pytest.mark.parametrize("recurrent_bias", [True, False])
def test_forget_bias(recurrent_bias):
    cell = LSTMCell(3, 7, forget_bias=2.5, recurrent_bias=recurrent_bias)
    total = cell.bias_ih.detach() + (cell.bias_hh.detach() if recurrent_bias else 0)
    assert (total[7:14] == 2.5).all()
    others = torch.cat([total[:7], total[14:]])
    assert others.abs().max() <= 2 * 7**-0.5
    assert (others != 0).all()
    assert (LSTMCell(3, 7).bias_ih[7:14] == 1).all()


def test_layer_normalisation_starts_as_nothing_but_itself():
    cell = LSTMCell(3, 7, layer_norm=True)
    assert all((gain == 1).all() for gain in (cell.gain_ih, cell.gain_hh, cell.gain_cell))
    assert not cell.bias_cell.any()
    assert "layer_norm=True" in repr(cell)


def test_layer_normalisation_forgets_the_size_of_the_weights():
    """Ba et al., table 1: scaling or shifting a weight matrix changes nothing."""
    cell, x, h, c = drawn({"layer_norm": True})
    before = cell(x, (h, c))[1]
    with torch.no_grad():
        cell.weight_ih.mul_(3e3)
        cell.weight_hh.mul_(5e3).add_(torch.randn(5, dtype=torch.float64))
    torch.testing.assert_close(cell(x, (h, c))[1], before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@every_option
def test_a_sequence_is_its_steps(options, reverse):
    cell, _, h, c = drawn(options)
    x, lengths, state = torch.randn(4, 7, 3, dtype=torch.float64), torch.randint(0, 5, (7,)), (h, c)
    output, last = cell.sequence(cell.project(x), state, lengths, reverse=reverse)
    for t in reversed(range(4)) if reverse else range(4):
        alive = (t < lengths).unsqueeze(-1)
        expected, new = cell(x[t], state)
        state = tuple(torch.where(alive, n, old) for n, old in zip(new, state, strict=True))
        torch.testing.assert_close(output[t], expected * alive)
    torch.testing.assert_close(last, state)


def count(cell):
    return sum(p.numel() for p in cell.parameters())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 4 * (5 * 3 + 5 * 5 + 5)),
        ({"recurrent_bias": True}, 4 * (5 * 3 + 5 * 5 + 2 * 5)),
        ({"bias": False}, 4 * (5 * 3 + 5 * 5)),
        ({"peepholes": True}, 4 * (5 * 3 + 5 * 5 + 5) + 3 * 5),
        ({"layer_norm": True}, 4 * (5 * 3 + 5 * 5 + 5) + 10 * 5),
        ({"projection_dim": 2}, 4 * (5 * 3 + 5 * 2 + 5) + 2 * 5),
    ],
)
def test_counts_of_parameters(options, wanted):
    assert count(LSTMCell(3, 5, **options)) == wanted


def test_counts_of_the_papers():
    """Sutskever et al. 2014: 32 M weights a side; Zaremba et al. 2014: 4.65, 19.78 and 66.02 M in all."""
    assert 4 * count(LSTMCell(1000, 1000, device="meta")) == 32_016_000
    for units, wanted in (200, 4.65e6), (650, 19.78e6), (1500, 66.02e6):
        lstm = 2 * count(LSTMCell(units, units, device="meta"))
        embedding, softmax = 10_000 * units, 10_000 * (units + 1)
        assert lstm + embedding + softmax == pytest.approx(wanted, abs=0.005e6)


@pytest.mark.parametrize("projection_dim", [0, -1, 5, 6])
def test_refuses_a_projection_that_is_none(projection_dim):
    with pytest.raises(ValueError, match=f"hidden_dim=5, got projection_dim={projection_dim}"):
        LSTMCell(3, 5, projection_dim=projection_dim)
