"""Angular hashing: its definition, and what a hash of directions keeps."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import explain, lsh_buckets, use_backend

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


@pytest.mark.parametrize("numbers", [1, 2 * 3 * 7 * 9 * 4, 2**19])
def test_a_few_tokens_at_a_time_are_all_of_them(numbers, monkeypatch):
    x, rotations = torch.randn(2, 3, 11, 5).double(), torch.randn(3, 5, 7, 9).double()
    expected = lsh_buckets(x, rotations, num_buckets=18)
    monkeypatch.setattr(sys.modules["lamina.kernels.lsh_buckets"], "TURNED", numbers)
    assert torch.equal(lsh_buckets(x, rotations, num_buckets=18), expected)


def test_of_equal_ones_the_first_and_always_a_bucket():
    x, column = torch.randn(1, 1, 50, 5).double(), torch.randn(1, 5, 1, 1).double()
    x[:, :, 7] = 0
    rotations = torch.cat([column, -column, column, 0 * column], -1)
    turned = (x[0, 0] @ rotations[0, :, 0]).numpy()
    expected = np.concatenate([turned, -turned], -1).argmax(-1)
    assert np.array_equal(lsh_buckets(x, rotations, num_buckets=8)[0, 0, 0], expected)
    assert set(expected) == {0, 1}
    x[:, :, 3] = torch.nan
    assert 0 <= lsh_buckets(x, rotations, num_buckets=8)[0, 0, 0, 3] < 8


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


# --- the kernel


def nearest_by_error(x, rotations, num_buckets, buckets) -> float:
    """By how much at the most the chosen direction misses the nearest, relative to the longest product."""
    factors = [num_buckets] if isinstance(num_buckets, int) else num_buckets
    turned = torch.einsum("bhld,hdrm->bhrlm", x.double(), rotations.double().expand(x.shape[1], -1, -1, -1))
    worst, stride, at = 0.0, 1, 0
    for n in factors:
        part = turned[..., at : at + n // 2]
        if n > 1:
            both = torch.cat([part, -part], -1)
            chosen = both.gather(-1, (buckets // stride % n).unsqueeze(-1)).squeeze(-1)
            worst = max(worst, ((both.amax(-1) - chosen) / both.abs().amax()).max().item())
        stride, at = stride * n, at + n // 2
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "num_buckets", "shared"),
    [
        ((2, 3, 37, 24, 2), 10, False),
        ((1, 2, 70, 64, 3), 140, True),
        ((1, 1, 1, 5, 1), (4, 6), False),
        ((1, 1, 33, 16, 2), (2, 1, 130), False),
        ((1, 1, 20, 200, 1), 70, False),
        ((1, 1, 9, 8, 2), 1, False),
        ((0, 2, 9, 8, 2), 4, False),
        ((2, 2, 0, 8, 2), 4, False),
    ],
    ids=str,
)
def test_kernel_finds_the_nearest_direction(sizes, num_buckets, shared, dtype, kernels_device):
    batch, heads, length, dim, rounds = sizes
    columns = sum(n // 2 for n in ([num_buckets] if isinstance(num_buckets, int) else num_buckets))
    x = torch.randn(batch, heads, length, dim, dtype=dtype)
    rotations = torch.randn(1 if shared else heads, dim, rounds, columns)
    with use_backend("triton"):
        assert explain(lsh_buckets, x, rotations, num_buckets=num_buckets).chosen == "triton"
        buckets = lsh_buckets(x, rotations, num_buckets=num_buckets)
    assert buckets.dtype is torch.int64
    assert buckets.shape == (batch, heads, rounds, length)
    if buckets.numel():
        assert nearest_by_error(x, rotations, num_buckets, buckets) < (
            1e-13 if dtype is torch.float64 else 1e-6
        )
        product = num_buckets if isinstance(num_buckets, int) else np.prod(num_buckets)
        assert 0 <= buckets.min() <= buckets.max() < product


@given(seed=seeds)
def test_kernel_takes_the_first_of_equals(kernels_device, seed):
    """Rotations of few values, so that sums are exact and ties are many; a zero is equal to all."""
    torch.manual_seed(seed)
    x, rotations = torch.randint(-1, 2, (1, 1, 40, 3)).float(), torch.randint(-1, 2, (1, 3, 1, 70)).float()
    turned = torch.einsum("bhld,hdrm->bhrlm", x, rotations)
    with use_backend("triton"):
        buckets = lsh_buckets(x, rotations, num_buckets=140)
    expected = torch.cat([turned, -turned], -1).cpu().numpy().argmax(-1)
    assert np.array_equal(buckets.cpu(), expected)


def test_kernel_takes_any_stride(kernels_device):
    x, rotations = torch.randn(2, 21, 3, 16), torch.randn(16, 2, 3, 4)
    given = x.transpose(1, 2), rotations.permute(2, 0, 1, 3)
    with use_backend("triton"):
        expected = lsh_buckets(*(t.contiguous() for t in given), num_buckets=8)
        assert torch.equal(lsh_buckets(*given, num_buckets=8), expected)
        assert torch.equal(
            lsh_buckets(x.mT.contiguous().mT.transpose(1, 2), given[1], num_buckets=8), expected
        )
        sliced = torch.randn(3, 16, 2, 8)[..., ::2]
        assert torch.equal(
            lsh_buckets(given[0], sliced, num_buckets=8), lsh_buckets(given[0], sliced.clone(), num_buckets=8)
        )


def test_kernel_is_registered_and_compiles_whole(kernels_device):
    from lamina.kernels.fused.lsh_buckets import lsh_buckets as fused

    x, rotations = torch.randn(1, 2, 21, 16), torch.randn(2, 16, 3, 5)
    torch.library.opcheck(fused, [x, rotations, [4, 6]])
    with use_backend("triton"):
        for dynamic in False, True:
            compiled = torch.compile(
                lambda x: lsh_buckets(x, rotations, num_buckets=(4, 6)),
                fullgraph=True, dynamic=dynamic, backend="aot_eager",
            )  # fmt: skip
            given = x.clone().requires_grad_()
            assert torch.equal(compiled(given), lsh_buckets(x, rotations, num_buckets=(4, 6)))
            with torch.autocast(kernels_device, torch.bfloat16):
                assert torch.equal(lsh_buckets(given, rotations, num_buckets=(4, 6)), compiled(given))


def test_explain_says_why():
    with use_backend("triton"):
        found = explain(lsh_buckets, torch.empty(1, 1, 2, 300), torch.empty(1, 300, 1, 1), num_buckets=2)
        assert "at most 256 wide" in found.refusals["triton"]
        found = explain(lsh_buckets, torch.empty(1, 1, 2, 3).int(), torch.empty(1, 3, 1, 1), num_buckets=2)
        assert "has no torch.int32" in found.refusals["triton"]


@pytest.mark.parametrize(
    "kinds",
    [("bfloat16-64", "float32-64"), pytest.param(("float16-128", "bfloat16-256"), marks=pytest.mark.slow)],
    ids=str,
)
def test_kernel_compiles_for_hopper(for_sm90, kinds):
    for kernel in for_sm90("lsh_attention.py", *(f"{kind}-buckets" for kind in kinds)):
        assert kernel["kernel"] == "buckets_kernel"
        assert kernel["atomics"] == 0
        assert kernel["tensor_cores"] > 0
