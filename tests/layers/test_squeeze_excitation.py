"""Squeeze and excitation: its formula, the layers of transformers, and the weights of convolutions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import SqueezeExcitation
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

DOUBLE = {"dtype": torch.float64}


def test_is_the_formula():
    layer, x = SqueezeExcitation(5, 3, **DOUBLE), torch.randn(2, 5, 7, 11, **DOUBLE)
    w1, b1, w2, b2 = (p.detach().numpy() for p in layer.parameters())
    expected, weights = np.empty(x.shape), np.empty((2, 5))
    for b in range(2):
        z = np.array([x[b, c].numpy().sum() / 77 for c in range(5)])
        hidden = np.maximum(w1 @ z + b1, 0)
        weights[b] = 1 / (1 + np.exp(-(w2 @ hidden + b2)))
        for c in range(5):
            expected[b, c] = weights[b, c] * x[b, c].numpy()
    torch.testing.assert_close(layer(x), torch.from_numpy(expected))
    torch.testing.assert_close(layer.weights(x), torch.from_numpy(weights))


@given(seed=st.integers(0, 2**31), places=st.permutations(range(6)))
def test_the_order_of_pixels_does_not_matter_to_the_weights(seed, places):
    torch.manual_seed(seed)
    layer, x = SqueezeExcitation(5, 3, **DOUBLE), torch.randn(2, 5, 2, 3, **DOUBLE)
    moved = x.flatten(2)[:, :, list(places)].view_as(x)
    torch.testing.assert_close(layer.weights(moved), layer.weights(x))
    torch.testing.assert_close(layer(moved).flatten(2), layer(x).flatten(2)[:, :, list(places)])


def check_peer(ours, theirs, x, state):
    ours.load_state_dict(state)
    theirs, cotangent = theirs.double(), torch.randn_like(x)
    names = list(ours.state_dict())
    peers = [theirs.get_parameter(n) for n, _ in theirs.named_parameters()]
    expected, actual = theirs(x), ours(x)
    torch.testing.assert_close(actual, expected)
    expected = torch.autograd.grad(expected, [x, *peers], cotangent)
    actual = torch.autograd.grad(actual, [x, *(ours.get_parameter(n) for n in names)], cotangent)
    torch.testing.assert_close([a.flatten() for a in actual], [e.flatten() for e in expected])


def test_is_regnets_layer():
    regnet = pytest.importorskip("transformers.models.regnet.modeling_regnet")
    theirs = regnet.RegNetSELayer(5, 3).double()
    state = dict(zip(SqueezeExcitation(5, 3).state_dict(), theirs.state_dict().values(), strict=True))
    x = torch.randn(2, 5, 7, 11, **DOUBLE, requires_grad=True)
    check_peer(SqueezeExcitation(5, 3, **DOUBLE), theirs, x, state)


def test_is_efficientnets_layer():
    efficientnet = pytest.importorskip("transformers.models.efficientnet.modeling_efficientnet")
    config = efficientnet.EfficientNetConfig(hidden_act="swish", squeeze_expansion_ratio=0.25)
    theirs = efficientnet.EfficientNetSqueezeExciteLayer(config, 8, 24, expand=True).double()
    x = torch.randn(2, 24, 3, 5, **DOUBLE, requires_grad=True)
    check_peer(SqueezeExcitation(24, 2, activation=nn.SiLU, **DOUBLE), theirs, x, theirs.state_dict())


def test_weights_of_convolutions_load_below_a_name_too():
    ours = nn.ModuleDict({"se": SqueezeExcitation(5, 3)})
    state = {name: torch.randn_like(value) for name, value in ours.state_dict().items()}
    as_images = {n: v[..., None, None] if n.endswith("weight") else v for n, v in state.items()}
    ours.load_state_dict(as_images)
    torch.testing.assert_close(ours.state_dict(), type(ours.state_dict())(state))
    assert as_images["se.reduce.weight"].shape == (3, 5, 1, 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for se\.expand\.weight"):
        ours.load_state_dict({**as_images, "se.expand.weight": torch.ones(5, 3, 3, 3)})
    del as_images["se.reduce.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"se\.reduce\.weight"'):
        ours.load_state_dict(as_images)


def test_hidden_size_by_default():
    assert SqueezeExcitation(96).reduce.weight.shape == (6, 96)
    assert SqueezeExcitation(7).reduce.weight.shape == (1, 7)


def test_activation_and_gate_are_of_choice():
    layer = SqueezeExcitation(5, 3, activation=nn.Tanh, gate=nn.Hardsigmoid, **DOUBLE)
    x = 3 * torch.randn(2, 5, 7, 11, **DOUBLE)
    hidden = layer.expand(layer.reduce(x.mean((2, 3))).tanh())
    torch.testing.assert_close(layer.weights(x), (hidden / 6 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_memory_format(layout):
    layer, x = SqueezeExcitation(3), torch.randn(2, 3, 5, 7)
    y = layer(x.contiguous(memory_format=layout))
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, layer(x))


def test_gradients():
    layer = SqueezeExcitation(3, 2, activation=nn.Tanh, **DOUBLE)
    x = torch.randn(2, 3, 2, 3, **DOUBLE, requires_grad=True)
    assert gradcheck(layer, x)
    assert gradgradcheck(layer, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(dtype):
    layer, x = SqueezeExcitation(32, dtype=dtype), torch.randn(2, 32, 5, 7, dtype=dtype)
    exact = SqueezeExcitation(32, **DOUBLE)
    exact.load_state_dict(layer.state_dict())
    y = layer(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=8 * torch.finfo(dtype).eps, atol=1e-3)


def test_autocast_keeps_the_image_as_it_is():
    layer, x = SqueezeExcitation(32), torch.randn(2, 32, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.float32


def test_an_image_keeps_its_dtype_beside_a_wider_gate():
    class Wide(nn.Sigmoid):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float())

    half = {"dtype": torch.bfloat16}
    assert SqueezeExcitation(32, gate=Wide, **half)(torch.randn(2, 32, 5, 7, **half)).dtype is torch.bfloat16


def test_one_pixel_and_no_image():
    layer = SqueezeExcitation(3)
    assert layer(torch.randn(2, 3, 1, 1)).isfinite().all()
    assert layer(torch.randn(0, 3, 5, 7)).shape == (0, 3, 5, 7)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 5, 5), (2, 5, 5, 3)])
def test_wrong_images_are_named(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got"):
        SqueezeExcitation(3)(torch.randn(shape))


def test_a_wrong_size_is_named():
    with pytest.raises(ValueError, match="hidden_dim must be at least 1, got hidden_dim=0"):
        SqueezeExcitation(3, 0)
