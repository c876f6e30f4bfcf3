"""Axial positions: place by place, the packages' layers with the same weights, counts and dropout."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lamina.layers import AxialPositions
from torch.autograd import gradcheck

seeds = st.integers(0, 2**31)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@st.composite
def layers(draw):
    shape = draw(shapes)
    dims = draw(st.none() | st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    return AxialPositions(shape, 7 if dims is None else sum(dims), dims=dims, dtype=torch.float64)


@given(seed=seeds, layer=layers(), length=st.integers(0, 625))
def test_adds_the_vectors_of_each_place_s_coordinates(seed, layer, length):
    torch.manual_seed(seed)
    length %= layer.max_length + 1
    x = torch.randn(2, length, layer.dim, dtype=torch.float64)
    added = layer(x) - x
    for place in range(length):
        rest, coordinates = place, []
        for side in reversed(layer.shape):
            coordinates.insert(0, rest % side)
            rest //= side
        vectors = [w[i] for w, i in zip(layer.weights, coordinates, strict=True)]
        expected = torch.stack(vectors).sum(0) if layer.dims is None else torch.cat(vectors)
        torch.testing.assert_close(added[:, place], expected.expand(2, -1))
    torch.testing.assert_close(added, layer.table()[:length].expand(2, -1, -1))


@given(seed=seeds, layer=layers(), length=st.integers(0, 625), offset=st.integers(0, 625))
def test_an_offset_is_the_place_of_the_first_token(seed, layer, length, offset):
    torch.manual_seed(seed)
    offset %= layer.max_length + 1
    length %= layer.max_length - offset + 1
    x = torch.randn(2, offset + length, layer.dim, dtype=torch.float64)
    torch.testing.assert_close(layer(x[:, offset:], offset=offset), layer(x)[:, offset:])
    layer.dropout = 0.5
    outputs = []
    for tokens, first in (x[:, offset:], offset), (x, 0):
        torch.manual_seed(seed)
        outputs.append(layer(tokens, offset=first))
    torch.testing.assert_close(outputs[0], outputs[1][:, offset:])


@pytest.mark.parametrize("length", [60, 43, 1])
@pytest.mark.parametrize("dims", [None, (3, 5, 2)])
def test_equals_axial_positional_embedding(dims, length):
    package = pytest.importorskip("axial_positional_embedding")
    theirs = package.AxialPositionalEmbedding(10, (3, 5, 4), dims)
    ours = AxialPositions((3, 5, 4), 10, dims=dims)
    ours.load_state_dict({f"weights.{i}": w.flatten(0, -2) for i, w in enumerate(theirs.weights)})
    x = torch.randn(2, length, 10)
    actual, expected = ours(x), x + theirs(x)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(x)
    for mine, other in zip(
        torch.autograd.grad(actual, list(ours.weights), cotangent),
        torch.autograd.grad(expected, list(theirs.weights), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, other.view_as(mine))


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_reformer_of_transformers(training):
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    config = reformer.ReformerConfig(
        axial_pos_shape=(5, 7), axial_pos_embds_dim=(3, 8), hidden_size=11, hidden_dropout_prob=0.0
    )
    theirs = reformer.AxialPositionEmbeddings(config).train(training)
    for weight in theirs.weights:
        torch.nn.init.normal_(weight)
    ours = AxialPositions((5, 7), 11, dims=(3, 8)).train(training)
    ours.load_state_dict({f"weights.{i}": w.flatten(0, -2) for i, w in enumerate(theirs.weights)})
    for length in [35] if training else [35, 23, 6]:
        x = torch.randn(2, length, 11)
        actual, expected = ours(x), x + theirs(torch.arange(length).expand(2, -1))
        torch.testing.assert_close(actual, expected)
        cotangent = torch.randn_like(x)
        for mine, other in zip(
            torch.autograd.grad(actual, list(ours.weights), cotangent),
            torch.autograd.grad(expected, list(theirs.weights), cotangent),
            strict=True,
        ):
            torch.testing.assert_close(mine, other.view_as(mine))


@pytest.mark.parametrize(
    ("shape", "dims", "count"),
    [
        ((128, 512), (256, 768), 128 * 256 + 512 * 768),  # enwik8, d_model 1024: 425,984
        ((128, 512), (256, 512), 128 * 256 + 512 * 512),  # its open configuration, d_model 768
        ((64, 64, 3), (384, 384, 256), 2 * 64 * 384 + 3 * 256),  # imagenet64
    ],
)
def test_has_the_reformer_s_parameters(shape, dims, count):
    layer = AxialPositions(shape, sum(dims), dims=dims, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == count
    assert layer.max_length == math.prod(shape)


@given(seed=seeds, layer=layers())
def test_dropout_drops_a_coordinate_s_vector_wherever_it_occurs(seed, layer):
    torch.manual_seed(seed)
    assume(layer.dims is not None)
    layer.dropout = 0.5
    x = torch.zeros(3, layer.max_length, layer.dim, dtype=torch.float64)
    added = layer(x).unflatten(1, layer.shape)
    for axis, (part, weight) in enumerate(zip(added.split(layer.dims, -1), layer.weights, strict=True)):
        # One coordinate at a time: all places that share it have its vector twice over, or nothing.
        for i, vector in enumerate(weight):
            here = part.select(axis + 1, i).unsqueeze(1).flatten(1, -2)
            for row in here:
                assert torch.equal(row, (2 * vector).expand_as(row)) or (row == 0).all()


def test_dropout_is_fresh_for_each_sequence_keeps_the_mean_and_stops_in_evaluation():
    layer, x = AxialPositions((11, 13), 2, dims=(1, 1), dropout=0.25), torch.zeros(3000, 143, 2)
    added = layer(x)
    assert not torch.equal(added[0], added[1])
    kept = (added.unflatten(1, (11, 13))[:, :, 0, 0] != 0).float().mean().item()
    assert kept == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(added.mean(0), layer.table(), rtol=0.1, atol=0.02)
    layer.eval()
    assert torch.equal(layer(x)[0], layer.table())
    summed = AxialPositions((2, 3), 4, dropout=0.5)
    assert not torch.equal(summed(torch.zeros(8, 6, 4))[0], summed(torch.zeros(8, 6, 4))[0])


def test_dropped_vectors_get_no_gradient():
    layer = AxialPositions((50,), 1, dims=(1,), dropout=0.5)
    out = layer(torch.zeros(1, 50, 1))
    (grad,) = torch.autograd.grad(out, list(layer.weights), torch.ones_like(out))
    assert torch.equal(grad[:, 0], torch.where(out[0, :, 0] != 0, 2.0, 0.0))


@pytest.mark.parametrize("dims", [None, (2, 3)])
def test_derivatives(dims):
    layer = AxialPositions((3, 2), 5, dims=dims, dtype=torch.float64)
    x = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)

    def call(x, *weights):
        return torch.func.functional_call(layer, {f"weights.{i}": w for i, w in enumerate(weights)}, x)

    assert gradcheck(call, (x, *(w.detach().requires_grad_() for w in layer.weights)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer = AxialPositions((3, 5), 4, dims=(1, 3), dropout=0.5, dtype=dtype)
    assert layer(torch.randn(2, 14, 4, dtype=dtype)).dtype is dtype
    layer.eval()
    x = torch.randn(2, 14, 4, dtype=dtype)
    assert torch.equal(layer(x), x + layer.table(14))


def test_starts_normal():
    layer = AxialPositions((100, 100), 64)
    for weight in layer.weights:
        assert weight.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((), {}, r"shape must be sides of a grid, each at least 1, got \(\)"),
        ((3, 0), {}, r"shape must be sides of a grid, each at least 1, got \(3, 0\)"),
        ((3, 4), {"dims": (5,)}, r"dims must be 2 numbers of channels that sum to dim=5, got \(5,\)"),
        ((3, 4), {"dims": (2, 2)}, r"dims must be 2 numbers of channels that sum to dim=5, got \(2, 2\)"),
        ((3, 4), {"dims": (5, 0)}, r"dims must be 2 numbers of channels that sum to dim=5, got \(5, 0\)"),
        ((3, 4), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes_are_named(shape, options, message):
    with pytest.raises(ValueError, match=message):
        AxialPositions(shape, 5, **options)


@pytest.mark.parametrize("training", [True, False])
def test_bad_inputs_are_named(training):
    layer = AxialPositions((3, 4), 5, dropout=0.5).train(training)
    with pytest.raises(ValueError, match=r"x must be \(B, L, 5\), got \(2, 3, 4\)"):
        layer(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"x must be \(B, L, 5\), got \(3, 5\)"):
        layer(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"at most 12 places, the product of shape=\(3, 4\), got 13"):
        layer(torch.randn(2, 13, 5))
    with pytest.raises(ValueError, match=r"at most 12 places, the product of shape=\(3, 4\), got 13"):
        layer(torch.randn(2, 1, 5), offset=12)
    with pytest.raises(ValueError, match="offset must be at least 0, got offset=-1"):
        layer(torch.randn(2, 1, 5), offset=-1)
