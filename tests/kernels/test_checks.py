"""Each check passes what fits, and names what does not."""

import pytest
import torch
from lamina.kernels.checks import check_bias, check_broadcast, check_dropout, check_key_mask, check_mask

SCORES = (2, 3, 5, 7)


@pytest.mark.parametrize("shape", [(), (7,), (5, 1), (3, 1, 7), (1, 3, 5, 7)])
def test_what_broadcasts_passes(shape):
    check_broadcast("bias", torch.ones(shape), SCORES)
    check_mask("mask", torch.ones(shape).bool(), SCORES)
    check_bias(torch.ones(shape), SCORES)


def test_nothing_passes():
    check_mask("mask", None, SCORES)
    check_key_mask(None, (2, 7))
    check_bias(None, SCORES)


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 5, 7), (1, 2, 3, 5, 7)])
def test_what_does_not_broadcast_is_named(shape):
    with pytest.raises(ValueError, match=r"mask must broadcast to \(2, 3, 5, 7\), got \("):
        check_mask("mask", torch.ones(shape).bool(), SCORES)
    with pytest.raises(ValueError, match=r"bias must broadcast to \(2, 3, 5, 7\), got \("):
        check_bias(torch.ones(shape), SCORES)


def test_dtypes_are_not_confused():
    with pytest.raises(ValueError, match=r"mask must be boolean.*got torch.float32; .* is `bias`"):
        check_mask("mask", torch.ones(7), SCORES)
    for bias in torch.ones(7).bool(), torch.ones(7).long():
        with pytest.raises(ValueError, match=f"bias must be a float.*got {bias.dtype}; a bool is `mask`"):
            check_bias(bias, SCORES)


@pytest.mark.parametrize("shape", [(2, 7), (1, 7)])
def test_a_key_mask_is_a_matrix(shape):
    check_key_mask(torch.ones(shape).bool(), (2, 7))


def test_a_key_mask_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"key_mask must be \(B, N\) = \(2, 7\), got \(7,\)"):
        check_key_mask(torch.ones(7).bool(), (2, 7), "(B, N)")
    with pytest.raises(ValueError, match=r"key_mask must broadcast to \(2, 7\), got \(2, 5\)"):
        check_key_mask(torch.ones(2, 5).bool(), (2, 7))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_probability_is_named(dropout):
    check_dropout(0.0)
    check_dropout(0.9)
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {dropout}"):
        check_dropout(dropout)
