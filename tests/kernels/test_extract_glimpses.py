"""Glimpses: a loop over their formula, slices of the image, `grid_sample`, and where they lie."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import explain, extract_glimpses, use_backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

seeds, sizes = st.integers(0, 2**31), st.integers(1, 7)
on_every_backend = pytest.mark.parametrize("backend", ["reference", "torch"])

# (B, C, H, W), size, scales: primes; a patch wider than the image; one pixel.
CASES = [((2, 3, 11, 7), 5, 2), ((3, 1, 5, 13), 4, 3), ((1, 2, 1, 1), 1, 2), ((0, 2, 3, 5), 2, 1)]
every_case = pytest.mark.parametrize(("shape", "size", "scales"), CASES)
on_the_device = pytest.mark.usefixtures("kernels_device")


def draw(shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images, and locations of which some lie a little outside."""
    return torch.randn(shape, dtype=dtype), 2.4 * torch.rand(shape[0], 2, dtype=dtype) - 1.2


def in_numpy(images, locations, size, scales):
    """One sample at a time: bilinear in the pixels around it, zero where there is none; then their mean."""
    images, locations = images.numpy(), locations.numpy()
    batch, channels, height, width = images.shape
    out = np.zeros((batch, scales, channels, size, size))
    for b, s, i, j in itertools.product(range(batch), range(scales), range(size), range(size)):
        step = 2**s
        for di, dj in itertools.product(range(step), repeat=2):
            x = (locations[b, 0] + 1) / 2 * width - 0.5 + j * step + dj - (size * step - 1) / 2
            y = (locations[b, 1] + 1) / 2 * height - 0.5 + i * step + di - (size * step - 1) / 2
            for row, column in itertools.product(range(height), range(width)):
                share = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
                out[b, s, :, i, j] += share * images[b, :, row, column] / step**2
    return torch.from_numpy(out)


def by_grid_sample(images, locations, size, scales):
    out = []
    for step in (2**s for s in range(scales)):
        wide = size * step
        samples = torch.arange(wide, dtype=images.dtype) - (wide - 1) / 2
        x = locations[:, :1] + samples * 2 / images.shape[3]
        y = locations[:, 1:] + samples * 2 / images.shape[2]
        grid = torch.stack([x[:, None].expand(-1, wide, -1), y[:, :, None].expand(-1, -1, wide)], -1)
        out.append(F.avg_pool2d(F.grid_sample(images, grid, align_corners=False), step))
    return torch.stack(out, 1)


@every_case
@on_every_backend
def test_is_the_formula(backend, shape, size, scales):
    images, locations = draw(shape)
    with use_backend(backend):
        actual = extract_glimpses(images, locations, size, scales)
    torch.testing.assert_close(actual, in_numpy(images, locations, size, scales))


@on_the_device
@given(seed=seeds, height=sizes, width=sizes, size=sizes, scales=st.integers(1, 3))
def test_equals_grid_sample_in_values_and_gradients(seed, height, width, size, scales):
    torch.manual_seed(seed)
    images, locations = draw((2, 3, height, width))
    images.requires_grad_()
    actual = extract_glimpses(images, locations, size, scales)
    expected = by_grid_sample(images, locations, size, scales)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(glimpses, images, cotangent)[0] for glimpses in (actual, expected))
    )


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "size", "scales"), CASES[:2])
def test_torch_path_is_as_exact_as_the_definition(shape, size, scales, dtype, compare):
    images, locations = draw(shape, torch.float32)
    compare(
        lambda images: extract_glimpses(images, locations, size, scales),
        [images.to(dtype).requires_grad_()],
        backend="torch",
    )


@on_the_device
@on_every_backend
@pytest.mark.parametrize("scale", [0, 1, 2])
@pytest.mark.parametrize(("size", "sides"), [(2, (6, 10)), (4, (4, 8)), (3, (7, 5)), (1, (3, 9))])
def test_the_middle_of_the_image_is_its_middle_pixels(backend, size, sides, scale):
    """A patch of even size in an even image, or of odd in odd, is a slice; a wider scale its mean."""
    images = torch.randn(2, 3, *sides, dtype=torch.float64)
    wide = size * 2**scale
    if wide % 2 != sides[0] % 2:
        pytest.skip("the patch lies between the pixels")
    with use_backend(backend):
        actual = extract_glimpses(images, torch.zeros(2, 2), size, 3)[:, scale]
    around = F.pad(images, (wide,) * 4)
    top, left = ((side - wide) // 2 + wide for side in sides)
    window = around[:, :, top : top + wide, left : left + wide]
    torch.testing.assert_close(actual, F.avg_pool2d(window, 2**scale))


@on_every_backend
def test_an_odd_patch_in_the_middle_of_an_even_image_is_the_mean_of_four(backend):
    images = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    with use_backend(backend):
        actual = extract_glimpses(images, torch.zeros(1, 2), 1)
    torch.testing.assert_close(actual.flatten(), images[0, 0, 1:3, 2:4].mean().view(1))


@on_every_backend
@pytest.mark.parametrize("x", [-1.0, 1.0])
@pytest.mark.parametrize("y", [-1.0, 1.0])
def test_a_corner_shows_a_quarter_of_image(backend, x, y):
    images = torch.randn(2, 3, 5, 9, dtype=torch.float64)
    with use_backend(backend):
        actual = extract_glimpses(images, torch.tensor([[x, y]] * 2), 4)
    expected = torch.zeros(2, 1, 3, 4, 4, dtype=torch.float64)
    inner = [slice(2, 4) if side < 0 else slice(0, 2) for side in (y, x)]
    of_image = [slice(0, 2) if side < 0 else slice(-2, None) for side in (y, x)]
    expected[:, 0, :, inner[0], inner[1]] = images[:, :, of_image[0], of_image[1]]
    torch.testing.assert_close(actual, expected)


@on_every_backend
@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 8), (2, 3), (0, 8)])
def test_the_centre_of_a_pixel_is_the_middle_of_an_odd_patch(backend, row, column):
    images = torch.randn(1, 2, 5, 9, dtype=torch.float64)
    location = torch.tensor([[(column + 0.5) / 9, (row + 0.5) / 5]], dtype=torch.float64) * 2 - 1
    with use_backend(backend):
        actual = extract_glimpses(images, location, 3)
    torch.testing.assert_close(
        actual[:, 0], F.pad(images, (1, 1, 1, 1))[:, :, row : row + 3, column : column + 3]
    )


@on_the_device
@on_every_backend
@pytest.mark.parametrize("far", [-9.0, 9.0, 1e30, float("inf"), -float("inf")])
def test_beyond_the_image_there_are_zeros(backend, far):
    with use_backend(backend):
        glimpses = extract_glimpses(torch.randn(2, 3, 5, 7), torch.tensor([[far, 0.0], [0.0, far]]), 4)
    assert (glimpses == 0).all()


@on_the_device
@on_every_backend
def test_locations_get_no_gradient(backend):
    images, locations = (t.requires_grad_() for t in draw((2, 3, 5, 7)))
    with use_backend(backend):
        extract_glimpses(images, locations, 3, 2).pow(2).sum().backward()
    assert locations.grad is None
    assert images.grad.abs().max() > 0


@on_every_backend
def test_gradients_of_the_images(backend):
    images, locations = draw((2, 1, 3, 4))
    with use_backend(backend):
        assert gradcheck(lambda x: extract_glimpses(x, locations, 2, 2), images.requires_grad_())
        assert gradgradcheck(lambda x: extract_glimpses(x, locations, 2, 2), images)


@on_the_device
@on_every_backend
@given(seed=seeds, count=sizes, size=sizes, scales=st.integers(1, 3))
def test_several_glimpses_are_each_one(backend, seed, count, size, scales):
    torch.manual_seed(seed)
    images, _ = draw((2, 3, 5, 7))
    locations = 2 * torch.rand(2, count, 2, dtype=torch.float64) - 1
    with use_backend(backend):
        actual = extract_glimpses(images, locations, size, scales)
    for t in range(count):
        torch.testing.assert_close(actual[:, t], extract_glimpses(images, locations[:, t], size, scales))


@given(seed=seeds, height=sizes, width=sizes, size=sizes)
def test_a_mirrored_image_is_seen_mirrored_from_the_mirrored_place(seed, height, width, size):
    torch.manual_seed(seed)
    images, locations = draw((2, 3, height, width))
    mirrored = extract_glimpses(images.flip(-1), locations * torch.tensor([-1, 1]), size, 2)
    torch.testing.assert_close(mirrored.flip(-1), extract_glimpses(images, locations, size, 2))


@given(seed=seeds)
def test_rows_of_the_batch_do_not_meet(seed):
    torch.manual_seed(seed)
    images, locations = draw((3, 2, 5, 7))
    out = extract_glimpses(images.requires_grad_(), locations.clamp(-0.5, 0.5), 3, 2)
    (found,) = torch.autograd.grad(out[1], images, torch.randn_like(out[1]))
    assert found[1].abs().max() > 0
    assert (found[[0, 2]] == 0).all()


@on_the_device
def test_locations_keep_their_precision_whatever_the_images():
    """A place that float16 cannot tell from its neighbour: pixel 1003 of 2001."""
    images = torch.zeros(1, 1, 1, 2001, dtype=torch.float16)
    images[..., 1003] = 1
    location = torch.tensor([[2 * 1003.5 / 2001 - 1, 0.0]])
    for backend in "reference", "torch":
        with use_backend(backend):
            glimpse = extract_glimpses(images, location, 1)
        assert glimpse.dtype is torch.float16
        assert glimpse.item() == pytest.approx(1, abs=1e-3)


def test_the_torch_path_is_taken():
    assert explain(extract_glimpses, *draw((2, 3, 5, 7)), 3).chosen == "torch"


@pytest.mark.parametrize(
    ("dtypes", "scales", "gradient", "sampled"),
    [
        ((torch.float64, torch.float64), 1, False, True),
        ((torch.float32, torch.float32), 1, False, True),
        ((torch.float32, torch.float16), 1, False, True),
        ((torch.float32, torch.float64), 1, False, False),  # the locations would lose precision
        ((torch.float16, torch.float16), 1, False, False),
        ((torch.float64, torch.float64), 2, False, False),
        ((torch.float64, torch.float64), 1, True, False),  # there is no second derivative of a sampled one
    ],
)
def test_one_scale_is_sampled_by_pytorch(dtypes, scales, gradient, sampled, monkeypatch):
    calls, grid_sample = [], F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *args, **how: calls.append(1) or grid_sample(*args, **how))
    images, locations = torch.randn(2, 3, 5, 7).to(dtypes[0]), torch.rand(2, 4, 2).to(dtypes[1])
    images.requires_grad_(gradient)
    actual = extract_glimpses(images, locations, 3, scales)
    assert len(calls) == sampled
    with use_backend("reference"):
        torch.testing.assert_close(actual, extract_glimpses(images, locations, 3, scales))
    with torch.no_grad():
        extract_glimpses(images, locations, 3, scales)
    assert len(calls) == 2 * sampled + gradient


def test_one_scale_has_forward_derivatives():
    images, locations = draw((2, 3, 5, 7))
    tangent = torch.randn_like(images)
    _, derivative = torch.func.jvp(lambda x: extract_glimpses(x, locations, 3), (images,), (tangent,))
    torch.testing.assert_close(derivative, extract_glimpses(tangent, locations, 3))


@pytest.mark.parametrize(
    ("images", "locations", "size", "scales", "message"),
    [
        ((2, 3, 5, 7), (2, 2), 0, 1, "size must be at least 1, got 0"),
        ((2, 3, 5, 7), (2, 2), 3, 0, "num_scales must be at least 1, got 0"),
        ((3, 5, 7), (3, 2), 3, 1, r"expected images \(B, C, H, W\) and .*, got images \(3, 5, 7\)"),
        ((2, 3, 5, 7), (2, 3), 3, 1, r"got images \(2, 3, 5, 7\) and locations \(2, 3\)"),
        ((2, 3, 5, 7), (1, 2), 3, 1, r"got images \(2, 3, 5, 7\) and locations \(1, 2\)"),
        ((2, 3, 5, 7), (2,), 3, 1, r"got images \(2, 3, 5, 7\) and locations \(2,\)"),
    ],
)
def test_bad_inputs_are_named(images, locations, size, scales, message):
    with pytest.raises(ValueError, match=message):
        extract_glimpses(torch.randn(images), torch.randn(locations), size, scales)


@pytest.mark.parametrize("name", ["images", "locations"])
def test_integers_are_refused(name):
    inputs = {"images": torch.zeros(2, 3, 5, 7), "locations": torch.zeros(2, 2)}
    inputs[name] = inputs[name].byte()
    with pytest.raises(ValueError, match=f"{name} must be a float, got torch.uint8"):
        extract_glimpses(**inputs, size=3)
