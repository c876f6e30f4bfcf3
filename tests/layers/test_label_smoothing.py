"""Smoothed cross entropy as a sum over the vocabulary, and PyTorch's where that is the same."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import LabelSmoothingLoss
from torch.autograd import gradcheck, gradgradcheck

seeds = st.integers(0, 2**31)
rates = st.sampled_from([0.0, 0.1, 0.7])


@given(seed=seeds, smoothing=rates, padding_id=st.sampled_from([None, 0, 4]))
def test_is_the_divergence_from_the_smoothed_target(seed, smoothing, padding_id):
    torch.manual_seed(seed)
    logits, targets = 3 * torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (3, 5))
    losses = LabelSmoothingLoss(smoothing, padding_id=padding_id, reduction="none")(logits, targets)
    assert losses.shape == targets.shape
    log_p = logits.log_softmax(-1)
    for b in range(3):
        for t in range(5):
            y = int(targets[b, t])
            if y == padding_id:
                assert losses[b, t] == 0
                continue
            tokens = [v for v in range(7) if v != padding_id]
            expected = sum(
                -((1 - smoothing) * (v == y) + smoothing / len(tokens)) * log_p[b, t, v] for v in tokens
            )
            torch.testing.assert_close(losses[b, t], expected)


@given(seed=seeds, smoothing=rates, reduction=st.sampled_from(["mean", "sum", "none"]))
def test_without_padding_it_is_pytorch_s(seed, smoothing, reduction):
    torch.manual_seed(seed)
    logits, targets = torch.randn(11, 7, dtype=torch.float64, requires_grad=True), torch.randint(7, (11,))
    actual = LabelSmoothingLoss(smoothing, reduction=reduction)(logits, targets)
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, logits, cotangent), torch.autograd.grad(expected, logits, cotangent)
    )


def test_the_mean_is_over_what_is_not_padding():
    logits, targets = torch.randn(2, 5, 7), torch.tensor([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0]])
    losses = LabelSmoothingLoss(0.1, padding_id=0, reduction="none")(logits, targets)
    torch.testing.assert_close(LabelSmoothingLoss(0.1, padding_id=0)(logits, targets), losses.sum() / 6)
    torch.testing.assert_close(
        LabelSmoothingLoss(0.1, padding_id=0, reduction="sum")(logits, targets), losses.sum()
    )


def test_nothing_but_padding_is_no_loss_and_no_gradient():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss = LabelSmoothingLoss(0.1, padding_id=5)(logits, torch.full((2, 3), 5))
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient == 0).all()


def test_mass_on_padding_costs_and_gets_nothing():
    """Its logit's gradient is its probability: the target has no part of it."""
    logits, targets = torch.randn(1, 7, dtype=torch.float64, requires_grad=True), torch.tensor([2])
    loss = LabelSmoothingLoss(0.3, padding_id=0)(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient[0, 0], logits.softmax(-1)[0, 0].detach())


def test_gradients():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 0, 6, 3, 0])
    loss = LabelSmoothingLoss(0.1, padding_id=0)
    assert gradcheck(lambda logits: loss(logits, targets), (logits,))
    assert gradgradcheck(lambda logits: loss(logits, targets), (logits,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    logits, targets = torch.randn(64, 5000, dtype=dtype), torch.randint(5000, (64,))
    loss = LabelSmoothingLoss(0.1)(logits, targets)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, LabelSmoothingLoss(0.1)(logits.float(), targets))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelSmoothingLoss(1.0), r"smoothing must be in \[0, 1\), got 1.0"),
        (lambda: LabelSmoothingLoss(-0.1), r"smoothing must be in \[0, 1\), got -0.1"),
        (lambda: LabelSmoothingLoss(reduction="max"), "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        (lambda: LabelSmoothingLoss()(torch.zeros(2, 3), torch.zeros(2)), "targets must be integers"),
        (
            lambda: LabelSmoothingLoss()(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
            r"targets must be \(2,\), got \(3,\) for logits \(2, 3\)",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
