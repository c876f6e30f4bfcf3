"""The feed-forward network: its formulas, and that chunks change nothing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import FeedForward
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


@pytest.mark.parametrize("gated", [False, True])
@given(seed=seeds, length=st.integers(0, 11), chunk_size=sizes)
def test_chunks_equal_the_whole_with_their_gradients(gated, seed, length, chunk_size):
    torch.manual_seed(seed)
    chunked = FeedForward(3, 5, gated=gated, chunk_size=chunk_size, dtype=torch.float64)
    whole = FeedForward(3, 5, gated=gated, dtype=torch.float64)
    whole.load_state_dict(chunked.state_dict())
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    torch.testing.assert_close(chunked(x), whole(x))
    torch.testing.assert_close(
        torch.autograd.grad(chunked(x), (x, *chunked.parameters()), cotangent),
        torch.autograd.grad(whole(x), (x, *whole.parameters()), cotangent),
    )


def test_chunks_hold_that_many_tokens():
    layer, seen = FeedForward(3, 5, chunk_size=4), []
    layer.up.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    layer(torch.randn(2, 11, 3))
    layer(torch.randn(5, 3))
    assert seen == [(2, 4, 3), (2, 4, 3), (2, 3, 3), (4, 3), (1, 3)]


@given(seed=seeds, length=sizes)
def test_tokens_do_not_meet(seed, length):
    torch.manual_seed(seed)
    layer, x = FeedForward(3), torch.randn(2, length, 3)
    order = torch.randperm(length)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0])


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_any_leading_dimensions(chunk_size):
    layer, x = FeedForward(3, chunk_size=chunk_size), torch.randn(2, 5, 7, 3)
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


def test_dropout_in_chunks_draws_for_each_chunk():
    layer, x = FeedForward(3, 5, dropout=0.5, chunk_size=50), torch.ones(1, 100, 3)
    first, second = layer(x).chunk(2, 1)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients(gated):
    layer = FeedForward(3, 2, gated=gated, chunk_size=2, dtype=torch.float64)
    assert gradcheck(layer, torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True))


def test_sizes_and_biases():
    layer = FeedForward(3, gated=True)
    assert layer.up.weight.shape == layer.gate.weight.shape == (12, 3)
    assert layer.down.weight.shape == (3, 12)
    assert FeedForward(3).gate is None
    assert {name for name, _ in FeedForward(3, bias=False).named_parameters()} == {"up.weight", "down.weight"}


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_of_nothing_is_refused(chunk_size):
    with pytest.raises(
        ValueError, match=f"chunk_size must be at least 1, or None, got chunk_size={chunk_size}"
    ):
        FeedForward(3, chunk_size=chunk_size)


def test_a_chunk_of_one_token_is_allowed_and_shown():
    assert "chunk_size=1" in repr(FeedForward(3, chunk_size=1))
    assert "chunk_size" not in repr(FeedForward(3))
