"""Axial attention: line by line, its cost, its limits, and what masks and causality keep."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.blocks import EncoderBlock
from lamina.kernels import use_backend
from lamina.layers import AxialAttention, MultiHeadAttention, RotaryPositions
from lamina.models import create_model
from lamina.viz import capture_attention
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

seeds, sides = st.integers(0, 2**31), st.integers(1, 6)
AXES = [("height", "width"), ("width", "height"), ("height",), ("width",)]
every_axes = pytest.mark.parametrize("axes", AXES, ids="+".join)


def draw(**options) -> AxialAttention:
    """A layer with weights of order one."""
    layer = AxialAttention(8, 2, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def line_by_line(layer: AxialAttention, tokens, grid, key_mask=None, is_causal=False) -> torch.Tensor:
    rows, cols = grid
    out = torch.zeros_like(tokens)
    lines = {
        "height": [[r * cols + c for r in range(rows)] for c in range(cols)],
        "width": [[r * cols + c for c in range(cols)] for r in range(rows)],
    }
    for axis, attention in layer.axes.items():
        for places in lines[axis]:
            keys = None if key_mask is None else key_mask[:, places]
            out[:, places] += attention(tokens[:, places], key_mask=keys, is_causal=is_causal)
    return out


@every_axes
@given(seed=seeds, grid=st.tuples(sides, sides), masked=st.booleans(), is_causal=st.booleans())
def test_is_plain_attention_along_each_line(axes, seed, grid, masked, is_causal):
    torch.manual_seed(seed)
    n = grid[0] * grid[1]
    layer, tokens = draw(axes=axes, rotary=RotaryPositions(4)), x(2, n, 8)
    key_mask = torch.rand(2, n) < 0.6 if masked else None
    expected = line_by_line(layer, tokens, grid, key_mask, is_causal)
    actual = layer(tokens, grid=grid, key_mask=key_mask, is_causal=is_causal)
    torch.testing.assert_close(actual, expected)


@every_axes
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_output_is_the_weights_times_the_values(masked, is_causal, backend, axes):
    layer, tokens, grid = draw(axes=axes), x(3, 35, 8).requires_grad_(), (5, 7)
    given = {"key_mask": torch.rand(3, 35) < 0.6 if masked else None, "is_causal": is_causal}
    weights = layer.weights(tokens, grid=grid, **given)
    assert weights.shape == (3, 2 * len(axes), 35, 35)
    expected = 0
    for part, attention in zip(weights.split(2, 1), layer.axes.values(), strict=True):
        values = attention.value(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
        expected = expected + attention.out((part @ values).transpose(1, 2).flatten(2))
    with use_backend(backend):
        actual = layer(tokens, grid=grid, **given)
    torch.testing.assert_close(actual, expected)
    of, cotangent = [tokens, *layer.parameters()], torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, of, cotangent), torch.autograd.grad(expected, of, cotangent)
    )


@given(seed=seeds, length=sides, is_causal=st.booleans())
def test_one_line_is_plain_attention(seed, length, is_causal):
    torch.manual_seed(seed)
    tokens, rotary = x(2, length, 8), RotaryPositions(4)
    plain = MultiHeadAttention(8, 2, rotary=rotary, dtype=torch.float64)
    for axis, grid in ("width", (1, length)), ("height", (length, 1)):
        layer = draw(axes=[axis], rotary=rotary)
        plain.load_state_dict(layer.axes[axis].state_dict())
        torch.testing.assert_close(
            layer(tokens, grid=grid, is_causal=is_causal), plain(tokens, is_causal=is_causal)
        )
        torch.testing.assert_close(layer.weights(tokens, grid=grid), plain.weights(tokens))


@given(seed=seeds, grid=st.tuples(sides, sides))
def test_the_axes_of_a_turned_grid_change_places(seed, grid):
    torch.manual_seed(seed)
    layer, tokens, turned = draw(), x(2, grid[0] * grid[1], 8), draw()
    for axis, other in ("height", "width"), ("width", "height"):
        turned.axes[axis].load_state_dict(layer.axes[other].state_dict())
    swap = lambda t, grid: t.unflatten(1, grid).transpose(1, 2).flatten(1, 2)  # noqa: E731
    actual = turned(swap(tokens, grid), grid=grid[::-1])
    torch.testing.assert_close(actual, swap(layer(tokens, grid=grid), grid))


@every_axes
@given(seed=seeds, grid=st.tuples(sides, sides))
def test_what_is_masked_has_no_influence(axes, seed, grid):
    torch.manual_seed(seed)
    n = grid[0] * grid[1]
    layer, tokens, key_mask = draw(axes=axes), x(2, n, 8), torch.rand(2, n) < 0.5
    other = torch.where(key_mask[..., None], tokens, 1e3).requires_grad_()
    out, changed = (layer(t, grid=grid, key_mask=key_mask)[key_mask] for t in (tokens, other))
    torch.testing.assert_close(changed, out)
    (grad,) = torch.autograd.grad(changed, other, torch.randn_like(changed))
    assert (grad[~key_mask] == 0).all()
    assert grad.isfinite().all()


def test_a_token_without_keys_on_its_line_gives_the_biases_of_the_outputs():
    layer, tokens = draw(), x(1, 12, 8).requires_grad_()
    key_mask = torch.ones(3, 4, dtype=torch.bool)
    key_mask[1] = key_mask[:, 2] = False
    out = layer(tokens, grid=(3, 4), key_mask=key_mask.flatten()[None]).unflatten(1, (3, 4))
    torch.testing.assert_close(out[0, 1, 2], layer.axes["height"].out.bias + layer.axes["width"].out.bias)
    (grad,) = torch.autograd.grad(out[0, 1, 2], tokens, x(8))
    assert (grad == 0).all()


@given(seed=seeds, grid=st.tuples(sides, sides), at=st.integers(0, 35))
def test_causal_is_causal_row_by_row(seed, grid, at):
    torch.manual_seed(seed)
    n = grid[0] * grid[1]
    at %= n
    layer, tokens = draw(), x(1, n, 8).requires_grad_()
    out = layer(layer(tokens, grid=grid, is_causal=True), grid=grid, is_causal=True)
    (grad,) = torch.autograd.grad(out[:, at], tokens, x(1, 8))
    assert (grad[:, at + 1 :] == 0).all()
    reached = (grad[0] != 0).any(-1).unflatten(0, grid)
    r, c = at // grid[1], at % grid[1]
    assert reached[: r + 1, : c + 1].all()  # all above and to the left, and as documented no more
    assert reached.sum() == (r + 1) * (c + 1)


def test_one_layer_sees_two_lines_and_two_layers_see_all():
    layer, tokens = draw(), x(1, 35, 8).requires_grad_()
    once = layer(tokens, grid=(5, 7))
    (grad,) = torch.autograd.grad(once[:, 3 * 7 + 2], tokens, x(1, 8), retain_graph=True)
    reached = (grad[0] != 0).any(-1).view(5, 7)
    assert reached[3].all()
    assert reached[:, 2].all()
    assert reached.sum() == 5 + 7 - 1
    (grad,) = torch.autograd.grad(layer(once, grid=(5, 7))[:, 3 * 7 + 2], tokens, x(1, 8))
    assert (grad[0] != 0).any(-1).all()


def test_rows_of_a_batch_do_not_meet():
    layer, tokens = draw(), x(3, 35, 8)
    torch.testing.assert_close(layer(tokens, grid=(5, 7))[1:2], layer(tokens[1:2], grid=(5, 7)))


@pytest.mark.parametrize("axes", AXES[:2], ids="+".join)
def test_derivatives(axes):
    layer = AxialAttention(4, 2, axes=axes, dtype=torch.float64)
    key_mask = torch.tensor([[True, False, True, False, False, True]])

    def call(tokens):
        return layer(tokens, grid=(2, 3), key_mask=key_mask)

    tokens = x(1, 6, 4).requires_grad_()
    assert gradcheck(call, tokens)
    assert gradgradcheck(call, tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(dtype):
    layer, tokens, key_mask = draw(), x(2, 35, 8), torch.rand(2, 35) < 0.5
    expected = layer(tokens, grid=(5, 7), key_mask=key_mask)
    out = layer.to(dtype)(tokens.to(dtype), grid=(5, 7), key_mask=key_mask)
    assert out.dtype is dtype
    assert (out.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("grid", [(0, 0), (0, 3), (2, 0)])
def test_an_empty_grid_gives_nothing(grid):
    layer = draw()
    assert layer(x(3, 0, 8), grid=grid).shape == (3, 0, 8)
    assert layer.weights(x(3, 0, 8), grid=grid).shape == (3, 4, 0, 0)
    assert layer(x(0, 9, 8)).shape == (0, 9, 8)


def test_dropout_is_of_the_weights_and_in_training_only():
    layer, tokens = draw(dropout=0.5), x(2, 16, 8)
    assert not torch.equal(layer(tokens), layer(tokens))
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))


def test_the_grid_is_that_of_the_call_then_the_layer_s_then_a_square():
    layer, tokens, square = draw(grid=(2, 8)), x(1, 16, 8), draw()
    square.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(tokens), square(tokens, grid=(2, 8)))
    torch.testing.assert_close(square(tokens), layer(tokens, grid=(4, 4)))
    assert not torch.allclose(layer(tokens), square(tokens))


def test_by_default_it_has_eight_heads_along_both_axes():
    assert AxialAttention(16).weights(torch.randn(1, 6, 16), grid=(2, 3)).shape == (1, 2 * 8, 6, 6)


def test_its_weights_are_captured_once_for_the_whole_grid():
    layer, tokens = draw(), x(2, 9, 8)
    with capture_attention(layer) as record:
        layer(tokens)
    assert list(record) == [""]
    assert torch.equal(record[""][0], layer.weights(tokens))


def test_stands_in_a_block_and_in_a_model():
    block = EncoderBlock(16, 2, attention=partial(AxialAttention, axes=["width"], grid=(4, 16)))
    assert block(torch.randn(3, 64, 16), is_causal=True).shape == (3, 64, 16)
    model = create_model("vit_digits", pool="mean", attention="AxialAttention")
    assert model(*model.example_inputs(2)).shape == (2, 10)


@pytest.mark.parametrize("axes", [(), "height", ("depth",), ("width", "width"), ("height", "depth")])
def test_bad_axes_are_named(axes):
    with pytest.raises(ValueError, match=r"axes must be some of \('height', 'width'\), each once, got"):
        AxialAttention(8, 2, axes=axes)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((2, 10, 8), {}, "grid must be given where the tokens are not a square, got 10 tokens"),
        ((2, 10, 8), {"grid": (3, 4)}, r"grid must have a cell for each token, got grid=\(3, 4\)"),
        ((2, 9, 7), {}, r"query must be \(B, rows \* columns, 8\), got \(2, 9, 7\)"),
        ((2, 9, 8), {"key_mask": torch.ones(9).bool()}, r"key_mask must be \(B, N\) = \(2, 9\), got \(9,\)"),
        ((2, 9, 8), {"key_mask": torch.ones(2, 9)}, "key_mask must be boolean"),
    ],
)
def test_bad_inputs_are_named(shape, given, message):
    layer = draw()
    for call in layer, layer.weights:
        with pytest.raises(ValueError, match=message):
            call(x(*shape), **given)
    with pytest.raises(ValueError, match="num_heads must divide dim, got dim=8 and num_heads=3"):
        AxialAttention(8, 3)


def test_what_it_cannot_honour_is_not_in_its_signature():
    for name in "mask", "bias", "key":
        with pytest.raises(TypeError, match=name):
            draw()(x(1, 9, 8), **{name: None})
