"""Additive attention: its formula, and properties that hold for every size, mask and input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import AdditiveAttention, causal_mask
from torch.autograd import gradcheck

sizes, seeds = st.integers(1, 6), st.integers(0, 2**31)


def draw(seed: int, queries: int, keys: int, dim: int):
    """A layer with weights of order one, and (B=2) queries and keys for it."""
    torch.manual_seed(seed)
    layer = AdditiveAttention(dim, dim, hidden_dim=3, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer, torch.randn(2, queries, dim).double(), torch.randn(2, keys, dim).double()


def test_is_the_formula():
    layer, query, key = draw(0, 3, 5, 7)
    value, bias = torch.randn(2, 5, 11).double(), torch.randn(3, 5).double()
    for b in range(2):
        for i in range(3):
            scores = torch.stack(
                [
                    layer.energy.weight[0] @ torch.tanh(layer.query(query[b, i]) + layer.key(key[b, j]))
                    for j in range(5)
                ]
            )
            weights = torch.exp(scores + bias[i]) / torch.exp(scores + bias[i]).sum()
            torch.testing.assert_close(layer.weights(query, key, bias=bias)[b, i], weights)
            torch.testing.assert_close(layer(query, key, value, bias=bias)[b, i], weights @ value[b])


def test_keys_are_the_values_and_queries_the_keys_where_not_given():
    layer, query, key = draw(0, 3, 5, 7)
    torch.testing.assert_close(layer(query, key), layer(query, key, key))
    torch.testing.assert_close(layer(query), layer(query, query, query))


@given(seed=seeds, queries=sizes, keys=sizes, dim=sizes)
def test_weights_are_a_distribution_over_the_keys_that_take_part(seed, queries, keys, dim):
    layer, query, key = draw(seed, queries, keys, dim)
    key_mask, mask = torch.rand(2, keys) < 0.5, torch.rand(queries, keys) < 0.7
    weights = layer.weights(query, key, key_mask=key_mask, mask=mask, is_causal=True)
    taking_part = key_mask[:, None] & mask & causal_mask(queries, keys)
    assert (weights[~taking_part] == 0).all()
    torch.testing.assert_close(weights.sum(-1), taking_part.any(-1).double())


@given(seed=seeds, queries=sizes, keys=sizes, padding=sizes, dim=sizes)
def test_what_is_masked_has_no_influence(seed, queries, keys, padding, dim):
    layer, query, key = draw(seed, queries, keys, dim)
    padded = torch.cat([key, torch.full((2, padding, dim), 1e3).double()], dim=1).requires_grad_()
    key_mask = torch.arange(keys + padding).expand(2, -1) < keys
    out = layer(query, padded, key_mask=key_mask)
    torch.testing.assert_close(out, layer(query, key))
    (gradient,) = torch.autograd.grad(out, padded, torch.randn_like(out))
    assert (gradient[:, keys:] == 0).all()


@given(seed=seeds, queries=sizes, keys=sizes, dim=sizes)
def test_the_order_of_the_keys_does_not_matter(seed, queries, keys, dim):
    layer, query, key = draw(seed, queries, keys, dim)
    torch.testing.assert_close(layer(query, key[:, torch.randperm(keys)]), layer(query, key))


def test_a_query_without_keys_gives_zero_and_passes_no_gradient():
    layer, query, key = draw(0, 3, 5, 7)
    query.requires_grad_()
    for given_mask in {"key_mask": torch.zeros(2, 5).bool()}, {"bias": torch.full((3, 5), -torch.inf)}:
        out = layer(query, key, **given_mask)
        assert (out == 0).all()
        assert (torch.autograd.grad(out, query, torch.randn_like(out))[0] == 0).all()


def test_gradients():
    layer, query, key = draw(0, 2, 3, 2)
    key_mask = torch.tensor([[True, False, True], [False, False, False]])
    inputs = query.requires_grad_(), key.requires_grad_()
    assert gradcheck(lambda q, k: layer(q, k, key_mask=key_mask), inputs)


def test_dropout_is_of_the_weights_and_in_training_only():
    layer = AdditiveAttention(4, 4, 3, dropout=0.5)
    query = torch.randn(2, 9, 4)
    out = layer(query, query, torch.eye(9).expand(2, 9, 9))
    assert 0.3 < (out == 0).float().mean() < 0.7
    assert (layer.eval()(query, query, torch.eye(9).expand(2, 9, 9)) != 0).all()


def test_starts_as_the_paper_says():
    layer = AdditiveAttention(500, 300, 200)
    assert set(layer.state_dict()) == {"query.weight", "key.weight", "energy.weight"}  # no bias anywhere
    assert (layer.energy.weight == 0).all()
    assert layer.query.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert layer.key.weight.std().item() == pytest.approx(0.001, rel=0.02)


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        ((2, 3, 5), (2, 4, 6), r"query must be \(B, L, 4\), got \(2, 3, 5\)"),
        ((2, 3, 4), (2, 4, 5), r"key must be \(B, L, 6\), got \(2, 4, 5\)"),
        ((3, 4), (2, 4, 6), r"query must be \(B, L, 4\), got \(3, 4\)"),
    ],
)
def test_bad_sizes_are_named(query, key, message):
    with pytest.raises(ValueError, match=message):
        AdditiveAttention(4, 6, 3)(torch.randn(query), torch.randn(key))


def test_bad_masks_are_named():
    layer, query, key = draw(0, 3, 5, 7)
    with pytest.raises(ValueError, match=r"mask must broadcast to \(2, 1, 3, 5\)"):
        layer(query, key, mask=torch.ones(2, 3, 5).bool())
    with pytest.raises(ValueError, match=r"bias must broadcast to \(2, 1, 3, 5\)"):
        layer(query, key, bias=torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match=r"bias must be a float.*got torch.bool; a bool is `mask`"):
        layer(query, key, bias=torch.ones(3, 5).bool())
