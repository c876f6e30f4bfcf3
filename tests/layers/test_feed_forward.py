"""The feed-forward network: its formulas."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import ChunkedFeedForward, FeedForward
from torch import nn
from torch.autograd import gradcheck

sizes, seeds = st.integers(1, 6), st.integers(0, 2**31)


def test_is_two_layers_and_an_activation():
    layer, x = FeedForward(3, 7, activation=nn.ReLU), torch.randn(2, 5, 3)
    hidden = (x @ layer.up.weight.T + layer.up.bias).clamp(min=0)
    torch.testing.assert_close(layer(x), hidden @ layer.down.weight.T + layer.down.bias)


def test_gated_multiplies_by_the_activated_gate():
    layer, x = FeedForward(3, 7, gated=True, activation=nn.SiLU, bias=False), torch.randn(2, 5, 3)
    gate, up = x @ layer.gate.weight.T, x @ layer.up.weight.T
    torch.testing.assert_close(layer(x), (gate * gate.sigmoid() * up) @ layer.down.weight.T)
    assert len(list(layer.parameters())) == 3


def test_equals_the_feed_forward_of_torch():
    theirs = nn.TransformerEncoderLayer(6, 1, 13, dropout=0, activation="gelu", batch_first=True)
    ours = FeedForward(6, 13)
    ours.up.load_state_dict(theirs.linear1.state_dict())
    ours.down.load_state_dict(theirs.linear2.state_dict())
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(ours(x), theirs._ff_block(x))


@given(seed=seeds, length=sizes)
def test_tokens_do_not_meet(seed, length):
    torch.manual_seed(seed)
    layer, x = FeedForward(3), torch.randn(2, length, 3)
    order = torch.randperm(length)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0])


def test_any_leading_dimensions():
    layer, x = FeedForward(3), torch.randn(2, 5, 7, 3)
    expected = layer(x)
    torch.testing.assert_close(layer(x.view(70, 3)).view_as(x), expected)
    torch.testing.assert_close(layer(x[1, 2, 3]), expected[1, 2, 3])


def test_dropout_falls_on_the_hidden_layer_and_on_the_output():
    layer, x = FeedForward(3, 5, dropout=0.5), torch.randn(1, 2000, 3)
    hidden = []
    layer.down.register_forward_hook(lambda module, args, output: hidden.append(args[0]))
    y = layer(x)
    assert (hidden[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (y == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(layer.eval()(x), layer.down(F.gelu(layer.up(x))))


@pytest.mark.parametrize(("dropout", "hidden_dropout"), [(0.5, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("kind", [FeedForward, partial(ChunkedFeedForward, chunk_size=100)])
def test_dropout_of_the_hidden_layer_may_be_another(kind, dropout, hidden_dropout):
    layer, x = kind(3, 5, dropout=dropout, hidden_dropout=hidden_dropout), torch.randn(1, 2000, 3)
    hidden = []
    layer.down.register_forward_hook(lambda module, args, output: hidden.append(args[0]))
    y = layer(x)
    dropped = torch.cat([h.flatten() for h in hidden]) == 0
    assert dropped.float().mean().item() == pytest.approx(hidden_dropout, abs=0.05)
    assert (y == 0).float().mean().item() == pytest.approx(dropout, abs=0.05)
    assert torch.equal(layer.eval()(x), FeedForward.forward(layer, x))


@pytest.mark.parametrize("gated", [False, True])
def test_gradients(gated):
    layer = FeedForward(3, 2, gated=gated, dtype=torch.float64)
    assert gradcheck(layer, torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True))


def test_sizes_and_biases():
    layer = FeedForward(3, gated=True)
    assert layer.up.weight.shape == layer.gate.weight.shape == (12, 3)
    assert layer.down.weight.shape == (3, 12)
    assert FeedForward(3).gate is None
    assert {name for name, _ in FeedForward(3, bias=False).named_parameters()} == {"up.weight", "down.weight"}


def test_a_relu_writes_into_its_input_where_nobody_sees_it():
    layer = FeedForward(5, 7, activation=nn.ReLU).double()
    x, cotangent = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, 5).double()
    of = [x, *layer.parameters()]
    expected = layer.down(layer.up(x).relu())
    gradients = torch.autograd.grad(expected, of, cotangent)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.autograd.grad(layer(x), of, cotangent), gradients)
    seen, written = [], []
    layer.up.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(seen[0], layer.up(x))
    layer.activation.register_forward_hook(lambda module, args, output: written.append(output))
    layer(x)
    torch.testing.assert_close(written[0], layer.up(x).relu())
