"""Angular hashing: its definition, and what a hash of directions keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import lsh_buckets

seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_buckets", [2, 10, (4, 6), (2, 2, 6), (1, 6)], ids=str)
def test_is_the_formula(num_buckets, shared):
    factors = [num_buckets] if isinstance(num_buckets, int) else num_buckets
    x = torch.randn(2, 3, 11, 5, dtype=torch.float64)
    rotations = torch.randn(1 if shared else 3, 5, 7, sum(n // 2 for n in factors), dtype=torch.float64)
    buckets = lsh_buckets(x, rotations, num_buckets=num_buckets)
    turned = np.einsum("bhld,hdrm->bhrlm", x, rotations.expand(3, -1, -1, -1))
    expected, stride, at = 0, 1, 0
    for n in factors:
        part = turned[..., at : at + n // 2]
        if n > 1:
            expected = expected + stride * np.concatenate([part, -part], -1).argmax(-1)
        stride, at = stride * n, at + n // 2
    assert buckets.dtype == torch.int64
    assert np.array_equal(buckets, expected)


@given(seed=seeds, factor=st.floats(1e-3, 1e3))
def test_only_the_direction_counts_and_the_opposite_is_half_a_turn_away(seed, factor):
    torch.manual_seed(seed)
    x, rotations = torch.randn(2, 3, 11, 5).double(), torch.randn(3, 5, 7, 4)
    buckets = lsh_buckets(x, rotations, num_buckets=8)
    assert torch.equal(lsh_buckets(factor * x, rotations, num_buckets=8), buckets)
    assert torch.equal(lsh_buckets(-x, rotations, num_buckets=8), (buckets + 4) % 8)


def test_near_directions_meet_more_often_than_far_ones():
    x, noise = torch.randn(1, 1, 2000, 16), torch.randn(1, 1, 2000, 16)
    rotations = torch.randn(1, 16, 8, 8)
    buckets = lsh_buckets(x, rotations, num_buckets=16)

    def meetings(of):
        return (lsh_buckets(of, rotations, num_buckets=16) == buckets).float().mean()

    near, further, random = meetings(x + 0.1 * noise), meetings(x + noise), meetings(noise)
    assert near > 0.85 > 0.6 > further > 2 * random
    assert random == pytest.approx(1 / 16, abs=0.02)


def test_one_bucket_needs_no_rotation():
    assert (lsh_buckets(torch.randn(2, 3, 11, 5), torch.zeros(3, 5, 4, 0), num_buckets=1) == 0).all()


def test_hashes_in_float32_whatever_the_precision_around_it():
    x, rotations = torch.randn(2, 3, 211, 16), torch.randn(3, 16, 4, 8)
    expected = lsh_buckets(x, rotations, num_buckets=16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lsh_buckets(x, rotations, num_buckets=16), expected)
    half = x.bfloat16()
    assert torch.equal(
        lsh_buckets(half, rotations, num_buckets=16), lsh_buckets(half.float(), rotations, num_buckets=16)
    )


def test_takes_no_gradient():
    assert not lsh_buckets(
        torch.randn(1, 1, 3, 5, requires_grad=True), torch.randn(1, 5, 2, 2), num_buckets=4
    ).requires_grad


@pytest.mark.parametrize(
    ("rotations", "num_buckets", "message"),
    [
        ((3, 5, 4, 3), 7, "num_buckets must be even, or 1, got 7"),
        ((3, 5, 4, 3), (4, 3), r"num_buckets must be even, or 1, got \(4, 3\)"),
        ((3, 5, 4, 3), 0, "got 0"),
        ((3, 5, 4, 3), 8, r"rotations must be \(3, 5, R, 4\) for 8 buckets, got \(3, 5, 4, 3\)"),
        ((2, 5, 4, 4), 8, r"got \(2, 5, 4, 4\)"),
        ((3, 4, 4, 4), 8, r"got \(3, 4, 4, 4\)"),
    ],
)
def test_bad_input_is_named(rotations, num_buckets, message):
    with pytest.raises(ValueError, match=message):
        lsh_buckets(torch.zeros(2, 3, 11, 5), torch.zeros(rotations), num_buckets=num_buckets)
