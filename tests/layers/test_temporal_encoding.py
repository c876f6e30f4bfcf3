"""Temporal encoding: ages from the end, empty slots, and the noise of random gaps."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import TemporalEncoding, mask_from_lengths, temporal_noise_ages
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

seeds, sizes = st.integers(0, 2**31), st.integers(1, 7)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@given(seed=seeds, slots=sizes, more=st.integers(0, 3))
def test_the_last_memory_has_age_one(seed, slots, more):
    torch.manual_seed(seed)
    encoding, memories = TemporalEncoding(slots + more, 5, dtype=torch.float64), x(2, slots, 5)
    expected = memories.clone()
    for i in range(slots):
        expected[:, i] += encoding.weight[slots - i - 1].detach()  # age slots - i stands in row age - 1
    torch.testing.assert_close(encoding(memories), expected)
    ages = torch.arange(slots, 0, -1).expand(2, -1)
    torch.testing.assert_close(encoding(memories, ages=ages), expected)


@given(seed=seeds, slots=sizes)
def test_empty_slots_have_no_age_wherever_they_are(seed, slots):
    torch.manual_seed(seed)
    encoding, memories, mask = (
        TemporalEncoding(slots, 5, dtype=torch.float64),
        x(3, slots, 5),
        torch.rand(3, slots),
    )
    mask = mask < 0.6
    out = encoding(memories, key_mask=mask)
    for row, held, encoded in zip(memories, mask, out, strict=True):
        torch.testing.assert_close(encoded[held], encoding(row[held][None])[0])
        assert torch.equal(encoded[~held], row[~held])


def test_ages_choose_the_rows_and_zero_none():
    encoding = TemporalEncoding(7, 5, dtype=torch.float64)
    memories, ages = x(2, 3, 5), torch.tensor([[7, 0, 1], [2, 2, 5]])
    added = encoding(memories, ages=ages) - memories
    rows = torch.cat([torch.zeros(1, 5), encoding.weight.detach()])
    torch.testing.assert_close(added, rows[ages])
    assert encoding.rows().equal(rows.double())


def test_gradients():
    encoding, memories = TemporalEncoding(5, 3, dtype=torch.float64), x(2, 4, 3).requires_grad_()
    ages = torch.tensor([[4, 0, 2, 2], [5, 4, 3, 1]])

    def of(memories, weight):
        return torch.func.functional_call(encoding, {"weight": weight}, memories, {"ages": ages})

    assert gradcheck(of, (memories, encoding.weight))
    assert gradgradcheck(of, (memories, encoding.weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_near(dtype):
    encoding, memories = TemporalEncoding(5, 6), torch.randn(2, 4, 6)
    low = TemporalEncoding(5, 6, dtype=dtype)
    low.load_state_dict(encoding.state_dict())
    torch.testing.assert_close(low(memories.to(dtype)).float(), encoding(memories), rtol=0.02, atol=0.02)


def test_no_memories_at_all():
    assert TemporalEncoding(5, 6)(torch.randn(2, 0, 6)).shape == (2, 0, 6)
    assert temporal_noise_ages(torch.ones(2, 0).bool(), 5).shape == (2, 0)


def test_starts_normal():
    assert TemporalEncoding(500, 40).weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert TemporalEncoding(500, 40, std=0.7).weight.std().item() == pytest.approx(0.7, rel=0.05)
    assert TemporalEncoding(500, 40).weight.mean().abs().item() < 0.005


def test_repr_tells_sizes():
    assert repr(TemporalEncoding(500, 40)) == "TemporalEncoding(500, 40, std=0.1)"


@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    noise=st.floats(0, 1),
    limit=st.integers(1, 90),
)
def test_noise_leaves_gaps_between_ages_in_order(seed, lengths, noise, limit):
    mask = mask_from_lengths(torch.tensor(lengths), 41).flip(-1)
    ages = temporal_noise_ages(mask, limit, noise=noise, generator=torch.Generator().manual_seed(seed))
    assert ages.dtype is torch.int64
    assert (ages[~mask] == 0).all()
    for row, held, length in zip(ages, mask, lengths, strict=True):
        own = row[held].tolist()
        assert own == sorted(own, reverse=True)
        below = [age for age in own if age < limit]
        assert len(set(below)) == len(below)
        assert all(1 <= age <= min(limit, length + math.ceil(noise * length)) for age in own)


def test_noise_draws_every_number_of_gaps_and_every_subset_alike():
    """10 memories and 0.1 of noise: one gap in half of the draws, at each of eleven places alike."""
    mask = torch.ones(22_000, 10).bool()
    ages = temporal_noise_ages(mask, 99, generator=torch.Generator().manual_seed(0))
    missing = Counter((66 - ages.sum(1)).tolist())  # 1 + ... + 11 = 66: the age that is left out
    assert set(missing) == set(range(1, 12))
    assert missing[11] == pytest.approx(22_000 * (1 / 2 + 1 / 22), rel=0.05)
    assert all(missing[age] == pytest.approx(1000, rel=0.15) for age in range(1, 11))
    most = temporal_noise_ages(mask[:2000], 99, noise=0.3, generator=torch.Generator().manual_seed(0)).max()
    assert most == 13


@pytest.mark.parametrize(
    ("length", "noise", "most"),
    [(1, 0.1, 2), (10, 0.1, 11), (11, 0.1, 13), (30, 0.1, 33), (50, 0.1, 55), (50, 0.3, 65), (7, 0.0, 7)],
)
def test_the_most_gaps_are_a_part_rounded_up(length, noise, most):
    """50 * 0.3 is above 15 in float32, and its ceiling must not be 16."""
    mask, generator = torch.ones(5000, length).bool(), torch.Generator().manual_seed(0)
    assert temporal_noise_ages(mask, 99, noise=noise, generator=generator).max() == most


def test_without_noise_ages_are_those_of_the_layer():
    encoding, memories = TemporalEncoding(9, 5), torch.randn(2, 4, 5)
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    ages = temporal_noise_ages(mask, 9, noise=0.0)
    assert ages.tolist() == [[3, 2, 0, 1], [0, 2, 1, 0]]
    torch.testing.assert_close(encoding(memories, ages=ages), encoding(memories, key_mask=mask))


def test_noise_is_the_generator_s():
    mask = torch.ones(50, 20).bool()
    state = torch.get_rng_state()
    first, again = (
        temporal_noise_ages(mask, 99, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, temporal_noise_ages(mask, 99, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TemporalEncoding(5, 6)(x(2, 3, 7)), r"memories must be \(B, M, 6\), got \(2, 3, 7\)"),
        (lambda: TemporalEncoding(5, 6)(x(3, 6)), r"memories must be \(B, M, 6\), got \(3, 6\)"),
        (lambda: TemporalEncoding(2, 6)(x(2, 3, 6)), "memories must be at most max_memories=2, got 3"),
        (
            lambda: TemporalEncoding(2, 6)(x(2, 3, 6), key_mask=torch.ones(2, 3).bool()),
            "memories must be at most max_memories=2, got 3",
        ),
        (
            lambda: TemporalEncoding(5, 6)(x(2, 3, 6), ages=torch.ones(2, 3)),
            r"ages must be \(2, 3\) of integers, got \(2, 3\) of torch.float32",
        ),
        (
            lambda: TemporalEncoding(5, 6)(x(2, 3, 6), ages=torch.ones(2, 2).long()),
            r"ages must be \(2, 3\) of integers, got \(2, 2\)",
        ),
        (lambda: TemporalEncoding(5, 6)(x(2, 3, 6), key_mask=torch.ones(2, 3)), "key_mask must be boolean"),
        (
            lambda: TemporalEncoding(5, 6)(x(2, 3, 6), key_mask=torch.ones(3, 3).bool()),
            r"key_mask must broadcast to \(2, 3\), got \(3, 3\)",
        ),
        (lambda: temporal_noise_ages(torch.ones(2, 3), 5), r"key_mask must be a boolean \(B, M\), got"),
        (lambda: temporal_noise_ages(torch.ones(3).bool(), 5), r"key_mask must be a boolean \(B, M\), got"),
        (
            lambda: temporal_noise_ages(torch.ones(2, 3).bool(), 5, noise=-0.1),
            "noise must be at least 0, got -0.1",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
