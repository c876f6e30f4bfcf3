"""The GRU cell: torch.nn's form, the papers' form by a formula, and the papers' two signs of z."""

import numpy as np
import pytest
import torch
from lamina.layers import GRUCell
from torch import nn


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(**options):
    """A cell with parameters of order one, an input and a state for it."""
    cell = GRUCell(3, 5, **options, dtype=torch.float64)
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    return cell, torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)


@pytest.mark.parametrize("recurrent_bias", [True, False])
def test_equals_the_formula_of_cho(recurrent_bias):
    """Equations 5 to 8: r on h before the product with U; z keeps the old state."""
    cell, x, h = drawn(reset_after=False, recurrent_bias=recurrent_bias)
    p = {name: value.detach().numpy().reshape(3, 5, -1) for name, value in cell.named_parameters()}
    (W_r, W_z, W), (U_r, U_z, U) = p["weight_ih"], p["weight_hh"]
    b_r, b_z, b = (p["bias_ih"] + p.get("bias_hh", 0))[..., 0]
    x_, h_ = x.numpy(), h.numpy()
    r = sigmoid(x_ @ W_r.T + h_ @ U_r.T + b_r)
    z = sigmoid(x_ @ W_z.T + h_ @ U_z.T + b_z)
    candidate = np.tanh(x_ @ W.T + (r * h_) @ U.T + b)
    output, state = cell(x, (h,))
    np.testing.assert_allclose(output.detach(), z * h_ + (1 - z) * candidate, rtol=1e-12)
    torch.testing.assert_close(state, (output,), rtol=0, atol=0)


def test_the_sign_of_bahdanau_is_a_negated_z():
    cell, x, h = drawn(reset_after=False)
    W, U, b = (p.detach().clone() for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih))
    z = torch.sigmoid(x @ W[5:10].T + h @ U[5:10].T + b[5:10])
    r = torch.sigmoid(x @ W[:5].T + h @ U[:5].T + b[:5])
    candidate = torch.tanh(x @ W[10:].T + (r * h) @ U[10:].T + b[10:])
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter[5:10].neg_()
    torch.testing.assert_close(cell(x, (h,))[0], (1 - z) * h + z * candidate)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch(bias):
    theirs, ours = nn.GRUCell(3, 5, bias=bias), GRUCell(3, 5, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x, h = torch.randn(2, 3), torch.randn(2, 5)
    torch.testing.assert_close(ours(x, (h,))[0], theirs(x, h))
    torch.testing.assert_close(ours(x)[0], theirs(x))


def test_the_two_forms_agree_where_nothing_is_reset():
    """With r = 1 the placement does not matter; with r in between it does."""
    after, x, h = drawn(reset_after=True, recurrent_bias=False)
    before = GRUCell(3, 5, reset_after=False, dtype=torch.float64)
    before.load_state_dict(after.state_dict())
    assert (after(x, (h,))[0] - before(x, (h,))[0]).abs().max() > 1e-2
    with torch.no_grad():
        after.bias_ih[:5], before.bias_ih[:5] = 1e3, 1e3
    torch.testing.assert_close(after(x, (h,))[0], before(x, (h,))[0])


@pytest.mark.parametrize("recurrent_bias", [True, False])
@pytest.mark.parametrize("reset_after", [True, False])
def test_gradients(reset_after, recurrent_bias):
    cell, x, h = drawn(reset_after=reset_after, recurrent_bias=recurrent_bias)
    names, parameters = zip(*cell.named_parameters(), strict=True)

    def step(x, h, *values):
        return torch.func.functional_call(cell, dict(zip(names, values, strict=True)), (x, (h,)))[0]

    arguments = [t[:2].clone().requires_grad_() for t in (x, h)]
    assert torch.autograd.gradcheck(step, (*arguments, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(step, (*arguments, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 3 * (5 * 3 + 5 * 5 + 2 * 5)),
        ({"recurrent_bias": False}, 3 * (5 * 3 + 5 * 5 + 5)),
        ({"reset_after": False}, 3 * (5 * 3 + 5 * 5 + 5)),
        ({"reset_after": False, "recurrent_bias": True}, 3 * (5 * 3 + 5 * 5 + 2 * 5)),
        ({"bias": False}, 3 * (5 * 3 + 5 * 5)),
        ({"bias": False, "reset_after": False}, 3 * (5 * 3 + 5 * 5)),
    ],
)
def test_counts_of_parameters(options, wanted):
    assert sum(p.numel() for p in GRUCell(3, 5, **options).parameters()) == wanted
