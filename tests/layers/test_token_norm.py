"""Token norm: its formula, torch's instance norm on transposed tokens, and padding without influence."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import TokenNorm, mask_from_lengths
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

DOUBLE = {"dtype": torch.float64}
sizes, seeds = st.integers(1, 6), st.integers(0, 2**31)


def made(dim: int, **options) -> TokenNorm:
    norm = TokenNorm(dim, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def formula(norm: TokenNorm, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    batch, length, dim = x.shape
    y = np.zeros(x.shape)
    for b in range(batch):
        for c in range(dim):
            taking_part = [x[b, m, c].item() for m in range(length) if mask[b, m]]
            if not taking_part:
                continue
            mean = sum(taking_part) / len(taking_part)
            variance = sum((value - mean) ** 2 for value in taking_part) / len(taking_part)
            for m in range(length):
                if mask[b, m]:
                    y[b, m, c] = (x[b, m, c].item() - mean) / (variance + norm.eps) ** 0.5
                    if norm.weight is not None:
                        y[b, m, c] = y[b, m, c] * norm.weight[c].item() + norm.bias[c].item()
    return torch.from_numpy(y)


@given(seed=seeds, batch=sizes, length=st.integers(0, 7), dim=sizes, affine=st.booleans())
def test_is_the_formula(seed, batch, length, dim, affine):
    torch.manual_seed(seed)
    norm, x = made(dim, affine=affine, eps=1e-2, **DOUBLE), 3 + torch.randn(batch, length, dim, **DOUBLE)
    torch.testing.assert_close(norm(x), formula(norm, x, torch.ones(batch, length)))
    mask = torch.rand(batch, length) < 0.6
    torch.testing.assert_close(norm(x, key_mask=mask), formula(norm, x, mask))


@given(seed=seeds, batch=sizes, length=st.integers(2, 7), dim=sizes, affine=st.booleans())
def test_is_the_instance_norm_of_torch(seed, batch, length, dim, affine):
    torch.manual_seed(seed)
    ours, theirs = made(dim, affine=affine, **DOUBLE), nn.InstanceNorm1d(dim, affine=affine, **DOUBLE)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(batch, length, dim, **DOUBLE, requires_grad=True)
    cotangent = torch.randn_like(x)
    y, expected = ours(x), theirs(x.mT).mT
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, [x, *ours.parameters()], cotangent),
        torch.autograd.grad(expected, [x, *theirs.parameters()], cotangent),
    )


@given(seed=seeds, lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), affine=st.booleans())
def test_padding_has_no_influence(seed, lengths, affine):
    torch.manual_seed(seed)
    norm, mask = made(3, affine=affine, **DOUBLE), mask_from_lengths(torch.tensor(lengths), 5)
    x = torch.randn(len(lengths), 5, 3, **DOUBLE)
    spoiled = torch.where(mask.unsqueeze(-1), x, torch.nan).requires_grad_()
    cotangent = torch.where(mask.unsqueeze(-1), torch.randn_like(x), torch.nan)
    y = norm(spoiled, key_mask=mask)
    gradient, *others = torch.autograd.grad(y, [spoiled, *norm.parameters()], cotangent)
    assert (y[~mask] == 0).all()
    assert (gradient[~mask] == 0).all()
    assert all(g.isfinite().all() for g in others)
    for row, length in enumerate(lengths):
        alone = x[row : row + 1, :length].requires_grad_()
        expected = norm(alone)
        torch.testing.assert_close(y[row : row + 1, :length], expected)
        of_alone = torch.autograd.grad(expected, alone, cotangent[row : row + 1, :length])[0]
        torch.testing.assert_close(gradient[row : row + 1, :length], of_alone)


def test_the_order_of_tokens_does_not_matter():
    norm, x, order = made(3, affine=True), torch.randn(2, 7, 3), torch.randperm(7)
    torch.testing.assert_close(norm(x[:, order]), norm(x)[:, order])


def test_scale_and_shift_of_a_channel_do_not_matter():
    norm, x = made(3, eps=0.0, **DOUBLE), torch.randn(2, 7, 3, **DOUBLE)
    scale, shift = torch.rand(2, 1, 3, **DOUBLE) + 0.1, torch.randn(2, 1, 3, **DOUBLE)
    torch.testing.assert_close(norm(scale * x + shift), norm(x))


def test_one_token_is_its_own_mean():
    norm, x = made(3, affine=True), torch.randn(2, 1, 3)
    torch.testing.assert_close(norm(x), norm.bias.expand(2, 1, 3))
    assert TokenNorm(3)(x).abs().sum() == 0
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        nn.InstanceNorm1d(3)(x.mT)


def test_no_tokens_are_no_error():
    norm = made(3, affine=True)
    x = torch.randn(2, 0, 3, requires_grad=True)
    y = norm(x)
    assert y.shape == (2, 0, 3)
    assert torch.autograd.grad(y.sum(), norm.weight)[0].abs().sum() == 0


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked, affine):
    norm, x = made(2, affine=affine, **DOUBLE), torch.randn(3, 4, 2, **DOUBLE, requires_grad=True)
    mask = torch.tensor([[True] * 3 + [False], [True] * 4, [False] * 4]) if masked else None

    def call(x, *parameters):
        state = dict(zip(dict(norm.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(norm, state, (x,), {"key_mask": mask})

    inputs = x, *(p.detach().clone().requires_grad_() for p in norm.parameters())
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x[:, ::2]])
def test_any_layout(make):
    x = make(torch.randn(2, 8, 3)).requires_grad_()
    expected, cotangent = nn.InstanceNorm1d(3)(x.mT).mT, torch.randn(x.shape)
    torch.testing.assert_close(TokenNorm(3)(x), expected)
    torch.testing.assert_close(
        torch.autograd.grad(TokenNorm(3)(x), x, cotangent), torch.autograd.grad(expected, x, cotangent)
    )


def test_the_input_is_left_alone():
    x, mask = torch.randn(2, 7, 3), torch.rand(2, 7) < 0.5
    before = x.clone()
    TokenNorm(3)(x), TokenNorm(3)(x, key_mask=mask)
    assert torch.equal(x, before)


def test_keeps_one_output_for_the_backward_pass():
    kept = []
    x = torch.randn(2, 7, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        TokenNorm(3)(x)
    assert sorted(kept) == [2 * 3, 2 * 7 * 3]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, masked):
    """Squares of 300 overflow in float16, and sums of 64 lose digits in bfloat16."""
    norm, x = TokenNorm(3, affine=True, dtype=dtype), (300 * torch.randn(2, 64, 3)).to(dtype)
    exact = TokenNorm(3, affine=True, **DOUBLE)
    mask = torch.rand(2, 64) < 0.7 if masked else None
    y, expected = norm(x, key_mask=mask), exact(x.double(), key_mask=mask)
    assert y.dtype is dtype
    rounded_once = (expected.to(dtype).double() - expected).abs().max()
    assert (y.double() - expected).abs().max() <= 2 * rounded_once


def test_autocast_does_not_lower_the_precision():
    norm, x = made(3, affine=True), torch.randn(2, 7, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    torch.testing.assert_close(y, norm(x))


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 4), (2, 3, 5, 3)])
def test_wrong_tokens_are_named(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, L, 3\), got"):
        TokenNorm(3)(torch.randn(shape))


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.ones(2, 5), "key_mask must be boolean"),
        (torch.ones(2, 4, dtype=torch.bool), r"key_mask must be \(B, L\) = \(2, 5\), got \(2, 4\)"),
        (torch.ones(5, dtype=torch.bool), r"key_mask must be \(B, L\) = \(2, 5\), got \(5,\)"),
    ],
)
def test_wrong_masks_are_named(mask, match):
    with pytest.raises(ValueError, match=match):
        TokenNorm(3)(torch.randn(2, 5, 3), key_mask=mask)


def test_starts_without_an_affine_part_or_with_the_identity():
    assert not TokenNorm(3).state_dict()
    state = TokenNorm(3, affine=True).state_dict()
    torch.testing.assert_close(dict(state), {"weight": torch.ones(3), "bias": torch.zeros(3)})


def test_repr_tells_sizes():
    assert repr(TokenNorm(3)) == "TokenNorm(3, affine=False, eps=1e-05)"
