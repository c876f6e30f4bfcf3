"""Biases made from few parameters: their formulas by hand, and attention with them on every path of a CPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import DistanceBias, TableBias, dot_product_attention, use_backend
from lamina.kernels.dot_product_attention import attention_weights
from lamina.layers import causal_mask, mask_from_lengths, window_mask

sizes, seeds = st.integers(1, 7), st.integers(0, 2**31)
on_every_backend = pytest.mark.parametrize("backend", ["reference", "torch"])
on_the_device = pytest.mark.usefixtures("kernels_device")


def draw(batch: int, heads: int, queries: int, keys: int, dim: int):
    shapes = (batch, heads, queries, dim), (batch, heads, keys, dim), (batch, heads, keys, dim)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (5, 3), (4, 4), (0, 3)])
@pytest.mark.parametrize("power", [1, 2])
def test_distance_in_loops(queries, keys, power):
    coefficients = torch.randn(2, dtype=torch.float64)
    dense = DistanceBias(coefficients, power).dense(queries, keys)
    assert dense.shape == (2, queries, keys)
    for h in range(2):
        for i in range(queries):
            for j in range(keys):
                expected = coefficients[h].item() * abs(i + keys - queries - j) ** power
                assert dense[h, i, j].item() == pytest.approx(expected)


@on_the_device
def test_a_grid_of_two_axes_is_one_table():
    """Each offset of two cells of a 3 x 4 grid has one entry, and each entry one offset."""
    rows, cols = torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3)
    places = rows * 7 + cols
    table = torch.arange(2.0 * 5 * 7).view(2, 35)
    dense = TableBias(table, places + 2 * 7 + 3, places).dense()
    offsets = (rows[:, None] - rows + 2) * 7 + (cols[:, None] - cols + 3)
    assert torch.equal(dense, table[:, offsets])
    assert len(offsets.unique()) == 35


@on_the_device
@on_every_backend
@given(seed=seeds, queries=sizes, keys=sizes)
def test_attention_with_each_is_attention_with_what_it_writes_out(backend, seed, queries, keys):
    torch.manual_seed(seed)
    inputs = draw(2, 3, queries, keys, 5)
    parameters = [torch.randn(3, requires_grad=True, dtype=torch.float64)] * 2
    parameters.append(torch.randn(1, queries + keys, requires_grad=True, dtype=torch.float64))
    places = torch.arange(queries) + keys - 1, torch.arange(keys)
    bias = torch.randn(queries, keys, dtype=torch.float64)
    makers = (lambda c: DistanceBias(c, 1), lambda c: DistanceBias(c, 2), lambda t: TableBias(t, *places))
    for parameter, make in zip(parameters, makers, strict=True):
        outcomes = []
        for options in (
            {"score_bias": make(parameter), "bias": bias},
            {"bias": bias + make(parameter).dense(queries, keys)},
        ):
            torch.manual_seed(seed)
            with use_backend(backend):
                out = dot_product_attention(*inputs, **options)
            outcomes.append([out, *torch.autograd.grad(out, [*inputs, parameter], torch.randn_like(out))])
        torch.testing.assert_close(*outcomes)


@on_the_device
@on_every_backend
@given(seed=seeds, queries=sizes, keys=sizes, before=st.integers(0, 4), after=st.integers(0, 4))
def test_windows_and_lengths_are_masks(backend, seed, queries, keys, before, after):
    torch.manual_seed(seed)
    inputs, lengths = draw(2, 3, queries, keys, 5), torch.randint(keys + 1, (2,))
    within = mask_from_lengths(lengths, keys)[:, None, None]
    band = window_mask(queries, keys, before=before, after=after)
    with use_backend(backend):
        actual = dot_product_attention(*inputs, window=(before, after), key_lengths=lengths)
        expected = dot_product_attention(*inputs, mask=band & within)
        one_side = dot_product_attention(*inputs, window=(None, 0))
        causal = dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(one_side, causal)
    assert torch.equal(window_mask(queries, keys, before=keys + queries, after=0), causal_mask(queries, keys))


@on_the_device
def test_the_weights_have_it_too():
    query, key, _ = (t.detach() for t in draw(2, 3, 4, 5, 7))
    score_bias, bias = DistanceBias(torch.randn(3)), torch.randn(4, 5, dtype=torch.float64)
    expected = attention_weights(query, key, bias=bias + score_bias.dense(4, 5).double())
    torch.testing.assert_close(attention_weights(query, key, bias=bias, score_bias=score_bias), expected)


@on_the_device
def test_far_keys_stay_finite_in_half_precision():
    """At distance 999 a square is beyond float16: -inf would exclude the only key that the mask leaves."""
    query = key = value = torch.randn(1, 1, 1000, 4).half()
    mask = torch.zeros(1000, 1000, dtype=torch.bool)
    mask[:, 0] = True
    with use_backend("torch"):
        out = dot_product_attention(
            query, key, value, mask=mask, score_bias=DistanceBias(torch.tensor([-1.0]), 2)
        )
    torch.testing.assert_close(out, value[:, :, :1].expand_as(out))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistanceBias(torch.ones(2, 3)), r"coefficients must be \(H,\) of floats, got \(2, 3\)"),
        (lambda: DistanceBias(torch.ones(2).long()), r"of floats, got \(2,\) of torch.int64"),
        (lambda: DistanceBias(torch.ones(2), 3), "power must be 1 or 2, got 3"),
        (lambda: TableBias(torch.ones(5), PLACES, PLACES), r"table must be \(H, R\) of floats, got \(5,\)"),
        (
            lambda: TableBias(torch.ones(1, 5), PLACES.float(), PLACES),
            "query_positions must be a vector",
        ),
        (
            lambda: TableBias(torch.ones(1, 5), PLACES, PLACES[None]),
            "key_positions must be a vector",
        ),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


PLACES = torch.arange(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"score_bias": DistanceBias(torch.ones(2))},
            "must have 3 coefficients, one a head, got 2",
        ),
        ({"score_bias": TableBias(torch.ones(2, 9), PLACES, PLACES)}, "a table of 3 heads, or of one, got 2"),
        (
            {"score_bias": TableBias(torch.ones(1, 9), PLACES, PLACES)},
            r"positions of \(Lq, Lk\) = \(4, 5\), got \(5, 5\)",
        ),
        ({"score_bias": torch.ones(4, 5)}, "must be a DistanceBias or a TableBias, got Tensor"),
        (
            {"key_lengths": torch.ones(2)},
            r"must be \(2,\) of integers, got \(2,\) of torch.float32",
        ),
        ({"key_lengths": torch.ones(3).long()}, r"key_lengths must be \(2,\) of integers, got \(3,\)"),
        ({"window": (-1, 0)}, r"window must be \(before, after\), each None or at least 0, got \(-1, 0\)"),
        ({"window": (1, 2, 3)}, r"got \(1, 2, 3\)"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(*draw(2, 3, 4, 5, 7), **options)
