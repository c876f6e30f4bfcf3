"""The Triton kernels of glimpses against their definition, forward and backward.

On a CPU they run in Triton's interpreter; on a GPU, where TRITON_INTERPRET=0 is set, they are compiled.
"""

import pytest
import torch
from lamina.kernels import explain, extract_glimpses, use_backend
from lamina.layers import GlimpseSensor
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("kernels_device")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SOME_DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
# (B, C, H, W), T, size, scales: one pixel, wider than the image, off the tiles, none.
SIZES = [
    ((1, 1, 1, 1), 1, 1, 1),
    ((2, 3, 11, 7), 1, 5, 2),
    ((3, 1, 5, 13), 4, 4, 3),
    ((1, 2, 35, 67), 2, 12, 2),
    ((1, 1, 17, 130), 1, 3, 4),
    ((1, 7, 6, 6), 1, 9, 1),
    ((0, 2, 3, 5), 2, 2, 1),
    ((2, 3, 4, 5), 0, 2, 2),
]


def draw(shape, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images, and locations of which some lie a little outside."""
    images = torch.randn(shape, dtype=dtype, requires_grad=True)
    wide = torch.promote_types(dtype, torch.float32)
    return images, 2.6 * torch.rand(shape[0], count, 2, dtype=wide) - 1.3


def of(locations: Tensor, size: int, scales: int):
    return lambda images: extract_glimpses(images, locations, size, scales)


@pytest.mark.parametrize("dtype", SOME_DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, dtype, compare):
    shape, count, size, scales = sizes
    images, locations = draw(shape, count, dtype)
    compare(of(locations, size, scales), [images])


@pytest.mark.parametrize("shape", [(2, 0, 3, 5), (2, 3, 0, 5), (2, 3, 5, 0)])
def test_images_without_a_pixel(shape):
    images, locations = draw(shape, 2)
    with use_backend("triton"):
        out = extract_glimpses(images, locations, 3, 2)
    assert out.shape == (2, 2, 2, shape[1], 3, 3)
    assert not out.any()
    assert torch.autograd.grad(out, images, torch.randn_like(out))[0].shape == shape


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(200)]
)
def test_random_cases(seed, compare):
    torch.manual_seed(seed)

    def one_of(*options):
        return options[int(torch.randint(len(options), (), device="cpu"))]

    shape = (one_of(1, 2), one_of(1, 2, 3), one_of(1, 2, 7, 16, 17), one_of(1, 3, 8, 31, 33))
    images, locations = draw(shape, one_of(1, 1, 2, 3), one_of(*DTYPES))
    size, scales = one_of(1, 2, 3, 4, 7, 8), one_of(1, 1, 2, 2, 3)
    if one_of(False, True):  # at the corners of pixels and at their centres
        sides = torch.tensor([shape[3], shape[2]])
        locations = (locations * sides).round() / sides
    with use_backend("triton"):
        assert explain(extract_glimpses, images, locations, size, scales).chosen == "triton"
    compare(of(locations, size, scales), [images])


@pytest.mark.parametrize("scale", [0, 1, 2])
@pytest.mark.parametrize("size", [3, 4])
def test_the_middle_of_the_image_is_its_middle_pixels(size, scale):
    """On the pixels nothing is interpolated: float32 is exact but for the mean."""
    wide = size * 2**scale
    side = wide + 6
    images = torch.randint(-9, 10, (2, 2, side, side)).float()
    with use_backend("triton"):
        actual = extract_glimpses(images, torch.zeros(2, 2), size, scale + 1)[:, scale]
    window = images[:, :, 3 : 3 + wide, 3 : 3 + wide]
    assert torch.equal(actual, torch.nn.functional.avg_pool2d(window, 2**scale))


@pytest.mark.parametrize("far", [-9.0, 9.0, 1e30, float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [0, 1])
def test_beyond_the_image_there_are_zeros(far, axis):
    images, locations = draw((2, 3, 5, 7), 1)
    locations = locations.clamp(-1, 1)
    locations[1, 0, axis] = far
    with use_backend("triton"):
        out = extract_glimpses(images, locations, 4, 2)
    (gradient,) = torch.autograd.grad(out, images, torch.randn_like(out))
    assert not out[1].any()
    assert not gradient[1].any()
    assert out[0].any()
    assert gradient[0].any()


def test_a_location_that_is_no_number_gives_none():
    """As the matrix products have it."""
    images, locations = draw((2, 3, 5, 7), 1)
    locations[1, 0, 1] = torch.nan
    with use_backend("triton"):
        out = extract_glimpses(images, locations, 4, 2)
    (gradient,) = torch.autograd.grad(out, images, torch.randn_like(out))
    for of_image in out, gradient:
        assert of_image[1].isnan().all()
        assert of_image[0].isfinite().all()


def test_locations_keep_their_precision_whatever_the_images():
    images = torch.zeros(1, 1, 1, 2001, dtype=torch.float16)
    images[..., 1003] = 1
    location = torch.tensor([[2 * 1003.5 / 2001 - 1, 0.0]])
    with use_backend("triton"):
        for dtype in torch.float32, torch.float64:
            assert extract_glimpses(images, location.to(dtype), 1).item() == pytest.approx(1, abs=1e-3)


def test_locations_of_other_dtypes(compare):
    images, locations = draw((2, 2, 5, 7), 2)
    compare(of(locations.half(), 3, 2), [images])
    compare(of(locations.double(), 3, 2), [images])
    compare(of(locations, 3, 2), [images.detach().double().requires_grad_()])


def test_inputs_of_any_stride(compare):
    shape, size, scales = (2, 3, 6, 7), 3, 1
    for images in (
        torch.randn(2, 6, 7, 3).permute(0, 3, 1, 2),
        torch.randn(2, 3, 7, 6).mT,
        torch.randn(2, 3, 6, 14)[..., ::2],
        torch.randn(1, 3, 6, 7).expand(shape),
    ):
        locations = torch.rand(2, 2, 5).mT[:, ::2]
        compare(of(locations, size, scales), [images.detach().requires_grad_()])


@pytest.mark.parametrize("how", ["stride 0", "transposed", "in part"])
def test_cotangents_of_any_stride(how):
    images, locations = draw((2, 3, 6, 7), 2)
    cotangent = {
        "stride 0": torch.ones(()).expand(2, 2, 2, 3, 4, 4),
        "transposed": torch.randn(4, 4, 3, 2, 2, 2).permute(5, 4, 3, 2, 1, 0),
        "in part": torch.randn(2, 2, 2, 3, 4, 8)[..., ::2],
    }[how]
    gradients = []
    for backend in "reference", "triton":
        with use_backend(backend):
            out = extract_glimpses(images, locations, 4, 2)
        gradients += torch.autograd.grad(out, images, cotangent)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_derivatives_of_any_order_are_the_kernels():
    images, locations = draw((1, 1, 2, 2), 1, torch.float64)
    with use_backend("triton"):
        assert gradcheck(of(locations, 2, 2), images)
        assert gradgradcheck(of(locations, 1, 2), images)
        out = extract_glimpses(images, locations, 2, 2).square()
        (first,) = torch.autograd.grad(out, images, torch.ones_like(out), create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), images)
    with use_backend("reference"):
        out = extract_glimpses(images, locations, 2, 2).square()
    (first,) = torch.autograd.grad(out, images, torch.ones_like(out), create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), images)[0])


def test_locations_get_no_gradient():
    images, locations = draw((2, 3, 5, 7), 2)
    with use_backend("triton"):
        assert extract_glimpses(images, locations.requires_grad_(), 3).requires_grad
        assert not extract_glimpses(images.detach(), locations, 3).requires_grad


def test_thirty_backward_passes_are_equal(kernels_device):
    images, locations = draw((1, 1, 9, 9), 2)
    cotangent = torch.randn(1, 2, 2, 1, 3, 3)
    count = 30 if kernels_device == "cuda" else 3  # the interpreter has one thread
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend("triton"):
            out = extract_glimpses(images, locations, 3, 2)
        runs = [torch.autograd.grad(out, images, cotangent, retain_graph=True)[0] for _ in range(count)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_autocast_changes_nothing(kernels_device):
    images, locations = draw((2, 3, 6, 7), 2)
    with use_backend("triton"):
        expected = extract_glimpses(images, locations, 4, 2)
        with torch.autocast(kernels_device, torch.bfloat16):
            assert torch.equal(extract_glimpses(images, locations, 4, 2), expected)


def test_the_layer_takes_the_kernel():
    images, locations = draw((2, 1, 9, 9), 1)
    sensor = GlimpseSensor(3, num_scales=2)
    with use_backend("triton"):
        actual = sensor(images, locations[:, 0])
        assert "extract_glimpses" in str(extract_glimpses(images, locations, 3, 2).grad_fn)
    torch.testing.assert_close(actual, sensor(images, locations[:, 0]))


def test_is_registered():
    from lamina.kernels.fused.extract_glimpses import extract_glimpses as fused
    from lamina.kernels.fused.extract_glimpses import extract_glimpses_backward as backward

    images, locations = draw((1, 1, 3, 2), 1)
    torch.library.opcheck(fused, [images, locations, 2, 1])
    grad = torch.randn(1, 1, 1, 1, 2, 2, requires_grad=True)
    torch.library.opcheck(backward, [grad, locations, images.shape])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_keeps_its_numbers(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(extract_glimpses, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, width in (2, 5), (3, 8):
        images, locations = draw((batch, 2, 6, width), 2)
        with use_backend("triton"):
            expected, actual = (f(images, locations, 3, 1) for f in (extract_glimpses, compiled))
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, images, cotangent), torch.autograd.grad(expected, images, cotangent)
        )


def test_forward_derivatives_take_another_path():
    images, locations = draw((2, 3, 5, 7), 1, torch.float64)
    tangent = torch.randn_like(images)
    with use_backend("triton"), pytest.warns(UserWarning, match="forward-mode"):
        _, derivative = torch.func.jvp(of(locations, 3, 2), (images.detach(),), (tangent,))
    torch.testing.assert_close(derivative, extract_glimpses(tangent, locations, 3, 2))


def test_says_why_it_does_not_run():
    images, locations = torch.randn(2, 1, 5, 5, device="cpu"), torch.zeros(2, 2, device="cpu")
    assert "not on a CUDA device" in explain(extract_glimpses, images, locations, 3).refusals["triton"]


def test_compiles_for_hopper(for_sm90):
    compiled = for_sm90(
        "extract_glimpses.py", "float32-photograph", "float32-digits", "float16-digits", "bfloat16-photograph"
    )
    assert [k["kernel"] for k in compiled] == ["forward_kernel", "backward_kernel"] * 4
    assert all(kernel["atomics"] == 0 for kernel in compiled)  # every run gives the same


@pytest.mark.gpu
def test_addresses_beyond_31_bits():
    images = torch.zeros(2, 3, 2**15, 2**14, dtype=torch.bfloat16)  # 3.2e9 numbers
    images[1, 2, -1, -1] = 1
    with use_backend("triton"):
        out = extract_glimpses(images.requires_grad_(), torch.ones(2, 1, 2), 2)
    (gradient,) = torch.autograd.grad(out, images, torch.ones_like(out))
    assert out[1, 0, 0, 2].flatten().tolist() == [1, 0, 0, 0]
    assert gradient[1, 2, -1, -1] == 1
    assert gradient.count_nonzero() == 6
