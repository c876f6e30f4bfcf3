"""The glimpse sensor is its operation, and the well-known port where that is not rounded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import extract_glimpses
from lamina.layers import GlimpseSensor
from torch import Tensor


def as_the_port(images: Tensor, locations: Tensor, size: int, scales: int) -> Tensor:
    """The sliced patches of the popular implementation, kevinzakka/recurrent-visual-attention."""
    glimpses = []
    for scale in range(scales):
        wide = size * 2**scale
        padded = torch.nn.functional.pad(images, (wide // 2,) * 4)
        sides = torch.tensor([images.shape[3], images.shape[2]])
        starts = (0.5 * (locations + 1) * sides).long()
        patches = [
            image[:, y : y + wide, x : x + wide]
            for image, (x, y) in zip(padded, starts.tolist(), strict=True)
        ]
        glimpses.append(torch.nn.functional.avg_pool2d(torch.stack(patches), 2**scale))
    return torch.stack(glimpses, 1)


def test_is_the_operation():
    images, locations = torch.randn(2, 3, 11, 7), torch.rand(2, 5, 2)
    glimpses = GlimpseSensor(4, num_scales=2)(images, locations)
    assert glimpses.shape == (2, 5, 2, 3, 4, 4)
    assert torch.equal(glimpses, extract_glimpses(images, locations, 4, 2))


def test_gradients_reach_the_images_and_not_the_locations():
    images, locations = torch.randn(2, 3, 11, 7).requires_grad_(), torch.rand(2, 2).requires_grad_()
    glimpses = GlimpseSensor(4, num_scales=2)(images, locations)
    cotangent = torch.randn_like(glimpses)
    of_images, of_locations = torch.autograd.grad(glimpses, (images, locations), cotangent, allow_unused=True)
    expected = torch.autograd.grad(extract_glimpses(images, locations, 4, 2), images, cotangent)
    torch.testing.assert_close(of_images, expected[0])
    assert of_images.count_nonzero()
    assert of_locations is None


@given(seed=st.integers(0, 2**31), height=st.integers(1, 9), width=st.integers(1, 9))
def test_equals_the_port_where_the_location_is_a_corner_of_pixels(seed, height, width):
    torch.manual_seed(seed)
    images = torch.randn(3, 2, height, width, dtype=torch.float64)
    corners = torch.stack([torch.randint(width + 1, (3,)), torch.randint(height + 1, (3,))], -1).double()
    locations = 2 * corners / torch.tensor([width, height]) - 1
    locations += (
        1e-9  # the port rounds down, and a location that is a hair below its corner would be the next
    )
    actual = GlimpseSensor(4, num_scales=3)(images, locations)
    torch.testing.assert_close(actual, as_the_port(images, locations, 4, 3), atol=1e-6, rtol=0)


def test_the_port_is_off_by_up_to_a_pixel_and_this_is_not():
    """A ramp: a glimpse of one pixel tells where it was taken."""
    images = torch.arange(8.0).expand(1, 1, 8, 8)
    x = torch.linspace(-0.7, 0.7, 57)
    exact = (x + 1) * 4 - 0.5
    locations = torch.stack([x, torch.zeros_like(x)], -1)
    sensed = torch.cat([GlimpseSensor(2)(images, at[None]) for at in locations]).mean((1, 2, 3, 4))
    port = torch.cat([as_the_port(images, at[None], 2, 1) for at in locations]).mean((1, 2, 3, 4))
    torch.testing.assert_close(sensed, exact)
    bias = port - exact
    assert -1 < bias.min() < bias.max() <= 1e-5
    assert bias.mean().item() == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize(("size", "scales", "name"), [(0, 1, "size"), (3, 0, "num_scales")])
def test_bad_sizes_are_named(size, scales, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        GlimpseSensor(size, scales)


def test_its_sizes_are_shown():
    assert repr(GlimpseSensor(8, num_scales=3)) == "GlimpseSensor(8, num_scales=3)"
