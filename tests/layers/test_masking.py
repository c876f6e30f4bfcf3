"""What takes part: the helpers that make masks, and the softmax among what a mask leaves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import causal_mask, mask_from_lengths, mask_from_padding, masked_softmax, window_mask
from lamina.layers.masking import attention_mask
from torch.autograd import gradcheck


@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5), more=st.integers(0, 3))
def test_mask_from_lengths_is_true_on_the_first_places(lengths, more):
    longest = max(lengths)
    mask = mask_from_lengths(torch.tensor(lengths), longest + more)
    assert mask.tolist() == [[i < n for i in range(longest + more)] for n in lengths]
    assert mask_from_lengths(torch.tensor(lengths)).shape == (len(lengths), longest)


def test_no_lengths_make_an_empty_mask():
    assert mask_from_lengths(torch.zeros(0, dtype=torch.int64)).shape == (0, 0)


@pytest.mark.parametrize("lengths", [torch.ones(2, 3).long(), torch.ones(2), torch.ones(2).bool()])
def test_lengths_are_a_vector_of_integers(lengths):
    with pytest.raises(ValueError, match="lengths must be a vector of integers, got shape"):
        mask_from_lengths(lengths)


def test_padding_means_the_inverse():
    padding = torch.tensor([[False, True], [True, True]])
    assert mask_from_padding(padding).tolist() == [[True, False], [False, False]]
    attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(1, 2, 4)
    theirs = attention(x, x, x, key_padding_mask=padding[:1], average_attn_weights=False)[1]
    assert ((theirs != 0) == mask_from_padding(padding[:1])[:, None, None]).all()
    with pytest.raises(ValueError, match=r"padding must be boolean.*got torch.int64"):
        mask_from_padding(padding.long())


@given(queries=st.integers(0, 5), keys=st.integers(0, 5))
def test_the_last_query_sees_the_last_key(queries, keys):
    mask = causal_mask(queries, keys)
    assert mask.tolist() == [[j <= i + keys - queries for j in range(keys)] for i in range(queries)]


@given(queries=st.integers(0, 5), keys=st.integers(0, 5), before=st.integers(0, 6), after=st.integers(0, 6))
def test_a_window_lies_around_the_place_of_the_query(queries, keys, before, after):
    mask = window_mask(queries, keys, before=before, after=after)
    places = [i + keys - queries for i in range(queries)]
    assert mask.tolist() == [[p - before <= j <= p + after for j in range(keys)] for p in places]
    assert torch.equal(window_mask(queries, keys, before=99), causal_mask(queries, keys))


@pytest.mark.parametrize(("before", "after"), [(-1, 0), (0, -1)])
def test_a_window_is_not_negative(before, after):
    with pytest.raises(ValueError, match=f"must not be negative, got before={before} and after={after}"):
        window_mask(3, 3, before=before, after=after)


def test_softmax_among_what_takes_part():
    scores = torch.tensor([[0.0, 1.0, 7.0], [2.0, 5.0, 2.0], [1.0, 1.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    weights = masked_softmax(scores, mask)
    e = torch.e
    expected = torch.tensor([[1 / (1 + e), e / (1 + e), 0], [0.5, 0, 0.5], [0, 0, 0]])
    torch.testing.assert_close(weights, expected)
    (gradient,) = torch.autograd.grad(weights, scores, torch.randn(3, 3))
    assert (gradient[~mask] == 0).all()
    assert gradient[0, 0] != 0


def test_softmax_without_a_mask_is_the_softmax_of_the_last_dimension():
    scores = torch.randn(2, 3, 5)
    assert torch.equal(masked_softmax(scores), scores.softmax(2))


def test_softmax_gradients():
    mask = torch.rand(3, 5) < 0.5
    assert gradcheck(
        lambda s: masked_softmax(s, mask), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    )


def test_key_mask_and_mask_meet():
    key_mask = torch.tensor([[True, True, False], [True, False, True]])
    mask = torch.tensor([[True, False, True], [True, True, True]])
    both = attention_mask(key_mask, mask, (2, 5, 2, 3))
    assert torch.equal(both.expand(2, 5, 2, 3)[:, 4], key_mask[:, None] & mask)
    assert attention_mask(None, mask, (2, 5, 2, 3)) is mask
    assert attention_mask(None, None, (2, 5, 2, 3)) is None


@pytest.mark.parametrize(
    ("key_mask", "message"),
    [
        (torch.ones(2, 4).bool(), r"key_mask must broadcast to \(2, 3\), got \(2, 4\)"),
        (torch.ones(3).bool(), r"key_mask must be \(B, Lk\) = \(2, 3\), got \(3,\)"),
        (torch.ones(2, 3), "key_mask must be boolean with True where a place takes part, got torch.float32"),
    ],
)
def test_a_bad_key_mask_is_named(key_mask, message):
    with pytest.raises(ValueError, match=message):
        attention_mask(key_mask, None, (2, 5, 2, 3))
