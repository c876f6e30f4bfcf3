"""Patch embedding is a convolution, however it runs, and cuts an image of any size."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import PatchEmbedding
from torch import nn
from torch.autograd import gradcheck

seeds, small, images = st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 13)


@given(seed=seeds, height=images, width=images, patch=st.tuples(small, small), stride=st.tuples(small, small))
def test_equals_the_convolution_with_its_gradients(seed, height, width, patch, stride):
    torch.manual_seed(seed)
    stride = tuple(min(s, p) for s, p in zip(stride, patch, strict=True))
    embed = PatchEmbedding(7, patch, in_channels=3, stride=stride, dtype=torch.float64)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    # Padded by a whole patch, more than is ever needed; the surplus is cut from the result.
    rows, cols = embed.grid(height, width)
    padded = F.pad(x, (0, patch[1], 0, patch[0]))
    image = F.conv2d(padded, embed.weight, embed.bias, stride)[..., :rows, :cols]
    actual, expected = embed(x), image.flatten(2).mT
    assert actual.shape == (2, rows * cols, 7)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():  # another path
        torch.testing.assert_close(embed(x), expected)
    inputs, cotangent = (x, embed.weight, embed.bias), torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


@given(length=st.integers(1, 40), patch=small, stride=small)
def test_the_grid_is_the_least_that_covers_the_image(length, patch, stride):
    stride = min(stride, patch)
    rows, cols = PatchEmbedding(2, (patch, 1), stride=(stride, 1)).grid(length, 3)
    assert cols == 3
    covered = (rows - 1) * stride + patch
    assert covered >= length
    assert rows == 1 or covered - stride < length


@pytest.mark.parametrize("stride", [None, (2, 3)])
def test_a_map_has_the_tokens_row_by_row(stride):
    tokens = PatchEmbedding(5, (2, 4), stride=stride)
    image = PatchEmbedding(5, (2, 4), stride=stride, flatten=False)
    image.load_state_dict(tokens.state_dict())
    x = torch.randn(3, 3, 7, 17)
    rows, cols = tokens.grid(7, 17)
    assert image(x).shape == (3, 5, rows, cols)
    assert torch.equal(image(x).flatten(2).mT, tokens(x))


def test_a_pixel_reaches_its_own_patch_only():
    embed, x = PatchEmbedding(5, (2, 3)), torch.randn(1, 3, 4, 9)
    changed = x.clone()
    changed[0, 1, 2, 5] += 1  # row 1 of the patches, column 1 of three
    assert (embed(changed) != embed(x)).any(-1)[0].tolist() == [False] * 4 + [True, False]


def test_padding_is_zeros_at_the_right_and_the_bottom():
    embed, x = PatchEmbedding(5, (3, 4), bias=False), torch.randn(2, 3, 4, 6)
    whole = torch.zeros(2, 3, 6, 8)
    whole[..., :4, :6] = x
    torch.testing.assert_close(embed(x), embed(whole))
    assert embed.grid(4, 6) == embed.grid(6, 8) == (2, 2)


def test_loads_the_weights_of_a_convolution():
    convolution = nn.Conv2d(3, 5, (2, 4), (2, 4))
    embed = PatchEmbedding(5, (2, 4))
    embed.load_state_dict(convolution.state_dict())
    x = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(embed(x), convolution(x).flatten(2).mT)


@pytest.mark.parametrize("stride", [None, 2])
def test_the_norm_sees_tokens(stride):
    plain = PatchEmbedding(5, 3, stride=stride)
    normed = PatchEmbedding(5, 3, stride=stride, norm=nn.LayerNorm, flatten=False, dtype=torch.float64)
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert normed.norm.weight.dtype is torch.float64
    x = torch.randn(2, 3, 6, 9)
    expected = F.layer_norm(plain(x), (5,)).double()
    torch.testing.assert_close(normed(x.double()).flatten(2).mT, expected, atol=1e-5, rtol=1e-5)


def test_channels_last_and_strided_images():
    embed, x = PatchEmbedding(5, 2), torch.randn(2, 3, 6, 8)
    expected = embed(x)
    torch.testing.assert_close(embed(x.contiguous(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(embed(x.repeat_interleave(2, 3)[..., ::2]), expected)
    assert embed(x[:0]).shape == (0, 12, 5)


@pytest.mark.parametrize("stride", [None, (1, 2)])
def test_gradients(stride):
    embed = PatchEmbedding(2, (2, 3), in_channels=1, stride=stride, dtype=torch.float64)
    x = torch.randn(1, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda x, w, b: torch.func.functional_call(embed, {"weight": w, "bias": b}, x),
        (x, embed.weight, embed.bias),
    )


def test_starts_as_a_convolution_does():
    embed = PatchEmbedding(101, 7)
    bound = 1 / math.sqrt(3 * 7 * 7)
    for parameter in embed.weight, embed.bias:
        assert -bound <= parameter.min() < -0.9 * bound
        assert 0.9 * bound < parameter.max() <= bound
    assert embed.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert PatchEmbedding(5, bias=False).bias is None
    assert PatchEmbedding(5).weight.shape == (5, 3, 16, 16)


def test_compiles_for_any_image():
    embed = PatchEmbedding(5, 2)
    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (6, 8), (7, 11), (13, 10):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), embed(x))


@pytest.mark.parametrize("stride", [0, 4, (3, 4), (-1, 2)])
def test_a_stride_that_would_drop_pixels_is_refused(stride):
    with pytest.raises(ValueError, match="stride must lie between 1 and patch_size, got stride="):
        PatchEmbedding(5, 3, stride=stride)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (2, 8, 8, 3)])
def test_what_is_no_such_image_is_named(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got"):
        PatchEmbedding(5, 2)(torch.randn(shape))


def test_repr_tells_its_sizes():
    assert repr(PatchEmbedding(5, (2, 4))).startswith(
        "PatchEmbedding(\n  5, patch_size=(2, 4), in_channels=3, stride=(2, 4), bias=True, flatten=True"
    )
