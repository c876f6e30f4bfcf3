"""What BERT is trained with: masked tokens in the paper's shares, and its optimiser."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.recipes.bert_adam import BertAdam
from lamina.recipes.masking import IGNORED, MaskTokens
from torch import nn

SPECIAL = (0, 1, 2)


def texts(batch: int, length: int, vocab_size: int = 50) -> torch.Tensor:
    """Between a start and an end token, padded."""
    ids = torch.randint(5, vocab_size, (batch, length))
    for row, words in enumerate(torch.randint(0, length - 1, (batch,)).tolist()):
        ids[row, 0], ids[row, words + 1] = 1, 2
        ids[row, words + 2 :] = 0
    return ids


@given(seed=st.integers(0, 2**31), rate=st.sampled_from([0.15, 0.5, 1.0]), most=st.sampled_from([None, 3]))
def test_each_sequence_has_its_share_and_no_special_token(seed, rate, most):
    torch.manual_seed(seed)
    ids = texts(4, 23)
    masked = MaskTokens(50, 3, special_ids=SPECIAL, rate=rate, most=most)(ids)
    for row in range(4):
        chosen = masked.labels[row] != IGNORED
        words = int((ids[row] >= 5).sum())
        wanted = min(max(1, round(rate * words)), words)
        assert int(chosen.sum()) == (wanted if most is None else min(wanted, most))
        places = masked.places[row][chosen]
        assert len(set(places.tolist())) == len(places)
        assert places.tolist() == sorted(places.tolist())
        assert torch.equal(masked.labels[row][chosen], ids[row, places])
        assert (ids[row, places] >= 5).all()
        rest = torch.ones(23, dtype=torch.bool)
        rest[places] = False
        assert torch.equal(masked.ids[row, rest], ids[row, rest])
        assert chosen.tolist() == sorted(chosen.tolist(), reverse=True)


def test_masks_random_tokens_and_what_stays_have_the_paper_s_shares():
    torch.manual_seed(0)
    ids = torch.full((200, 200), 7)
    masked = MaskTokens(1000, 3, rate=0.15)(ids)
    found = masked.ids.gather(1, masked.places)
    assert masked.places.shape == (200, 30)
    assert (found == 3).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (found == 7).float().mean().item() == pytest.approx(0.1, abs=0.015)
    others = found[(found != 3) & (found != 7)]
    assert len(others) / found.numel() == pytest.approx(0.1, abs=0.015)
    assert others.float().mean().item() == pytest.approx(500, abs=40)  # of the whole vocabulary
    assert masked.places.float().mean().item() == pytest.approx(99.5, abs=3)  # of all places alike


def test_left_to_the_generator():
    ids = texts(3, 40)
    drawn = [
        MaskTokens(50, 3, special_ids=SPECIAL, generator=torch.Generator().manual_seed(5))(ids)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_nothing_to_mask():
    masked = MaskTokens(50, 3, special_ids=SPECIAL)(torch.tensor([[1, 2, 0]]))
    assert masked.places.shape == (1, 0)
    assert torch.equal(masked.ids, torch.tensor([[1, 2, 0]]))
    assert MaskTokens(50, 3)(torch.zeros(0, 5, dtype=torch.long)).places.shape == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_id": 50}, "mask_id must be from 0 to 49, got 50"),
        ({"mask_id": 3, "rate": 0.0}, "rate must be above 0 and at most 1, got 0.0"),
        ({"mask_id": 3, "shares": (0.8, 0.3)}, r"shares must not be negative, and at most 1 together"),
    ],
)
def test_bad_masks_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskTokens(50, **options)


@given(seed=st.integers(0, 2**31), decay=st.sampled_from([0.0, 0.01, 0.5]))
def test_the_optimiser_is_the_authors_formula(seed, decay):
    torch.manual_seed(seed)
    start, gradients = torch.randn(3, 5, dtype=torch.float64), torch.randn(6, 3, 5, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = BertAdam([weight], lr=0.1, weight_decay=decay)
    wanted, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        wanted = wanted - 0.1 * (m / (v.sqrt() + 1e-6) + decay * wanted)
    torch.testing.assert_close(weight.detach(), wanted)


def test_it_goes_on_from_its_state():
    def trained(steps, state=None, weight=None):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.ones(3)) if weight is None else weight
        optimizer = BertAdam([weight], lr=0.1)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            weight.grad = torch.full((3,), float(step))
            optimizer.step()
        return weight, optimizer.state_dict()

    whole, _ = trained(range(6))
    half, state = trained(range(3))
    resumed, _ = trained(range(3, 6), state, half)
    assert torch.equal(resumed, whole)


def test_what_has_no_gradient_stays_and_a_closure_is_called():
    still, moved = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = BertAdam([still, moved], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (moved**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert torch.equal(still, torch.ones(2))
    assert (moved < 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "must not be negative, got -1.0"), ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\)")],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BertAdam([nn.Parameter(torch.ones(1))], **options)
