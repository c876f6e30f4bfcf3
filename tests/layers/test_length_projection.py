"""Projections over the length: each kind by its definition in loops, and padding that has no influence."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import LengthProjection
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

seeds, lengths = st.integers(0, 2**31), st.integers(0, 13)
KINDS = ["linear", "mean", "max", "conv"]
LONGEST, RANK, WINDOW = 13, 5, 3
every_kind = pytest.mark.parametrize("kind", KINDS)
by_heads = pytest.mark.parametrize("heads", [1, 2])


def draw(kind: str, heads: int = 1) -> LengthProjection:
    layer = LengthProjection(LONGEST, RANK, heads=heads, kind=kind, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def in_loops(layer: LengthProjection, tokens: Tensor, key_mask: Tensor) -> Tensor:
    """The formula, one column at a time, from the places that take part alone."""
    batch, heads, length, channels = tokens.shape
    columns = RANK if layer.kind == "linear" else math.ceil(length / WINDOW)
    out = tokens.new_zeros(batch, heads, columns, channels)
    for b in range(batch):
        for h in range(heads):
            for c in range(columns):
                window = range(length) if layer.kind == "linear" else range(c * WINDOW, (c + 1) * WINDOW)
                places = [j for j in window if j < length and key_mask[b, j]]
                if not places:
                    continue
                there = tokens[b, h, places]
                if layer.kind == "mean":
                    out[b, h, c] = there.mean(0)
                elif layer.kind == "max":
                    out[b, h, c] = there.max(0).values
                else:
                    own = layer.weight[h if layer.heads > 1 else 0]
                    row = own[c, places] if layer.kind == "linear" else own[[j % WINDOW for j in places]]
                    out[b, h, c] = row @ there
    return out


@every_kind
@by_heads
@given(seed=seeds, length=lengths, masked=st.booleans())
def test_equals_its_definition(kind, heads, seed, length, masked):
    torch.manual_seed(seed)
    layer, tokens = draw(kind, heads), x(3, 2, length, 7)
    key_mask = torch.rand(3, length) < 0.6 if masked else torch.ones(3, length).bool()
    actual = layer(tokens, key_mask=key_mask if masked else None)
    assert actual.shape[2] == layer.columns(length)
    torch.testing.assert_close(actual, in_loops(layer, tokens, key_mask))


@every_kind
@by_heads
@given(seed=seeds, length=lengths, padding=st.integers(0, 13))
def test_padding_has_no_influence(kind, heads, seed, length, padding):
    """A longer input whose end is masked gives the shorter one's columns, and more that do not exist."""
    torch.manual_seed(seed)
    padding = min(padding, LONGEST - length)
    layer, tokens = draw(kind, heads), x(2, 2, length, 7)
    rest = torch.full((2, 2, padding, 7), torch.nan, dtype=torch.float64)
    padded = torch.cat([tokens, rest], 2).requires_grad_()
    key_mask = torch.arange(length + padding).expand(2, -1) < length
    expected, actual = layer(tokens), layer(padded, key_mask=key_mask)
    there = expected.shape[2]
    torch.testing.assert_close(actual[:, :, :there], expected)
    assert (actual[:, :, there:] == 0).all()
    if length:
        assert layer.column_mask(key_mask)[:, :there].all()
    assert not layer.column_mask(key_mask)[:, there:].any()
    (gradient,) = torch.autograd.grad(actual, padded, torch.randn_like(actual))
    assert (gradient[:, :, length:] == 0).all()


@every_kind
def test_a_column_exists_where_a_place_goes_into_it(kind):
    key_mask = torch.tensor([[True] * 3 + [False] * 4, [False] * 5 + [True, False], [False] * 7])
    windows = [[True, False, False], [False, True, False], [False] * 3]
    expected = [[True] * RANK, [True] * RANK, [False] * RANK] if kind == "linear" else windows
    assert draw(kind).column_mask(key_mask).tolist() == expected


@pytest.mark.parametrize("kind", ["linear", "mean", "conv"])
@by_heads
@given(seed=seeds, length=lengths, masked=st.booleans())
def test_its_matrix_is_what_it_does(kind, heads, seed, length, masked):
    torch.manual_seed(seed)
    layer, tokens = draw(kind, heads), x(3, 2, length, 7)
    key_mask = torch.rand(3, length) < 0.6 if masked else None
    matrix = layer.matrix(length, key_mask=key_mask, dtype=torch.float64)
    assert matrix.shape == (3 if masked else 1, layer.heads, layer.columns(length), length)
    torch.testing.assert_close(matrix @ tokens, layer(tokens, key_mask=key_mask))


@every_kind
@by_heads
def test_gradients(kind, heads):
    layer, tokens = draw(kind, heads), x(2, 2, 7, 3).requires_grad_()
    key_mask = torch.tensor([[True] * 4 + [False] * 3, [False] * 3 + [True] * 4])

    def call(tokens, *parameters):
        state = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(layer, state, (tokens,), {"key_mask": key_mask})

    assert gradcheck(call, (tokens, *layer.parameters()))
    assert gradgradcheck(call, (tokens, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_kind
def test_low_precision_stays_near(kind, dtype):
    layer, tokens = draw(kind), x(2, 2, 11, 7).to(dtype)
    key_mask = torch.arange(11) < torch.tensor([[11], [4]])
    exact = layer(tokens.double(), key_mask=key_mask)
    actual = layer.to(dtype)(tokens, key_mask=key_mask)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.double(), exact, rtol=0.02, atol=0.05)


@every_kind
def test_one_column_holds_the_whole_sequence(kind):
    layer = LengthProjection(7, 1, kind=kind)
    assert layer(torch.randn(2, 3, 5, 4)).shape == (2, 3, 1, 4)


def test_heads_have_their_own_and_pools_have_none_to_own():
    assert draw("linear", 2).weight.shape == (2, RANK, LONGEST)
    assert draw("conv", 2).weight.shape == (2, WINDOW)
    assert list(draw("mean", 2).parameters()) == list(draw("max", 2).parameters()) == []
    assert draw("mean", 2).heads == 1


@pytest.mark.parametrize(("kind", "deviation"), [("linear", 50**-0.5), ("conv", 20**-0.5)])
def test_starts_normal(kind, deviation):
    layer = LengthProjection(1000, 50, heads=300 if kind == "conv" else 1, kind=kind)
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert layer.weight.mean().item() == pytest.approx(0, abs=0.05 * deviation)
    assert layer.weight.abs().max() > 3 * deviation  # normal, not uniform


def test_the_authors_initialisation_as_the_docstring_gives_it():
    layer = LengthProjection(300, 50, heads=2)
    for matrix in layer.weight:
        nn.init.xavier_uniform_(matrix, gain=2**-0.5)
    assert layer.weight.std().item() == pytest.approx(350**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((5, 6), {}, "rank must be from 1 to max_length=5, got 6"),
        ((5, 0), {}, "rank must be from 1 to max_length=5, got 0"),
        ((5, 3), {"heads": 0}, "heads must be at least 1, got 0"),
        ((5, 3), {"kind": "median"}, "kind must be one of linear, mean, max, conv, got 'median'"),
    ],
)
def test_bad_sizes_are_named(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        LengthProjection(*sizes, **options)


@pytest.mark.parametrize(
    ("shape", "key_mask", "message"),
    [
        ((2, 3, 5), None, r"x must be \(B, 2, L, D\), got \(2, 3, 5\)"),
        ((2, 3, 5, 7), None, r"x must be \(B, 2, L, D\), got \(2, 3, 5, 7\)"),
        ((3, 2, 14, 7), None, "x must have at most max_length=13 places, got 14"),
        ((3, 2, 5, 7), torch.ones(5).bool(), r"key_mask must be \(B, L\) = \(3, 5\), got \(5,\)"),
        ((3, 2, 5, 7), torch.ones(3, 4).bool(), r"key_mask must broadcast to \(3, 5\), got \(3, 4\)"),
        ((3, 2, 5, 7), torch.ones(3, 5), "key_mask must be boolean"),
    ],
)
def test_bad_inputs_are_named(shape, key_mask, message):
    with pytest.raises(ValueError, match=message):
        draw("linear", 2)(x(*shape), key_mask=key_mask)


def test_a_maximum_has_no_matrix():
    with pytest.raises(ValueError, match='kind "max" has no matrix'):
        draw("max").matrix(7)
