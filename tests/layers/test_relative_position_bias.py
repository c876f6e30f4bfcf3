"""Relative position biases: their formulas pair by pair, T5 and Swin with the same tables, their limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import (
    GaussianAttention,
    MultiHeadAttention,
    RelativePositionBias,
    RelativePositionBias2d,
)
from torch.autograd import gradcheck, gradgradcheck

sizes, seeds = st.integers(0, 7), st.integers(0, 2**31)


def randomised(layer: torch.nn.Module) -> torch.nn.Module:
    torch.nn.init.normal_(layer.weight)
    return layer


@given(seed=seeds, queries=sizes, keys=sizes, max_distance=st.integers(0, 4), bidirectional=st.booleans())
def test_every_distance_has_a_row_up_to_the_greatest(seed, queries, keys, max_distance, bidirectional):
    torch.manual_seed(seed)
    layer = randomised(RelativePositionBias(3, max_distance=max_distance, bidirectional=bidirectional))
    bias = layer(queries, keys)
    assert bias.shape == (3, queries, keys)
    assert len(layer.weight) == (2 if bidirectional else 1) * max_distance + 1
    for i in range(queries):
        for j in range(keys):
            distance = j - (i + keys - queries)
            distance = max(-max_distance, min(max_distance, distance))
            row = distance + max_distance if bidirectional else max(-distance, 0)
            assert torch.equal(bias[:, i, j], layer.weight[row])


@given(
    distance=st.integers(-300, 300),
    exact=st.integers(1, 16),
    more=st.integers(1, 130),
    bidirectional=st.booleans(),
)
def test_buckets_are_exact_then_logarithmic(distance, exact, more, bidirectional):
    """By the formula in float64, up to where float32 rounds to the other side of a bucket's edge."""
    per_direction, max_distance = 2 * exact, exact + more
    layer = RelativePositionBias(
        1,
        num_buckets=per_direction * (2 if bidirectional else 1),
        max_distance=max_distance,
        bidirectional=bidirectional,
    )
    later = bidirectional and distance > 0
    size = abs(distance) if bidirectional else max(-distance, 0)
    found = layer._rows(torch.tensor([distance])).item() - later * per_direction
    if size < exact:
        assert found == size
    else:
        place = exact + math.log(size / exact) / math.log(max_distance / exact) * exact
        assert found in {min(int(place + e), per_direction - 1) for e in (-1e-4, 1e-4)}


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (12, 7), (64, 1000)])
def test_equals_t5(bidirectional, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(
        d_model=8,
        num_heads=3,
        d_kv=4,
        is_decoder=not bidirectional,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
    )
    theirs = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = RelativePositionBias(
        3, num_buckets=buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    length = 2 * max_distance + 5 if max_distance < 200 else 230
    expected, actual = theirs.compute_bias(length, length)[0], ours(length, length)
    assert torch.equal(actual, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, ours.weight, cotangent)[0],
        torch.autograd.grad(expected, theirs.relative_attention_bias.weight, cotangent)[0],
        rtol=1e-5,
        atol=1e-4,
    )
    step = theirs.compute_bias(1, length, past_seen_tokens=length - 1)[0]  # as a decoder with a cache
    assert torch.equal(ours(1, length), step)


def test_fewer_queries_are_the_last_rows():
    layer = randomised(RelativePositionBias(2, max_distance=3))
    assert torch.equal(layer(3, 8), layer(8, 8)[:, 5:])


def test_is_the_bias_of_an_attention_at_each_step():
    """What the causal attention of a whole sequence adds is what the last query alone is given."""
    attention, layer = MultiHeadAttention(8, 2).eval(), randomised(RelativePositionBias(2, num_buckets=8))
    tokens = torch.randn(3, 6, 8)
    whole = attention(tokens, bias=layer(6, 6), is_causal=True)
    last = attention(tokens[:, 5:], tokens, bias=layer(1, 6))
    torch.testing.assert_close(whole[:, 5:], last)
    assert not torch.allclose(whole, attention(tokens, is_causal=True))


@given(
    seed=seeds, rows=st.integers(1, 4), cols=st.integers(1, 4), most=st.tuples(st.just(4), st.integers(4, 5))
)
def test_every_offset_of_a_grid_has_a_row(seed, rows, cols, most):
    torch.manual_seed(seed)
    layer = randomised(RelativePositionBias2d(2, most))
    table = layer.weight.view(2 * most[0] - 1, 2 * most[1] - 1, 2)
    bias = layer((rows, cols))
    assert bias.shape == (2, rows * cols, rows * cols)
    for i in range(rows * cols):
        for j in range(rows * cols):
            r, c = i // cols - j // cols, i % cols - j % cols
            assert torch.equal(bias[:, i, j], table[r + most[0] - 1, c + most[1] - 1])
    if (rows, cols) == most:
        assert torch.equal(layer(), bias)


@pytest.mark.parametrize("grid", [(1, 3), (3, 1), (1, 1)])
def test_a_grid_may_be_a_line(grid):
    layer = RelativePositionBias2d(2, grid)
    places = grid[0] * grid[1]
    assert layer.weight.shape == (2 * places - 1, 2)
    apart = torch.arange(places) - torch.arange(places)[:, None]
    toeplitz = {int(d): layer()[0][apart == d].unique().numel() for d in apart.unique()}
    assert set(toeplitz.values()) == {1}


@pytest.mark.parametrize("window", [(3, 5), (7, 7)])
def test_equals_swin(window):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    theirs, ours = swin.SwinRelativePositionBias(2, window), RelativePositionBias2d(2, window)
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours.load_state_dict({"weight": theirs.relative_position_bias_table})
    expected, actual = theirs()[0], ours()
    assert torch.equal(actual, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, ours.weight, cotangent)[0],
        torch.autograd.grad(expected, theirs.relative_position_bias_table, cotangent)[0],
    )


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (RelativePositionBias(2, max_distance=2, dtype=torch.float64), (3, 5)),
        (RelativePositionBias(2, num_buckets=8, max_distance=6, dtype=torch.float64), (7, 5)),
        (RelativePositionBias2d(2, (2, 3), dtype=torch.float64), ((2, 2),)),
    ],
)
def test_derivatives(layer, sizes):
    def square(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, sizes).square()

    weight = torch.randn_like(layer.weight, requires_grad=True)
    assert gradcheck(square, weight)
    assert gradgradcheck(square, weight)


@pytest.mark.parametrize("layer", [RelativePositionBias(8), RelativePositionBias2d(8, (16, 16))])
def test_starts_truncated_normal(layer):
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():
        layer.weight.zero_()
    layer.reset_parameters()
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_distance": -1}, "max_distance must be at least 0, got -1"),
        ({"num_buckets": 7}, "num_buckets must be even and at least 4 with bidirectional=True, got 7"),
        ({"num_buckets": 2}, "num_buckets must be even and at least 4 with bidirectional=True, got 2"),
        (
            {"num_buckets": 1, "bidirectional": False},
            "num_buckets must be at least 2 with bidirectional=False, got 1",
        ),
        (
            {"num_buckets": 32, "max_distance": 8},
            "max_distance must exceed the 8 exact buckets of num_buckets=32, got 8",
        ),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RelativePositionBias(2, **options)


def test_repr_tells_sizes():
    assert repr(RelativePositionBias(2, num_buckets=8)) == (
        "RelativePositionBias(2, max_distance=128, num_buckets=8, bidirectional=True)"
    )
    assert repr(RelativePositionBias2d(2, (3, 5))) == "RelativePositionBias2d(2, (3, 5))"


def test_bad_grids_are_named():
    with pytest.raises(ValueError, match=r"grid must have at least one row and one column, got \(3, 0\)"):
        RelativePositionBias2d(2, (3, 0))
    layer = RelativePositionBias2d(2, (3, 5))
    for grid in (4, 5), (3, 6), (0, 2), (2, 0):
        with pytest.raises(ValueError, match=r"grid must be from \(1, 1\) to \(3, 5\), got"):
            layer(grid)


@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    buckets=st.sampled_from([None, 4, 8]),
    bidirectional=st.booleans(),
)
def test_the_table_of_distances_is_what_is_written_out(seed, queries, keys, buckets, bidirectional):
    torch.manual_seed(seed)
    layer = RelativePositionBias(3, max_distance=5, num_buckets=buckets, bidirectional=bidirectional)
    assert torch.equal(layer.score_bias(queries, keys).dense(queries, keys), layer(queries, keys))


@pytest.mark.parametrize("grid", [None, (2, 5), (3, 1), (1, 1)])
def test_the_table_of_offsets_is_what_is_written_out(grid):
    layer = RelativePositionBias2d(3, (3, 5))
    assert torch.equal(layer.score_bias(grid).dense(), layer(grid))


@pytest.mark.parametrize("kind", [MultiHeadAttention, GaussianAttention])
def test_attention_takes_the_table_as_its_bias(kind):
    relative, attention = RelativePositionBias(4, num_buckets=8), kind(16, num_heads=4)
    query, key = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    table, dense = relative.score_bias(5, 7), relative(5, 7)
    torch.testing.assert_close(attention(query, key, bias=table), attention(query, key, bias=dense))
    torch.testing.assert_close(
        attention.weights(query, key, bias=table), attention.weights(query, key, bias=dense)
    )
    with pytest.raises(ValueError, match=r"positions of \(Lq, Lk\) = \(5, 5\), got \(5, 7\)"):
        attention(query, bias=table)
