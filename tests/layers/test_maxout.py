"""Maxout: the largest of several linear maps, in Bahdanau's layout, with a gradient for the winner alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import Maxout
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

seeds, sizes = st.integers(0, 2**31), st.integers(1, 5)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@given(seed=seeds, inputs=sizes, outputs=sizes, pieces=sizes, bias=st.booleans())
def test_is_the_largest_of_its_pieces(seed, inputs, outputs, pieces, bias):
    torch.manual_seed(seed)
    layer = Maxout(inputs, outputs, pieces=pieces, bias=bias, dtype=torch.float64)
    tokens = x(3, inputs)
    for token, out in zip(tokens, layer(tokens), strict=True):
        for o in range(outputs):
            rows = range(o * pieces, o * pieces + pieces)
            values = [layer.weight[r] @ token + (layer.bias[r] if bias else 0.0) for r in rows]
            torch.testing.assert_close(out[o], max(values))


def test_two_pieces_are_bahdanau_s_neighbours():
    """t_j = max(t~_{2j-1}, t~_{2j}), counted from 1, where a linear layer gives t~."""
    linear, layer, state = nn.Linear(7, 10), Maxout(7, 5), torch.randn(3, 7)
    layer.load_state_dict(linear.state_dict())
    wide = linear(state)
    expected = torch.stack([torch.maximum(wide[:, 2 * j - 2], wide[:, 2 * j - 1]) for j in range(1, 6)], 1)
    torch.testing.assert_close(layer(state), expected)


@given(seed=seeds, pieces=sizes)
def test_equals_the_usual_view_and_max(seed, pieces):
    torch.manual_seed(seed)
    layer, tokens, cotangent = Maxout(7, 5, pieces=pieces, dtype=torch.float64), x(2, 3, 7), x(2, 3, 5)
    tokens.requires_grad_()
    usual = nn.functional.linear(tokens, layer.weight, layer.bias).view(2, 3, 5, pieces).max(-1).values
    of = [tokens, layer.weight, layer.bias]
    torch.testing.assert_close(layer(tokens), usual)
    torch.testing.assert_close(
        torch.autograd.grad(layer(tokens), of, cotangent), torch.autograd.grad(usual, of, cotangent)
    )


@pytest.mark.parametrize("winner", [0, 1, 2])
def test_the_gradient_goes_to_the_winner_alone(winner):
    layer = Maxout(2, 1, pieces=3)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.bias[winner] = 9.0
    layer(torch.ones(1, 2)).backward(torch.full((1, 1), 5.0))
    expected = torch.zeros(3)
    expected[winner] = 5.0
    assert torch.equal(layer.bias.grad, expected)
    assert torch.equal(layer.weight.grad, expected[:, None].expand(3, 2))


def test_of_equals_the_first_wins():
    layer = Maxout(2, 1, pieces=3)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    layer(torch.ones(1, 2)).backward(torch.ones(1, 1))
    assert layer.bias.grad.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_gradients(pieces):
    layer, tokens = Maxout(3, 2, pieces=pieces, dtype=torch.float64), x(4, 3).requires_grad_()

    def of(tokens, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, tokens)

    assert gradcheck(of, (tokens, layer.weight, layer.bias))
    assert gradgradcheck(of, (tokens, layer.weight, layer.bias))


def test_gradients_of_each_sample_alone():
    layer, tokens = Maxout(3, 2, pieces=3, dtype=torch.float64), x(4, 3)

    def loss(weight, token):
        return torch.func.functional_call(layer, {"weight": weight}, token).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(layer.weight, tokens)
    for gradient, token in zip(each, tokens, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(layer.weight, token), layer.weight)[0])


def test_is_convex():
    layer, a, b = Maxout(3, 5, pieces=4, dtype=torch.float64), x(50, 3), x(50, 3)
    middle, mean = layer((a + b) / 2), (layer(a) + layer(b)) / 2
    assert (middle <= mean + 1e-12).all()
    assert (middle < mean - 1e-6).any()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_nan_is_not_lost(at):
    layer = Maxout(2, 1, pieces=3)
    with torch.no_grad():
        layer.bias[at] = math.nan
    assert layer(torch.ones(1, 2)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_near(dtype):
    layer, tokens = Maxout(7, 5, pieces=3), torch.randn(2, 7)
    low = Maxout(7, 5, pieces=3, dtype=dtype)
    low.load_state_dict(layer.state_dict())
    torch.testing.assert_close(low(tokens.to(dtype)).float(), layer(tokens), rtol=0.03, atol=0.03)


def test_no_tokens_and_any_shape():
    assert Maxout(7, 5)(torch.randn(0, 7)).shape == (0, 5)
    assert Maxout(7, 5)(torch.randn(7)).shape == (5,)
    assert Maxout(7, 5)(torch.randn(2, 3, 4, 7)).shape == (2, 3, 4, 5)


def test_starts_as_a_linear_layer():
    layer = Maxout(100, 300, pieces=3)
    for parameter in layer.parameters():
        assert parameter.abs().max() <= 0.1
        assert parameter.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert Maxout(7, 5, bias=False).bias is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Maxout(7, 5, pieces=0), "pieces must be at least 1, got 0"),
        (lambda: Maxout(7, 5)(torch.ones(2, 6)), r"x must be \(..., 7\), got \(2, 6\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
