"""Deformable sampling: a loop over its formula, `grid_sample`, transformers, and the fast path against it."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import deformable_sampling, explain, use_backend
from lamina.kernels.deformable_sampling import sampling_weights
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

seeds, sizes = st.integers(0, 2**31), st.integers(1, 6)
BACKENDS = ["reference", "torch"]
SHAPES = [(5, 7), (1, 3), (3, 1), (1, 1)]

# (B, Lq, H, P, D) over the levels of SHAPES, or fewer.
CASES = {
    "primes": ((2, 5, 3, 2, 7), SHAPES),
    "one of each": ((1, 1, 1, 1, 1), [(1, 1)]),
    "one level": ((3, 13, 2, 4, 5), [(7, 2)]),
    "no query": ((2, 0, 3, 2, 5), SHAPES[:2]),
    "no batch": ((0, 3, 2, 2, 5), SHAPES[:2]),
}
every_case = pytest.mark.parametrize(("case", "shapes"), CASES.values(), ids=CASES)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_the_device = pytest.mark.usefixtures("kernels_device")


def draw(case, shapes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Values, locations of which some lie outside, and weights of order one."""
    batch, queries, heads, points, dim = case
    length = sum(h * w for h, w in shapes)
    value = torch.randn(batch, length, heads, dim, dtype=dtype)
    locations = 1.6 * torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) - 0.3
    weights = torch.randn(batch, queries, heads, len(shapes), points, dtype=dtype)
    return [t.requires_grad_() for t in (value, locations, weights)]


def sampled(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    return deformable_sampling(value, shapes, locations, weights)


def in_numpy(value, shapes, locations, weights):
    """The formula: every cell has, in every sample, the share that its distance leaves it."""
    value, locations, weights = (t.detach().numpy() for t in (value, locations, weights))
    batch, queries, heads, levels, points = weights.shape
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    for b, q, h, s, p in itertools.product(*map(range, (batch, queries, heads, levels, points))):
        height, width = shapes[s]
        start = sum(rows * columns for rows, columns in shapes[:s])
        x, y = locations[b, q, h, s, p] * (width, height) - 0.5
        for row, column in itertools.product(range(height), range(width)):
            share = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
            out[b, q, h] += weights[b, q, h, s, p] * share * value[b, start + row * width + column, h]
    return torch.from_numpy(out)


def by_grid_sample(value, shapes, locations, weights):
    """What most implementations run, one `grid_sample` a level; transformers has the same."""
    out = 0
    for i, level in enumerate(value.split([h * w for h, w in shapes], 1)):
        maps = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shapes[i])
        grid = 2 * locations[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1
        found = F.grid_sample(maps, grid, align_corners=False).unflatten(
            0, value.shape[:1] + weights.shape[2:3]
        )
        out = out + (found * weights[:, :, :, i].transpose(1, 2).unsqueeze(2)).sum(-1)
    return out.permute(0, 3, 1, 2)


@every_case
@on_every_backend
def test_is_the_formula(backend, case, shapes):
    value, locations, weights = draw(case, shapes)
    with use_backend(backend):
        actual = sampled(value, shapes, locations, weights)
    torch.testing.assert_close(actual, in_numpy(value, shapes, locations, weights))


@on_the_device
@on_every_backend
def test_equals_grid_sample_in_values_and_gradients(backend):
    inputs = draw((2, 11, 3, 5, 7), SHAPES)
    expected = by_grid_sample(inputs[0], SHAPES, *inputs[1:])
    with use_backend(backend):
        actual = sampled(inputs[0], SHAPES, *inputs[1:])
        cotangent = torch.randn_like(actual)
        found = torch.autograd.grad(actual, inputs, cotangent)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, cotangent))


@on_every_backend
def test_equals_transformers(backend):
    peer = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    inputs = draw((2, 11, 3, 5, 7), SHAPES)
    expected = peer.MultiScaleDeformableAttention()(inputs[0], None, SHAPES, None, *inputs[1:], 64)
    with use_backend(backend):
        actual = sampled(inputs[0], SHAPES, *inputs[1:]).flatten(2)
        cotangent = torch.randn_like(actual)
        found = torch.autograd.grad(actual, inputs, cotangent)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, cotangent))


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@every_case
def test_torch_path_is_as_exact_as_the_definition(case, shapes, dtype, compare):
    value, locations, weights = draw(case, shapes, torch.float32)
    value, weights = (t.detach().to(dtype).requires_grad_() for t in (value, weights))
    # In a half precision the locations stay float32; where they are that of `value`, all is of one dtype.
    locations = locations.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    compare(lambda value, *at: sampled(value, shapes, *at), [value, locations, weights], backend="torch")


@on_every_backend
def test_the_centre_of_a_cell_is_that_cell(backend):
    value = torch.randn(2, 17, 3, 5, dtype=torch.float64)
    shapes, cells = [(2, 3), (11, 1)], torch.randint(6, (2, 7, 3, 1, 1))
    deep = torch.randint(11, (2, 7, 3, 1, 1))
    first = torch.stack([(cells % 3).double().add(0.5) / 3, (cells // 3).double().add(0.5) / 2], -1)
    second = torch.stack([torch.full(deep.shape, 0.5), deep.double().add(0.5) / 11], -1)
    weights = torch.randn(2, 7, 3, 2, 1, dtype=torch.float64)
    with use_backend(backend):
        out = sampled(value, shapes, torch.cat([first, second], 3), weights)
    index = torch.stack([cells, deep + 6]).flatten(-3)  # (2, B, Lq, H): of either level
    rows = torch.stack([value.gather(1, i[..., None].expand(-1, -1, -1, 5)) for i in index])
    torch.testing.assert_close(out, (rows * weights.squeeze(-1).movedim(-1, 0).unsqueeze(-1)).sum(0))


@on_the_device
@on_every_backend
def test_between_cells_and_beyond_the_edge_it_fades_linearly(backend):
    """One row of two cells, 1 and 10: halfway between them, at the edge, and half a cell beyond it."""
    value = torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    x = torch.tensor([0.5, 0.0, -0.125, -0.25, 0.75, 1.0, 1.25, 1.3])
    locations = torch.stack([x, torch.full_like(x, 0.5)], -1).view(1, -1, 1, 1, 1, 2)
    with use_backend(backend):
        out = sampled(value, [(1, 2)], locations, torch.ones(1, len(x), 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([5.5, 0.5, 0.25, 0, 10, 5, 0, 0]))


@on_the_device
@on_every_backend
@pytest.mark.parametrize("place", [-0.7, 1.7, 1e30, -1e30, math.inf, -math.inf])
def test_outside_there_is_nothing_to_find_nor_to_learn(backend, place):
    inputs = draw((2, 3, 2, 4, 5), SHAPES)
    inputs[1] = torch.full_like(inputs[1], place).requires_grad_()
    with use_backend(backend):
        out = sampled(inputs[0], SHAPES, *inputs[1:])
        found = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert (out == 0).all()
    assert all((gradient == 0).all() for gradient in found)


@on_the_device
@on_every_backend
def test_a_location_that_is_nan_shows_and_harms_no_other(backend):
    value, locations, weights = draw((2, 3, 3, 4, 5), SHAPES)
    broken = locations.detach().clone()
    broken[0, 1, 0, 2, 3, 0] = math.nan
    with use_backend(backend):
        out, whole = (sampled(value, SHAPES, at, weights) for at in (broken, locations))
    assert out[0, 1, 0].isnan().all()
    others = torch.ones(out.shape[:3], dtype=torch.bool)
    others[0, 1, 0] = False
    torch.testing.assert_close(out[others], whole[others])


@on_the_device
@on_every_backend
def test_its_derivative_at_the_centre_of_a_cell_is_that_of_grid_sample(backend):
    inputs = draw((1, 4, 2, 1, 3), [(3, 4)])
    centres = torch.tensor([[0, 0], [3, 2], [1, 1], [2, 0]]).add(0.5) / torch.tensor([4, 3])
    inputs[1] = centres.double().view(1, 4, 1, 1, 1, 2).repeat(1, 1, 2, 1, 1, 1).requires_grad_()
    outcomes = []
    for operation in sampled, by_grid_sample:
        with use_backend(backend):
            out = operation(inputs[0], [(3, 4)], *inputs[1:])
        outcomes.append(torch.autograd.grad(out, inputs, torch.ones_like(out) * torch.arange(3)))
    torch.testing.assert_close(*outcomes)


@on_every_backend
def test_gradients(backend):
    inputs = draw((2, 2, 2, 1, 2), [(2, 3), (1, 2)])
    with use_backend(backend):
        assert gradcheck(lambda value, *at: sampled(value, [(2, 3), (1, 2)], *at), inputs)
        assert gradgradcheck(lambda value, *at: sampled(value, [(2, 3), (1, 2)], *at), inputs)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_the_second_derivative_of_one_input_alone(wanted):
    inputs = [t.detach() for t in draw((1, 3, 2, 2, 3), [(2, 3)])]
    inputs[wanted].requires_grad_()

    def penalty(backend):
        with use_backend(backend):
            out = sampled(inputs[0], [(2, 3)], *inputs[1:])
            (first,) = torch.autograd.grad(out.pow(3).sum(), inputs[wanted], create_graph=True)
            return torch.autograd.grad(first.pow(2).sum(), inputs[wanted])

    torch.testing.assert_close(penalty("torch"), penalty("reference"))


@given(seed=seeds, height=sizes, width=sizes, queries=sizes, points=sizes)
def test_the_dense_weights_times_the_values_are_the_output(seed, height, width, queries, points):
    torch.manual_seed(seed)
    shapes = [(height, width), (width, 2)]
    value, locations, weights = draw((2, queries, 3, points, 5), shapes)
    dense = sampling_weights(shapes, locations, weights)
    expected = torch.einsum("bqhn,bnhd->bqhd", dense, value)
    torch.testing.assert_close(sampled(value, shapes, locations, weights), expected)


@given(seed=seeds, height=sizes, width=sizes, points=sizes)
def test_levels_add_up(seed, height, width, points):
    torch.manual_seed(seed)
    shapes = [(height, width), (3, 2)]
    value, locations, weights = draw((2, 3, 2, points, 5), shapes)
    parts = [
        sampled(part, [shape], locations[:, :, :, i : i + 1], weights[:, :, :, i : i + 1])
        for i, (part, shape) in enumerate(zip(value.split([height * width, 6], 1), shapes, strict=True))
    ]
    torch.testing.assert_close(sampled(value, shapes, locations, weights), sum(parts))


@given(seed=seeds, height=sizes, width=sizes)
def test_transposed_levels_are_sampled_at_transposed_places(seed, height, width):
    torch.manual_seed(seed)
    value, locations, weights = draw((2, 3, 2, 4, 5), [(height, width)])
    turned = value.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(
        sampled(turned, [(width, height)], locations.flip(-1), weights),
        sampled(value, [(height, width)], locations, weights),
    )


@given(seed=seeds)
def test_rows_and_heads_do_not_meet(seed):
    torch.manual_seed(seed)
    inputs = draw((3, 4, 5, 2, 3), SHAPES)
    out = sampled(inputs[0], SHAPES, *inputs[1:])
    found = torch.autograd.grad(out[1, :, 3], inputs, torch.randn(4, 3, dtype=torch.float64))
    for gradient in found:
        assert gradient[1, :, 3].abs().max() > 0
        gradient[1, :, 3] = 0
        assert (gradient == 0).all()


@on_the_device
def test_half_precision_is_summed_in_float32():
    """4096 samples of one cell, each a 4096th: in half precision their sum would stop far below one."""
    value = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    locations, weights = torch.full((1, 1, 1, 1, 4096, 2), 0.5), torch.full((1, 1, 1, 1, 4096), 1 / 4096)
    for backend in BACKENDS:
        with use_backend(backend):
            out = sampled(value, [(1, 1)], locations, weights)
        assert out.dtype is torch.float16
        assert out.item() == 1


@on_the_device
@on_every_backend
def test_inputs_of_any_stride(backend):
    value, locations, weights = inputs = draw((2, 5, 3, 4, 7), SHAPES)
    strided = [
        value.transpose(1, 2).contiguous().transpose(1, 2),
        locations.transpose(-1, -2).contiguous().transpose(-1, -2),
        weights.repeat_interleave(2, -1)[..., ::2],
    ]
    with use_backend(backend):
        out = sampled(strided[0], SHAPES, *strided[1:])
        cotangent = torch.randn(3, 5, 2, 7, dtype=torch.float64).transpose(0, 2)
        found = torch.autograd.grad(out, inputs, cotangent)
    expected = by_grid_sample(value, SHAPES, locations, weights)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, cotangent))


def test_compiles_whole_and_keeps_its_numbers():
    inputs = draw((2, 5, 3, 4, 7), SHAPES)
    compiled = torch.compile(
        lambda value, *at: sampled(value, SHAPES, *at), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    expected, actual = sampled(inputs[0], SHAPES, *inputs[1:]), compiled(*inputs)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


def test_exports_with_a_batch_and_levels_of_any_size():
    class Sampled(torch.nn.Module):
        def forward(self, maps, locations, weights):
            value = maps.permute(0, 3, 4, 1, 2).flatten(1, 2)
            return sampled(value, [(maps.shape[3], maps.shape[4])], locations, weights)

    def inputs(batch, queries, height, width):
        locations = torch.rand(batch, queries, 2, 1, 4, 2)
        return torch.randn(batch, 2, 5, height, width), locations, torch.rand(batch, queries, 2, 1, 4)

    batch, queries = torch.export.Dim("batch"), torch.export.Dim("queries")
    sides = {3: torch.export.Dim("height"), 4: torch.export.Dim("width")}
    both = {0: batch, 1: queries}
    program = torch.export.export(
        Sampled(), inputs(3, 7, 4, 6), dynamic_shapes=({0: batch, **sides}, both, both), strict=False
    )
    for sizes_ in (3, 7, 4, 6), (2, 5, 9, 3):
        given_ = inputs(*sizes_)
        torch.testing.assert_close(program.module()(*given_), Sampled()(*given_))


@on_the_device
def test_the_fast_path_is_registered():
    from lamina.kernels._deformable_bags import sampled_by_bags

    value, locations, weights = draw((2, 3, 2, 2, 5), SHAPES[:2], torch.float32)
    torch.library.opcheck(sampled_by_bags, (value, [5, 7, 1, 3], locations, weights))


@pytest.mark.parametrize(("length", "dtype"), [(9, torch.int32), (2**29 + 4, torch.int64)])
def test_rows_are_counted_in_as_many_bits_as_the_last_needs(length, dtype):
    """The table of the long one has more than 2**31 rows, though nothing is stored: all are one number."""
    from lamina.kernels._deformable_bags import _Levels, _Samples

    value, locations = torch.zeros(1).expand(2, length, 2, 1), torch.full((2, 1, 2, 1, 1, 2), 0.5)
    rows = _Samples(value, _Levels(slice(0, 1), [length - 4], [2], [2]), locations).rows
    assert rows.dtype is dtype
    last = [2 * (2 * length - 4 + cell) + 1 for cell in range(4)]  # of the last row of the batch and head
    assert rows[1, 0, 1, 0].flatten().tolist() == last


@pytest.mark.parametrize("rows", [1, 2**7, 2**19])
@pytest.mark.parametrize("gathered", [1, 2**6])
def test_levels_by_any_number_at_once(monkeypatch, rows, gathered):
    from lamina.kernels import _deformable_bags

    monkeypatch.setattr(_deformable_bags, "ROWS", rows)
    monkeypatch.setattr(_deformable_bags, "GATHERED", gathered)
    inputs = draw((2, 3, 2, 2, 5), SHAPES)
    expected = by_grid_sample(inputs[0], SHAPES, *inputs[1:])
    with use_backend("torch"):
        actual = sampled(inputs[0], SHAPES, *inputs[1:])
    cotangent = torch.randn_like(actual)
    torch.testing.assert_close(actual, expected)
    found, wanted = (torch.autograd.grad(out, inputs, cotangent) for out in (actual, expected))
    torch.testing.assert_close(found, wanted)


@on_the_device
def test_forward_derivatives_take_the_definition():
    inputs = [t.detach() for t in draw((1, 3, 2, 2, 5), SHAPES[:1])]
    tangents = tuple(torch.randn_like(t) for t in inputs)

    def operation(value, locations, weights):
        return sampled(value, SHAPES[:1], locations, weights)

    _, actual = torch.func.jvp(operation, tuple(inputs), tangents)
    with use_backend("reference"):
        _, expected = torch.func.jvp(operation, tuple(inputs), tangents)
    assert actual.abs().max() > 0
    torch.testing.assert_close(actual, expected)


def test_the_fast_path_is_taken():
    value, locations, weights = draw((1, 3, 2, 2, 5), SHAPES[:1])
    assert explain(deformable_sampling, value, SHAPES[:1], locations, weights).chosen == "torch"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (torch.tensor([[5, 7]]), r"plain integers, at least 1, got a tensor \(1, 2\): use .tolist\(\)"),
        ([torch.tensor([5, 7])], "spatial_shapes must be .* as plain integers"),
        ([(5.0, 7.0)], "spatial_shapes must be .* as plain integers"),
        ([(5, 7, 1)], "spatial_shapes must be .* as plain integers"),
        ([5, 7], "spatial_shapes must be .* as plain integers"),
        ([(-5, -7)], "at least 1, got"),
        ([], "spatial_shapes must be .* as plain integers"),
        ([(5, 6)], r"value must hold the cells of all levels: 30 for \[\(5, 6\)\], got 35"),
        ([(5, 7), (1, 1)], "with S = 2 levels"),
    ],
)
def test_bad_spatial_shapes_are_named(shapes, message):
    value, locations, weights = draw((1, 3, 2, 2, 5), [(5, 7)])
    with pytest.raises(ValueError, match=message):
        deformable_sampling(value, shapes, locations, weights)


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("dim", [0, 2, -1])
def test_bad_shapes_are_named(wrong, dim):
    inputs = [t.detach() for t in draw((2, 3, 3, 4, 5), [(5, 7)])]
    if (wrong, dim) == (0, -1):
        pytest.skip("values may have any size")
    inputs[wrong] = torch.cat([inputs[wrong]] * 2, dim)
    with pytest.raises(ValueError, match=r"expected value \(B, sum of h w, H, D\), locations .* and weights"):
        sampled(inputs[0], [(5, 7)], *inputs[1:])


@pytest.mark.parametrize(("wrong", "name"), list(enumerate(["value", "locations", "weights"])))
def test_integers_are_refused(wrong, name):
    inputs = [t.detach() for t in draw((2, 3, 3, 4, 5), [(5, 7)])]
    inputs[wrong] = inputs[wrong].long()
    with pytest.raises(ValueError, match=f"{name} must be a float, got torch.int64"):
        sampled(inputs[0], [(5, 7)], *inputs[1:])
