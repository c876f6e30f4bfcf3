"""Deformable attention: its formula in a loop, transformers with the same weights, and what padding keeps."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import deformable_sampling, use_backend
from lamina.layers import DeformableAttention
from torch import Tensor, nn
from torch.autograd import gradcheck

seeds, sizes = st.integers(0, 2**31), st.integers(1, 6)
SHAPES = [(5, 3), (2, 7)]
LENGTH = 29
KINDS = {
    "points": (2, False),
    "points of levels": (2, True),
    "boxes": (4, False),
    "boxes of levels": (4, True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(**options) -> DeformableAttention:
    """A layer with weights of order one and offsets of some cells."""
    options = {"num_levels": 2, "num_points": 3} | options
    layer = DeformableAttention(8, 4, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def references(kind: str, batch: int = 2, queries: int = 5, levels: int = 2) -> Tensor:
    coordinates, each = KINDS[kind]
    shape = (batch, queries, levels, coordinates) if each else (batch, queries, coordinates)
    return torch.rand(shape, dtype=torch.float64)


def by_loop(layer, query, reference_points, value, shapes, key_mask=None) -> Tensor:
    """The equation, a sample at a time."""
    batch, queries, _ = query.shape
    heads, levels, points = layer.num_heads, layer.num_levels, layer.num_points
    offsets = F.linear(query, layer.offsets.weight, layer.offsets.bias).view(
        batch, queries, heads, levels, points, 2
    )
    weights = F.linear(query, layer.scores.weight, layer.scores.bias).view(batch, queries, heads, -1)
    weights = weights.softmax(-1).view(batch, queries, heads, levels, points)
    values = F.linear(value, layer.value.weight, layer.value.bias)
    if key_mask is not None:
        values = values * key_mask.unsqueeze(-1)
    values = values.view(batch, value.shape[1], heads, -1)
    out = torch.zeros(batch, queries, heads, values.shape[-1], dtype=query.dtype)
    for b, q, h, s, p in itertools.product(*map(range, weights.shape)):
        height, width = shapes[s]
        start = sum(rows * columns for rows, columns in shapes[:s])
        reference = reference_points[b, q] if reference_points.ndim == 3 else reference_points[b, q, s]
        dx, dy = offsets[b, q, h, s, p]
        if len(reference) == 2:
            px, py = reference[0] * width + dx, reference[1] * height + dy
        else:
            px = (reference[0] + dx / points * reference[2] / 2) * width
            py = (reference[1] + dy / points * reference[3] / 2) * height
        for row, column in itertools.product(range(height), range(width)):
            share = (1 - (px - column - 0.5).abs()).clamp(0) * (1 - (py - row - 0.5).abs()).clamp(0)
            out[b, q, h] = (
                out[b, q, h] + weights[b, q, h, s, p] * share * values[b, start + row * width + column, h]
            )
    return F.linear(out.flatten(2), layer.out.weight, layer.out.bias)


@every_kind
def test_is_the_formula(kind):
    layer, query, value = draw(value_dim=11), x(2, 5, 8), x(2, LENGTH, 11)
    at, key_mask = references(kind), torch.rand(2, LENGTH) < 0.7
    with torch.no_grad():
        expected = by_loop(layer, query, at, value, SHAPES, key_mask)
    torch.testing.assert_close(layer(query, at, value, SHAPES, key_mask=key_mask), expected)


@every_kind
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_transformers_in_values_and_gradients(kind, backend):
    peer = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = peer.DeformableDetrConfig(d_model=8, num_feature_levels=2)
    theirs = peer.DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=3).double()
    ours = draw()
    names = {"sampling_offsets": "offsets", "attention_weights": "scores"}
    names |= {"value_proj": "value", "output_proj": "out"}
    theirs.load_state_dict(
        {
            f"{their}.{p}": getattr(getattr(ours, our), p)
            for their, our in names.items()
            for p in ("weight", "bias")
        }
    )
    inputs = [x(2, 5, 8), references(kind), x(2, LENGTH, 8)]
    inputs = [t.requires_grad_() for t in inputs]
    query, at, value = inputs
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [20]])
    expected, weights = theirs(
        query,
        encoder_hidden_states=value,
        encoder_attention_mask=None,
        attention_mask=mask,
        reference_points=at if at.ndim == 4 else at[:, :, None].expand(-1, -1, 2, -1),
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=SHAPES,
    )
    with use_backend(backend):
        actual = ours(query, at, value, SHAPES, key_mask=mask)
        cotangent = torch.randn_like(actual)
        of = [
            *inputs,
            *(getattr(getattr(ours, our), p) for our in names.values() for p in ("weight", "bias")),
        ]
        found = torch.autograd.grad(actual, of, cotangent)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours.sampling(query, at, SHAPES)[1], weights)
    of = [*inputs, *(getattr(getattr(theirs, their), p) for their in names for p in ("weight", "bias"))]
    torch.testing.assert_close(found, torch.autograd.grad(expected, of, cotangent))


@every_kind
def test_output_is_the_weights_times_the_values(kind):
    layer, query, value, at = draw(), x(2, 5, 8), x(2, LENGTH, 8), references(kind)
    key_mask = torch.rand(2, LENGTH) < 0.7
    weights = layer.weights(query, at, SHAPES, key_mask=key_mask)
    assert weights.shape == (2, 4, 5, LENGTH)
    values = layer.value(value).unflatten(-1, (4, 2)).transpose(1, 2)
    expected = layer.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(query, at, value, SHAPES, key_mask=key_mask), expected)


def test_weights_sum_to_one_where_all_lies_inside():
    layer = DeformableAttention(8, 4, num_levels=1, num_points=3, dtype=torch.float64)
    weights = layer.weights(x(1, 2, 8), torch.full((1, 2, 2), 0.5).double(), [(9, 11)])
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 2).double())


@given(seed=seeds, height=sizes, width=sizes, queries=sizes)
def test_without_offsets_the_centre_of_a_cell_gives_its_value(seed, height, width, queries):
    torch.manual_seed(seed)
    layer = draw(num_levels=1)
    nn.init.zeros_(layer.offsets.weight)
    nn.init.zeros_(layer.offsets.bias)
    value, cells = x(2, height * width, 8), torch.randint(height * width, (2, queries))
    at = torch.stack([(cells % width + 0.5).double() / width, (cells // width + 0.5).double() / height], -1)
    expected = layer.out(layer.value(value.gather(1, cells.unsqueeze(-1).expand(-1, -1, 8))))
    torch.testing.assert_close(layer(x(2, queries, 8), at, value, [(height, width)]), expected)


def test_starts_as_in_the_paper():
    layer = DeformableAttention(64, 8, num_levels=2, num_points=4)
    query, at, shapes = torch.randn(2, 3, 64), torch.rand(2, 3, 2), [(11, 13), (5, 7)]
    locations, weights = layer.sampling(query, at, shapes)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 8))
    eight = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    for (height, width), level in zip(shapes, locations.unbind(3), strict=True):
        steps = (level - at[:, :, None, None]) * torch.tensor([width, height])
        for point in range(4):
            torch.testing.assert_close(
                steps[:, :, :, point], (eight * (point + 1.0)).expand(2, 3, -1, -1), atol=1e-5, rtol=0
            )
    bound = math.sqrt(6 / 128)
    for projection in layer.value, layer.out:
        assert projection.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert projection.weight.abs().max() <= bound
        assert (projection.bias == 0).all()


def test_directions_are_of_length_one_by_their_larger_coordinate():
    bias = DeformableAttention(6, 3, num_levels=1, num_points=2).offsets.bias.view(3, 2, 2)
    angles = [0, 2 * math.pi / 3, 4 * math.pi / 3]
    for direction, angle in zip(bias, angles, strict=True):
        exact = torch.tensor([math.cos(angle), math.sin(angle)])
        torch.testing.assert_close(direction[0], exact / exact.abs().max())
        torch.testing.assert_close(direction[1], 2 * direction[0])


def test_the_first_points_of_a_box_reach_to_its_border():
    """P points: the last of them lies on the border of the box, whatever the shape of the level."""
    layer = DeformableAttention(16, 8, num_levels=2, num_points=4)
    box = torch.tensor([0.5, 0.4, 0.2, 0.6]).expand(1, 3, 4)
    locations, _ = layer.sampling(torch.randn(1, 3, 16), box, [(11, 13), (5, 7)])
    last = locations[0, 0, :, :, -1]
    for level in last.unbind(1):
        torch.testing.assert_close(level[0], torch.tensor([0.6, 0.4]))
        torch.testing.assert_close(level[1], torch.tensor([0.6, 0.7]))
        torch.testing.assert_close(level[5], torch.tensor([0.4, 0.1]))


@given(seed=seeds, queries=sizes)
def test_what_is_masked_has_no_influence(seed, queries):
    torch.manual_seed(seed)
    layer, query, at = draw(), x(2, queries, 8), references("points", queries=queries)
    key_mask = torch.rand(2, LENGTH) < 0.6
    value = x(2, LENGTH, 8)
    other = torch.where(key_mask.unsqueeze(-1), value, 1e3 * x(2, LENGTH, 8)).requires_grad_()
    out = layer(query, at, other, SHAPES, key_mask=key_mask)
    torch.testing.assert_close(out, layer(query, at, value, SHAPES, key_mask=key_mask))
    (found,) = torch.autograd.grad(out, other, torch.randn_like(out))
    assert (found[~key_mask] == 0).all()


def test_padding_is_zero_after_the_projection_and_keeps_its_attention():
    """Half of a level is padding: the other half is not weighed more for it, and the projection's bias is not
    sampled from the padding."""
    layer, query, at, value = draw(num_levels=1), x(1, 3, 8), references("points", 1, 3), x(1, 15, 8)
    key_mask = torch.arange(15)[None] < 9
    locations, weights = layer.sampling(query, at, [(5, 3)])
    values = layer.value(value).masked_fill(~key_mask[..., None], 0).view(1, 15, 4, 2)
    expected = layer.out(deformable_sampling(values, [(5, 3)], locations, weights).flatten(2))
    torch.testing.assert_close(layer(query, at, value, [(5, 3)], key_mask=key_mask), expected)


@pytest.mark.parametrize("how", ["all padding", "outside"])
def test_a_query_that_sees_nothing_gives_the_bias_of_the_output(how):
    layer, query, value = draw(), x(2, 3, 8), x(2, LENGTH, 8).requires_grad_()
    at = references("points", queries=3) + (50 if how == "outside" else 0)
    key_mask = torch.zeros(2, LENGTH, dtype=torch.bool) if how == "all padding" else None
    out = layer(query, at, value, SHAPES, key_mask=key_mask)
    torch.testing.assert_close(out, layer.out.bias.expand(2, 3, 8))
    (found,) = torch.autograd.grad(out, value, torch.randn_like(out))
    assert (found == 0).all()


@given(seed=seeds, length=sizes)
def test_queries_and_rows_do_not_meet(seed, length):
    torch.manual_seed(seed)
    layer, at, value = draw(), references("points", 3, length + 1), x(3, LENGTH, 8)
    query = x(3, length + 1, 8).requires_grad_()
    out = layer(query, at, value, SHAPES)
    (found,) = torch.autograd.grad(out[1, length], query, x(8))
    found[1, length] = 0
    assert (found == 0).all()
    order = torch.randperm(length + 1)
    torch.testing.assert_close(layer(query[:, order], at[:, order], value, SHAPES), out[:, order])


@given(seed=seeds)
def test_a_point_for_all_levels_is_that_point_in_each(seed):
    torch.manual_seed(seed)
    layer, query, value = draw(), x(2, 5, 8), x(2, LENGTH, 8)
    for kind in "points", "boxes":
        at = references(kind)
        each = at[:, :, None].expand(-1, -1, 2, -1)
        torch.testing.assert_close(layer(query, at, value, SHAPES), layer(query, each, value, SHAPES))


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_gradients(kind):
    layer = draw(num_points=2)
    inputs = [x(1, 2, 8), references(kind, 1, 2), x(1, LENGTH, 8)]
    assert gradcheck(lambda *given: layer(*given, SHAPES), [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("how", ["autocast", "half module"])
def test_locations_stay_in_float32(how):
    """On a level of 1000 columns half precision would confuse neighbours: each query reads its own cell."""
    layer = DeformableAttention(8, 1, num_levels=1, num_points=1)
    nn.init.zeros_(layer.offsets.bias)
    for projection in layer.value, layer.out:
        nn.init.eye_(projection.weight)
    columns = torch.arange(0, 1000, 7)
    at = torch.stack([(columns + 0.5) / 1000, torch.full(columns.shape, 0.5)], -1)[None]
    value = (torch.arange(1000) % 2 * 2 - 1.0).view(1, 1000, 1).repeat(1, 1, 8)
    query = torch.randn(1, len(columns), 8)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out, (locations, weights) = (
                layer(query, at, value, [(1, 1000)]),
                layer.sampling(query, at, [(1, 1000)]),
            )
    else:
        layer, query, value = layer.bfloat16(), query.bfloat16(), value.bfloat16()
        out, (locations, weights) = (
            layer(query, at, value, [(1, 1000)]),
            layer.sampling(query, at, [(1, 1000)]),
        )
    assert (out.dtype, locations.dtype, weights.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(out.float(), value[:, columns].float(), atol=0.01, rtol=0)
    assert layer.sampling(query, at.to(query.dtype), [(1, 1000)])[0].dtype is torch.float32


def test_no_query_gives_no_output():
    assert draw()(x(2, 0, 8), references("points", queries=0), x(2, LENGTH, 8), SHAPES).shape == (2, 0, 8)


def test_size_in_the_paper():
    """256 channels, 8 heads, 4 levels of 4 points: 8 x 4 x 4 x 3 numbers of a query, and two projections."""
    layer = DeformableAttention()
    assert sum(p.numel() for p in layer.parameters()) == 257 * 384 + 2 * 257 * 256
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if p.ndim == 2} == {
        "offsets.weight": (256, 256),
        "scores.weight": (128, 256),
        "value.weight": (256, 256),
        "out.weight": (256, 256),
    }
    without = DeformableAttention(8, 2, bias=False)
    assert without.value.bias is without.out.bias is None
    assert without.offsets.bias is not None  # the ring of points


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((8, 3), {}, "num_heads must divide dim, got dim=8 and num_heads=3"),
        ((8, 0), {}, "num_heads must be at least 1, got 0"),
        ((8, 2), {"num_levels": 0}, "num_levels must be at least 1, got 0"),
        ((8, 2), {"num_points": 0}, "num_points must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        DeformableAttention(*sizes, **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": x(2, 5, 7)}, r"query must be \(B, Lq, 8\), got \(2, 5, 7\)"),
        ({"reference_points": x(2, 5, 3)}, r"reference_points must be .* got \(2, 5, 3\)"),
        ({"reference_points": x(2, 4, 2)}, r"reference_points must be .* got \(2, 4, 2\)"),
        ({"reference_points": x(2, 5, 3, 2)}, r"\(B, Lq, S\) = \(2, 5, 2\), got \(2, 5, 3, 2\)"),
        ({"reference_points": x(2)}, r"reference_points must be .* got \(2,\)"),
        ({"value": x(2, 30, 8)}, r"value must hold the cells of all levels: 29 for .*, got 30"),
        ({"spatial_shapes": [(5, 3)]}, "spatial_shapes must have num_levels=2 entries, got 1"),
        ({"spatial_shapes": torch.tensor(SHAPES)}, "spatial_shapes must be .* as plain integers"),
        ({"key_mask": torch.ones(2, LENGTH)}, "key_mask must be boolean"),
        ({"key_mask": torch.ones(LENGTH).bool()}, r"key_mask must be \(B, Lk\) = \(2, 29\), got \(29,\)"),
        ({"key_mask": torch.ones(2, 7).bool()}, r"key_mask must broadcast to \(2, 29\), got \(2, 7\)"),
    ],
)
def test_bad_inputs_are_named(changed, message):
    good = {"query": x(2, 5, 8), "reference_points": references("points"), "value": x(2, LENGTH, 8)}
    with pytest.raises(ValueError, match=message):
        draw()(**good | {"spatial_shapes": SHAPES} | changed)


def test_what_it_cannot_honour_is_not_in_its_signature():
    inputs = x(2, 5, 8), references("points"), x(2, LENGTH, 8), SHAPES
    for argument in "mask", "bias", "is_causal":
        with pytest.raises(TypeError, match=argument):
            draw()(*inputs, **{argument: None})
