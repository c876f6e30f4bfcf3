"""Pixel shuffle of tokens: where each channel goes, torch's own on the image, and TransGAN's stages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import PixelShuffleUpsample
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

small = st.integers(1, 4)


@given(batch=small, rows=small, cols=small, channels=small, factor=small)
def test_is_the_formula(batch, rows, cols, channels, factor):
    x = torch.arange(batch * rows * cols * channels * factor**2).view(batch, rows * cols, -1).double()
    y = PixelShuffleUpsample(factor)(x, (rows, cols))
    assert y.shape == (batch, rows * cols * factor**2, channels)
    for i in range(rows):
        for j in range(cols):
            for a in range(factor):
                for b in range(factor):
                    place = (factor * i + a) * factor * cols + factor * j + b
                    for c in range(channels):
                        source = x[:, i * cols + j, c * factor**2 + a * factor + b]
                        assert torch.equal(y[:, place, c], source)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_is_the_pixel_shuffle_of_torch_on_the_image(factor):
    image = torch.randn(2, 5 * factor**2, 3, 7, requires_grad=True)
    expected = nn.PixelShuffle(factor)(image)
    tokens = PixelShuffleUpsample(factor)(image.flatten(2).mT, (3, 7))
    assert torch.equal(tokens.mT.unflatten(2, (3 * factor, 7 * factor)), expected)
    cotangent = torch.randn_like(expected)
    by_tokens = torch.autograd.grad(tokens, image, cotangent.flatten(2).mT)[0]
    assert torch.equal(by_tokens, torch.autograd.grad(expected, image, cotangent)[0])
    assert torch.equal(nn.PixelUnshuffle(factor)(tokens.mT.unflatten(2, (3 * factor, -1))), image)


def test_transgans_stages():
    """z (B, 64, 1024) -> (B, 256, 256) -> (B, 1024, 64): by its own steps, from tokens to image and back."""
    x = torch.randn(2, 64, 1024)
    for side in (8, 16):
        image = nn.PixelShuffle(2)(x.permute(0, 2, 1).view(2, -1, side, side))
        expected = image.view(2, x.shape[2] // 4, -1).permute(0, 2, 1)
        x = PixelShuffleUpsample()(x)
        assert torch.equal(x, expected)
    assert x.shape == (2, 1024, 64)


def test_a_square_is_assumed_where_no_grid_is_given():
    x = torch.randn(2, 49, 8)
    assert torch.equal(PixelShuffleUpsample()(x), PixelShuffleUpsample()(x, (7, 7)))


def test_a_grid_is_rows_and_columns():
    x = torch.randn(2, 15, 8)
    assert not torch.equal(PixelShuffleUpsample()(x, (3, 5)), PixelShuffleUpsample()(x, (5, 3)))


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x[:, ::2]])
def test_any_layout_gives_a_contiguous_output(make):
    x = make(torch.randn(2, 18, 8))
    y = PixelShuffleUpsample()(x, (3, x.shape[1] // 3))
    assert y.is_contiguous()
    assert torch.equal(y, PixelShuffleUpsample()(x.contiguous(), (3, x.shape[1] // 3)))


def test_a_factor_of_one_is_the_identity():
    x = torch.randn(2, 15, 7)
    assert torch.equal(PixelShuffleUpsample(1)(x, (3, 5)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_any_dtype_is_moved_as_it_is(dtype):
    x = torch.randn(2, 15, 8).mul(100).to(dtype)
    assert torch.equal(
        PixelShuffleUpsample()(x, (3, 5)), PixelShuffleUpsample()(x.double(), (3, 5)).to(dtype)
    )


def test_no_tokens_and_no_batch():
    assert PixelShuffleUpsample()(torch.randn(2, 0, 8)).shape == (2, 0, 2)
    assert PixelShuffleUpsample()(torch.randn(0, 15, 8), (3, 5)).shape == (0, 60, 2)


def test_gradients():
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: PixelShuffleUpsample()(x, (2, 3)), x)
    assert gradgradcheck(lambda x: PixelShuffleUpsample()(x, (2, 3)).square(), x)


@pytest.mark.parametrize(
    ("shape", "grid", "match"),
    [
        ((2, 3, 4, 4), None, r"x must be \(B, N, C\), got \(2, 3, 4, 4\)"),
        ((2, 15, 8), None, "without a grid the number of tokens must be a square, got 15"),
        ((2, 15, 8), (3, 4), r"grid must hold the 15 tokens of x, got grid=\(3, 4\)"),
        ((2, 16, 6), None, "channels must be a multiple of factor² = 4, got 6"),
    ],
)
def test_wrong_inputs_are_named(shape, grid, match):
    with pytest.raises(ValueError, match=match):
        PixelShuffleUpsample()(torch.randn(shape), grid)


def test_a_wrong_factor_is_named():
    with pytest.raises(ValueError, match="factor must be at least 1, got factor=0"):
        PixelShuffleUpsample(0)


def test_repr_tells_the_factor():
    assert repr(PixelShuffleUpsample(3)) == "PixelShuffleUpsample(3)"
