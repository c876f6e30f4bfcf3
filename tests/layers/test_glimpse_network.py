"""The glimpse network: its formula, its size in the paper, and that no gradient reaches the location."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import extract_glimpses
from lamina.layers import GlimpseNetwork
from torch import nn
from torch.autograd import gradcheck

seeds = st.integers(0, 2**31)


def draw(**options) -> GlimpseNetwork:
    options = {"num_scales": 2, "hidden_dim": 5, "location_dim": 7, "dim": 11} | options
    return GlimpseNetwork(2, 3, dtype=torch.float64, **options)


def inputs(batch: int = 3, *places: int) -> tuple[torch.Tensor, torch.Tensor]:
    locations = 2 * torch.rand(batch, *places, 2, dtype=torch.float64) - 1
    return torch.randn(batch, 2, 5, 13, dtype=torch.float64), locations


@given(seed=seeds, scales=st.integers(1, 3))
def test_is_the_formula(seed, scales):
    torch.manual_seed(seed)
    network, (images, locations) = draw(num_scales=scales), inputs()
    rho = extract_glimpses(images, locations, 3, scales).reshape(3, -1).numpy()
    weight = {name: p.detach().numpy() for name, p in network.named_parameters()}

    def relu_of(x, name):
        return (x @ weight[f"{name}.weight"].T + weight[f"{name}.bias"]).clip(0)

    h_g, h_l = relu_of(rho, "glimpse_hidden"), relu_of(locations.numpy(), "location_hidden")
    both = h_g @ weight["glimpse_out.weight"].T + h_l @ weight["location_out.weight"].T
    expected = (both + weight["glimpse_out.bias"] + weight["location_out.bias"]).clip(0)
    torch.testing.assert_close(network(images, locations), torch.from_numpy(expected))


def test_has_the_paper_s_parameters():
    """MNIST, one 8 x 8 glimpse: 128 of the glimpse, 128 of the place, 256 of both."""
    network = GlimpseNetwork(1, 8)
    assert sum(p.numel() for p in network.parameters()) == 64 * 128 + 2 * 128 + 2 * (128 * 256) + 768
    assert network(torch.rand(2, 1, 28, 28), torch.zeros(2, 2)).shape == (2, 256)


def test_no_gradient_reaches_the_locations():
    network, (images, locations) = draw(), inputs()
    network(images.requires_grad_(), locations.requires_grad_()).pow(2).sum().backward()
    assert locations.grad is None
    assert images.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in network.parameters())


def test_the_location_matters_beside_the_glimpse():
    network, (images, locations) = draw(), inputs()
    nothing = torch.zeros_like(images)
    assert not torch.allclose(network(nothing, locations), network(nothing, -locations))


def test_gradients():
    network, (images, locations) = draw(), inputs(2)
    assert gradcheck(lambda x: network(x, locations), images.requires_grad_())


def test_several_glimpses_are_each_one():
    network, (images, locations) = draw(), inputs(3, 5)
    expected = torch.stack([network(images, locations[:, t]) for t in range(5)], 1)
    torch.testing.assert_close(network(images, locations), expected)


def test_rows_of_the_batch_do_not_meet():
    network, (images, locations) = draw(), inputs()
    (found,) = torch.autograd.grad(network(images.requires_grad_(), locations)[1].sum(), images)
    assert (found[[0, 2]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_with_locations_of_float32(dtype):
    network, (images, locations) = draw(), inputs()
    expected = network(images, locations)
    actual = network.to(dtype)(images.to(dtype), locations.float())
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.double(), expected, atol=0.05, rtol=0.05)


def test_starts_as_linear_layers_do():
    torch.manual_seed(3)
    network = GlimpseNetwork(1, 8)
    torch.manual_seed(3)
    torch.testing.assert_close(network.glimpse_hidden.weight, nn.Linear(64, 128).weight)


@pytest.mark.parametrize("shape", [(3, 5, 5, 13), (3, 5, 13)])
def test_other_channels_are_named(shape):
    with pytest.raises(ValueError, match=r"images must be \(B, 2, H, W\), got"):
        draw()(torch.randn(shape, dtype=torch.float64), torch.zeros(3, 2))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        GlimpseNetwork(1, 0)
