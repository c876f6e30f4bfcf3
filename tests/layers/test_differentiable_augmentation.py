"""Differentiable augmentation: each image by its own draw, as loops over pixels would do it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import DifferentiableAugmentation
from torch.autograd import gradcheck, gradgradcheck

ALL = ("color", "translation", "cutout")
TRANSGAN = ("translation", "cutout", "color")
DOUBLE = {"dtype": torch.float64}


def recolored(image, brightness, saturation, contrast):
    image = image + brightness
    mean = image.mean(0, keepdims=True)
    image = (image - mean) * saturation + mean
    mean = image.mean()
    return (image - mean) * contrast + mean


def translated(image, down, right):
    moved = np.zeros_like(image)
    _, height, width = image.shape
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                moved[:, i, j] = image[:, i - down, j - right]
    return moved


def cut(image, row, col, ratio):
    image = image.copy()
    _, height, width = image.shape
    high, wide = int(height * ratio + 0.5), int(width * ratio + 0.5)
    for i in range(row - high // 2, row - high // 2 + high):
        for j in range(col - wide // 2, col - wide // 2 + wide):
            if 0 <= i < height and 0 <= j < width:
                image[:, i, j] = 0
    return image


def by_loops(x, drawn, policy, cutout_ratio):
    """The draw done to one image after the other, in NumPy."""
    values, images = {name: value.tolist() for name, value in drawn.items()}, []
    for b, image in enumerate(x.detach().numpy()):
        for what in policy:
            if what == "color":
                image = recolored(image, *(values[n][b] for n in ("brightness", "saturation", "contrast")))
            elif what == "translation":
                image = translated(image, *values["shift"][b])
            elif values["cuts"][0]:
                image = cut(image, *values["cutout"][b], cutout_ratio)
        images.append(image)
    return torch.from_numpy(np.stack(images))


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(*[st.integers(1, n) for n in (4, 4, 9, 9)]),
    policy=st.lists(st.sampled_from(ALL), unique=True),
    ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_is_what_loops_do(seed, shape, policy, ratios):
    torch.manual_seed(seed)
    augment = DifferentiableAugmentation(
        policy, translation_ratio=ratios[0], cutout_ratio=ratios[1], cutout_probability=0.5
    )
    x = torch.randn(shape, **DOUBLE)
    drawn = augment.draw(x)
    torch.testing.assert_close(augment.augment(x, drawn), by_loops(x, drawn, policy, ratios[1]))


def test_a_call_is_a_draw_and_what_it_does():
    augment, x = DifferentiableAugmentation(), torch.randn(3, 3, 11, 7)
    torch.manual_seed(1)
    y = augment(x)
    torch.manual_seed(1)
    assert torch.equal(y, augment.augment(x, augment.draw(x)))
    assert not torch.equal(augment(x), y)


@pytest.mark.parametrize("policy", [ALL, TRANSGAN])
def test_the_policy_tells_the_order(policy):
    """Colours after the shift reach the zeros behind it, colours before it do not."""
    augment = DifferentiableAugmentation(policy[:1] + policy[-1:] if policy is TRANSGAN else policy[:2])
    x = torch.randn(1, 3, 8, 8)
    drawn = augment.draw(x) | {"shift": torch.tensor([[3, 0]]), "brightness": torch.tensor([0.25])}
    behind = augment.augment(x, drawn)[:, :, :3]
    assert (behind == 0).all() == (policy is ALL)


def test_the_draw_has_the_papers_ranges_for_each_image():
    augment, x = DifferentiableAugmentation(), torch.empty(20_000, 1, 15, 8)
    drawn = augment.draw(x)
    for name, low, high in ("brightness", -0.5, 0.5), ("saturation", 0, 2), ("contrast", 0.5, 1.5):
        values = drawn[name]
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02
    # int(15 / 8 + 0.5) rows and one column; 8 of 15 rows and 4 of 8 columns are cut, both even.
    assert [drawn["shift"][:, axis].unique().tolist() for axis in (0, 1)] == [[-2, -1, 0, 1, 2], [-1, 0, 1]]
    assert [drawn["cutout"][:, axis].unique().tolist() for axis in (0, 1)] == [[*range(16)], [*range(9)]]
    for ratio, places in (0.2, (15, 9)), (0.4, (16, 8)):  # 3 rows and 2 columns, 6 rows and 3 columns
        centre = DifferentiableAugmentation(["cutout"], cutout_ratio=ratio).draw(x)["cutout"]
        assert [centre[:, axis].unique().tolist() for axis in (0, 1)] == [[*range(n)] for n in places]
    assert drawn["cuts"].tolist() == [True]
    independent = torch.corrcoef(
        torch.stack([v.double().view(20_000, -1)[:, 0] for n, v in drawn.items() if n != "cuts"])
    )
    assert (independent - torch.eye(5)).abs().max() < 0.05


def test_the_rectangle_lies_around_its_centre():
    """5 of 9 rows and 4 of 8 columns: in the middle, and in a corner, where some of it is outside."""
    drawn = {"cutout": torch.tensor([[4, 4], [0, 8]]), "cuts": torch.tensor([True])}
    expected = torch.ones(2, 1, 9, 8)
    expected[0, 0, 2:7, 2:6] = 0
    expected[1, 0, :3, 6:] = 0
    y = DifferentiableAugmentation(["cutout"]).augment(torch.ones(2, 1, 9, 8), drawn)
    assert torch.equal(y, expected)


def test_a_batch_is_cut_with_a_probability():
    augment = DifferentiableAugmentation(["cutout"], cutout_probability=0.3)
    x = torch.ones(3, 1, 8, 8)
    images = torch.stack([augment(x) for _ in range(400)])
    cut = (images == 0).flatten(2).any(-1)
    assert (cut.all(1) | ~cut.any(1)).all(), "a batch is cut as a whole"
    assert 0.2 < cut.float().mean() < 0.4
    never = DifferentiableAugmentation(["cutout"], cutout_probability=0)
    assert all(torch.equal(never(x), x) for _ in range(20))


def test_only_what_the_policy_needs_is_drawn():
    x = torch.randn(2, 3, 8, 8)
    names = {
        ("color",): {"brightness", "saturation", "contrast"},
        ("translation",): {"shift"},
        ("cutout",): {"cutout", "cuts"},
        (): set(),
    }
    assert {policy: set(DifferentiableAugmentation(policy).draw(x)) for policy in names} == names
    assert DifferentiableAugmentation(())(x) is x


def test_a_shift_may_leave_nothing():
    augment, x = DifferentiableAugmentation(["translation"], translation_ratio=1.0), torch.randn(2, 3, 5, 7)
    assert augment.augment(x, {"shift": torch.tensor([[5, 0], [0, -7]])}).abs().sum() == 0
    assert torch.equal(augment.augment(x, {"shift": torch.tensor([[0, 0], [0, 0]])}), x)


def test_evaluation_is_the_identity():
    x = torch.randn(2, 3, 8, 8)
    assert DifferentiableAugmentation().eval()(x) is x


def test_one_draw_serves_two_batches():
    """The augmentation is linear but for brightness: what it does to a sum, it does to the terms."""
    augment = DifferentiableAugmentation().eval()
    real, fake = torch.randn(2, 3, 3, 11, 7, **DOUBLE)
    drawn = augment.draw(real)
    drawn["brightness"].zero_()
    together = augment.augment(real, drawn) + augment.augment(fake, drawn)
    torch.testing.assert_close(augment.augment(real + fake, drawn), together)


def test_a_generator_leaves_the_global_stream_alone():
    augment, x = DifferentiableAugmentation(), torch.randn(3, 3, 8, 8)
    state = torch.get_rng_state()
    first = augment(x, generator=torch.Generator().manual_seed(7))
    assert torch.equal(augment(x, generator=torch.Generator().manual_seed(7)), first)
    assert not torch.equal(augment(x, generator=torch.Generator().manual_seed(8)), first)
    assert torch.equal(torch.get_rng_state(), state)


@given(seed=st.integers(0, 2**31))
def test_images_of_a_batch_do_not_meet(seed):
    torch.manual_seed(seed)
    augment = DifferentiableAugmentation(cutout_probability=0.5)
    x = torch.randn(3, 2, 7, 5, **DOUBLE, requires_grad=True)
    drawn = augment.draw(x)
    y = augment.augment(x, drawn)
    gradient = torch.autograd.grad(y[1], x, torch.randn_like(y[1]))[0]
    assert gradient[[0, 2]].count_nonzero() == 0
    alone = {name: value if name == "cuts" else value[1:2] for name, value in drawn.items()}
    torch.testing.assert_close(augment.augment(x[1:2], alone), y[1:2])


def test_what_is_not_seen_has_no_influence():
    """Not even where it is infinite: cut or shifted away is gone, and gets no gradient."""
    augment, x = DifferentiableAugmentation(["translation", "cutout"]), torch.randn(2, 3, 8, 8)
    drawn = {"shift": torch.tensor([[3, 0], [0, 0]]), "cutout": torch.tensor([[0, 0], [4, 4]])}
    drawn["cuts"] = torch.tensor([True])
    x[0, :, 5:], x[1, :, 3:5, 3:5] = torch.inf, torch.nan
    y = augment.augment(x.requires_grad_(), drawn)
    assert y.isfinite().all()
    gradient = torch.autograd.grad(y, x, torch.randn_like(y))[0]
    assert gradient.isfinite().all()
    assert gradient[0, :, 5:].count_nonzero() == gradient[1, :, 3:5, 3:5].count_nonzero() == 0
    assert gradient[1, :, 0].count_nonzero() > 0


@pytest.mark.parametrize("policy", [ALL, TRANSGAN, ("color",), ("translation",), ("cutout",)])
def test_gradients(policy):
    augment = DifferentiableAugmentation(policy)
    x = torch.randn(2, 2, 5, 4, **DOUBLE, requires_grad=True)
    drawn = augment.draw(x)
    assert gradcheck(lambda x: augment.augment(x, drawn), x)
    assert gradgradcheck(lambda x: augment.augment(x, drawn).square(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    augment, x = DifferentiableAugmentation(), torch.randn(2, 3, 64, 48).to(dtype)
    drawn = augment.draw(x)
    y, exact = augment.augment(x, drawn), augment.augment(x.double(), drawn)
    assert y.dtype is dtype
    rounded_once = (exact.to(dtype).double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * rounded_once


def test_training_compiles_whole():
    augment = DifferentiableAugmentation(TRANSGAN, cutout_probability=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in (2, 3, 8, 11), (5, 3, 9, 7):
        x = torch.randn(shape, requires_grad=True)
        results = []
        for call in augment, compiled:
            torch.manual_seed(1)
            y = call(x)
            torch.manual_seed(2)
            results.append((y, *torch.autograd.grad(y, x, torch.randn_like(y))))
        torch.testing.assert_close(*results)


def test_no_images():
    assert DifferentiableAugmentation()(torch.randn(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("policy", ["color", ("colour",), ("color", "color"), ("color", "hue")])
def test_a_wrong_policy_is_named(policy):
    with pytest.raises(ValueError, match=r"policy must name some of .* each once, got "):
        DifferentiableAugmentation(policy)


@pytest.mark.parametrize("name", ["translation_ratio", "cutout_ratio", "cutout_probability"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_wrong_ratio_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1, got {name}={value}"):
        DifferentiableAugmentation(**{name: value})


def test_wrong_images_are_named():
    augment = DifferentiableAugmentation()
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\), got \(3, 8, 8\)"):
        augment(torch.randn(3, 8, 8))
    drawn = augment.draw(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="drawn must be for 3 images, got brightness for 2"):
        augment.augment(torch.randn(3, 3, 8, 8), drawn)
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\)"):
        augment.augment(torch.randn(3, 8, 8), drawn)


def test_repr_tells_the_policy():
    assert repr(DifferentiableAugmentation(["color"], cutout_probability=0.3)) == (
        "DifferentiableAugmentation(('color',), translation_ratio=0.125, cutout_ratio=0.5, "
        "cutout_probability=0.3)"
    )
