"""Stochastic depth drops whole samples, and keeps the mean."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import DropPath, Packing

seeds, probabilities = st.integers(0, 2**31), st.floats(0, 1)


@given(seed=seeds, probability=probabilities)
def test_a_sample_is_dropped_or_scaled_whole(seed, probability):
    torch.manual_seed(seed)
    x = torch.randn(13, 3, 5, dtype=torch.float64)
    for sample, y in zip(x, DropPath(probability)(x), strict=True):
        assert torch.equal(y, torch.zeros_like(y)) or torch.allclose(y * (1 - probability), sample)


@given(seed=seeds, probability=probabilities)
def test_a_packed_sequence_is_dropped_or_scaled_whole(seed, probability):
    torch.manual_seed(seed)
    lengths = [3, 0, 1, 4, 2]
    x = torch.randn(10, 5, dtype=torch.float64)
    packing = Packing(torch.tensor([0, *lengths]).cumsum(0), 4)
    y = DropPath(probability)(x, packing=packing)
    for sample, of in zip(y.split(lengths), x.split(lengths), strict=True):
        assert torch.equal(sample, torch.zeros_like(of)) or torch.allclose(sample * (1 - probability), of)


@given(seed=seeds, probability=st.floats(0, 0.9))
def test_the_mean_is_kept(seed, probability):
    torch.manual_seed(seed)
    y = DropPath(probability)(torch.ones(20_000, 1))
    deviation = (probability / (1 - probability) / 20_000) ** 0.5
    ten_drops = 10 / 20_000  # where drops are rare their count is far from normal
    assert y.mean().item() == pytest.approx(1, abs=6 * deviation + ten_drops)


def test_the_share_that_is_dropped_is_the_probability():
    assert (DropPath(0.2)(torch.ones(20_000)) == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_evaluation_and_probability_zero_are_the_identity():
    x = torch.randn(2, 3)
    assert DropPath(0.7).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_probability_one_is_zero_with_zero_gradient():
    x = torch.randn(7, 3, requires_grad=True)
    y = DropPath(1.0)(x)
    assert torch.equal(y, torch.zeros(7, 3))
    (gradient,) = torch.autograd.grad(y, x, torch.randn(7, 3))
    assert torch.equal(gradient, torch.zeros(7, 3))


def test_the_gradient_is_that_of_the_same_draw():
    x, cotangent = torch.randn(50, 3, requires_grad=True), torch.randn(50, 3)
    y = DropPath(0.4)(x)
    (gradient,) = torch.autograd.grad(y, x, cotangent)
    torch.testing.assert_close(gradient, torch.where(y == 0, 0.0, cotangent / 0.6))


def test_a_dropped_branch_that_overflowed_is_zero():
    y = DropPath(0.5)(torch.full((64, 2), torch.inf))
    assert (y == 0).any()
    assert not y.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_precision_stays(dtype):
    assert DropPath(0.5)(torch.randn(4, 3, 2, 5, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(probability):
    with pytest.raises(
        ValueError, match=f"probability must be between 0 and 1, got probability={probability}"
    ):
        DropPath(probability)


def test_repr_tells_its_probability():
    assert repr(DropPath(0.1)) == "DropPath(0.1)"
