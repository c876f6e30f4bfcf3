"""The norms: their formulas, their precision, and what they are equal to."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import LayerNorm2d, PixelNorm, ScaleNorm
from torch import nn
from torch.autograd import gradcheck

sizes, seeds = st.integers(1, 6), st.integers(0, 2**31)


@given(seed=seeds, batch=sizes, channels=sizes, height=sizes, width=sizes)
def test_layer_norm_2d_is_the_formula(seed, batch, channels, height, width):
    torch.manual_seed(seed)
    norm = LayerNorm2d(channels, eps=1e-3, dtype=torch.float64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = 5 + torch.randn(batch, channels, height, width, dtype=torch.float64)
    deviation = (x.var(1, correction=0, keepdim=True) + 1e-3).sqrt()
    expected = (x - x.mean(1, keepdim=True)) / deviation * norm.weight.view(-1, 1, 1) + norm.bias.view(
        -1, 1, 1
    )
    torch.testing.assert_close(norm(x), expected)


def test_layer_norm_2d_is_the_layer_norm_of_torch_channels_first():
    x = torch.randn(2, 3, 5, 7)
    expected = nn.LayerNorm(3, eps=1e-6)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(LayerNorm2d(3)(x), expected)
    starved = 1e-5 * x  # only where x is small does ε show
    assert not torch.allclose(LayerNorm2d(3)(starved), LayerNorm2d(3, eps=1e-12)(starved), atol=1e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layer_norm_2d_keeps_the_memory_format(layout):
    x = torch.randn(2, 3, 5, 7).contiguous(memory_format=layout)
    assert LayerNorm2d(3)(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dim", [1, -1])
def test_pixel_norm_is_the_formula(dim):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    moved = x.movedim(dim, -1)
    expected = moved / ((moved**2).sum(-1, keepdim=True) / moved.shape[-1] + 0.5) ** 0.5
    torch.testing.assert_close(PixelNorm(dim=dim, eps=0.5)(x), expected.movedim(-1, dim))


def test_pixel_norm_is_the_rms_norm_of_torch_without_a_weight():
    x = torch.randn(2, 5, 7)
    torch.testing.assert_close(PixelNorm(dim=-1)(x), nn.RMSNorm(7, eps=1e-8, elementwise_affine=False)(x))
    image = x.unsqueeze(-1)
    torch.testing.assert_close(PixelNorm()(image), PixelNorm(dim=1)(image))
    assert PixelNorm()(torch.zeros(1, 2, 1, 1)).abs().sum() == 0


@given(seed=seeds, dim=sizes, factor=st.floats(0.01, 100))
def test_scale_norm_gives_every_token_one_length(seed, dim, factor):
    torch.manual_seed(seed)
    norm, x = ScaleNorm(dim, eps=1e-12, dtype=torch.float64), torch.randn(2, 3, dim, dtype=torch.float64)
    torch.testing.assert_close(norm(x).norm(dim=-1), torch.full((2, 3), math.sqrt(dim)).double())
    torch.testing.assert_close(norm(factor * x), norm(x))
    norm.scale.data.fill_(-3)
    torch.testing.assert_close(norm(x), -3 * x / x.norm(dim=-1, keepdim=True))


def test_scale_norm_starts_as_rms_norm():
    x = torch.randn(2, 5, 7)
    torch.testing.assert_close(ScaleNorm(7)(x), nn.RMSNorm(7, eps=0.0)(x))


def test_scale_norm_of_nothing_is_nothing():
    norm = ScaleNorm(4, eps=0.5)
    x = torch.tensor([[0.0, 0, 0, 0], [0.1, 0, 0, 0], [3, 0, 0, 0]], requires_grad=True)
    y = norm(x)
    torch.testing.assert_close(y[:, 0], torch.tensor([0, 0.1 / 0.5 * 2, 2]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y, (x, norm.scale), torch.randn(3, 4)))
    assert ScaleNorm(4)(torch.zeros(4)).abs().sum() == 0


NORMS = {
    "LayerNorm2d": lambda **factory: LayerNorm2d(64, **factory),
    "PixelNorm": lambda **factory: PixelNorm(),
    "PixelNorm tokens": lambda **factory: PixelNorm(dim=-1),
    "ScaleNorm": lambda **factory: ScaleNorm(64, **factory),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_half_precision_is_computed_in_float32(name, dtype):
    """Squares of 300 overflow in float16, and sums of 64 lose digits in bfloat16."""
    x = (300 * torch.randn(2, 64, 3, 64)).to(dtype)
    y = NORMS[name](dtype=dtype)(x)
    assert y.dtype is dtype
    exact = NORMS[name](dtype=torch.float64)(x.double())
    rounded_once = (exact.to(dtype).double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * rounded_once


@pytest.mark.parametrize("name", NORMS)
def test_autocast_does_not_lower_the_precision(name):
    norm, x = NORMS[name](), torch.randn(2, 64, 3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    torch.testing.assert_close(y, norm(x))


@pytest.mark.parametrize(
    "norm", [LayerNorm2d(3, dtype=torch.float64), PixelNorm(), ScaleNorm(2, dtype=torch.float64)], ids=repr
)
def test_gradients(norm):
    assert gradcheck(norm, torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 5, 5), (2, 5, 5, 3)])
def test_wrong_images_are_named(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got"):
        LayerNorm2d(3)(torch.randn(shape))


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 3\), got \(2, 1\)"):
        ScaleNorm(3)(torch.randn(2, 1))


def test_pixel_norm_takes_no_size_by_mistake():
    with pytest.raises(TypeError):
        PixelNorm(768)


def test_repr_tells_sizes():
    assert [repr(n) for n in (LayerNorm2d(3), PixelNorm(), ScaleNorm(3))] == [
        "LayerNorm2d(3, eps=1e-06)",
        "PixelNorm(dim=1, eps=1e-08)",
        "ScaleNorm(3, eps=1e-05)",
    ]
