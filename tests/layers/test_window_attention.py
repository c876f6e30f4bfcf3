"""Window attention: each window by itself, Swin with the same weights, and what masks and edges keep."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.blocks import EncoderBlock
from lamina.kernels import use_backend
from lamina.layers import MultiHeadAttention, WindowAttention
from lamina.layers import _windows as module
from lamina.models import create_model
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

seeds, sides = st.integers(0, 2**31), st.integers(1, 6)
windows = st.tuples(st.integers(1, 4), st.integers(1, 4))
every_path = pytest.mark.parametrize("backend", [None, "reference", "torch"])


def draw(window=3, shift=0, **options) -> WindowAttention:
    """A layer with weights of order one."""
    layer = WindowAttention(8, 2, window=window, shift=shift, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def spans(length: int, side: int, by: int) -> list[range]:
    """The windows along one axis, found by walking it."""
    if length <= side:
        return [range(length)]
    starts = range(by - side, length, side)
    cut = [range(max(start, 0), min(start + side, length)) for start in starts]
    return [span for span in cut if len(span)]


def window_by_window(layer: WindowAttention, tokens: torch.Tensor, grid, key_mask=None) -> torch.Tensor:
    """Plain attention on the tokens of each window alone, with a bias looked up pair by pair."""
    plain = MultiHeadAttention(8, 2, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "relative" not in k})
    out = torch.zeros_like(tokens)
    table = None if layer.relative_bias is None else layer.relative_bias.weight
    for rows in spans(grid[0], layer.window[0], layer.shift[0]):
        for cols in spans(grid[1], layer.window[1], layer.shift[1]):
            cells = [(r, c) for r in rows for c in cols]
            places = [r * grid[1] + c for r, c in cells]
            bias = torch.zeros(2, len(cells), len(cells), dtype=torch.float64)
            for i, (r, c) in enumerate(cells):
                for j, (s, d) in enumerate(cells):
                    row = (
                        (r - s + layer.window[0] - 1) * (2 * layer.window[1] - 1)
                        + c
                        - d
                        + layer.window[1]
                        - 1
                    )
                    bias[:, i, j] = 0 if table is None else table[row]
            keys = None if key_mask is None else key_mask[:, places]
            out[:, places] = plain(tokens[:, places], bias=bias, key_mask=keys)
    return out


@given(seed=seeds, grid=st.tuples(sides, sides), window=windows, data=st.data(), masked=st.booleans())
def test_is_plain_attention_in_each_window(seed, grid, window, data, masked):
    torch.manual_seed(seed)
    shift = data.draw(st.tuples(*(st.integers(0, side - 1) for side in window)))
    layer, tokens = draw(window, shift, relative_bias=data.draw(st.booleans())), x(2, grid[0] * grid[1], 8)
    key_mask = torch.rand(2, grid[0] * grid[1]) < 0.6 if masked else None
    expected = window_by_window(layer, tokens, grid, key_mask)
    torch.testing.assert_close(layer(tokens, grid=grid, key_mask=key_mask), expected)


@every_path
@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("grid", "shift"), [((4, 6), 0), ((5, 7), 0), ((4, 6), 1), ((5, 7), (1, 0)), ((1, 2), 1)]
)
def test_output_is_the_weights_times_the_values(grid, shift, masked, relative_bias, backend):
    layer, tokens = (
        draw((2, 3), shift, relative_bias=relative_bias),
        x(3, grid[0] * grid[1], 8).requires_grad_(),
    )
    key_mask = torch.rand(3, grid[0] * grid[1]) < 0.5 if masked else None
    weights = layer.weights(tokens, grid=grid, key_mask=key_mask)
    values = layer.value(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
    expected = layer.out((weights @ values).transpose(1, 2).flatten(2))
    if backend is None:
        actual = layer(tokens, grid=grid, key_mask=key_mask)
    else:
        with use_backend(backend):
            actual = layer(tokens, grid=grid, key_mask=key_mask)
    torch.testing.assert_close(actual, expected)
    of, cotangent = [tokens, *layer.parameters()], torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, of, cotangent), torch.autograd.grad(expected, of, cotangent)
    )


@pytest.mark.parametrize("chunk", [1, 500, 1500, 10**9])
@pytest.mark.parametrize("shift", [0, 1])
def test_chunks_of_any_size_are_the_whole(monkeypatch, chunk, shift):
    layer, tokens = draw(2, shift), x(3, 35, 8)
    key_mask = torch.rand(3, 35) < 0.6
    with use_backend("reference"):
        expected = [layer(tokens, grid=(5, 7)), layer(tokens, grid=(5, 7), key_mask=key_mask)]
    monkeypatch.setattr(module, "_CHUNK", chunk)
    actual = [layer(tokens, grid=(5, 7)), layer(tokens, grid=(5, 7), key_mask=key_mask)]
    torch.testing.assert_close(actual, expected)
    monkeypatch.setattr(module, "_LARGE", 0)
    torch.testing.assert_close(layer(tokens, grid=(5, 7)), expected[0])


def test_chunks_bound_what_the_scores_hold(monkeypatch):
    """64 images of 16 windows have 256 kB of scores; only a chunk of them is written out at once."""
    monkeypatch.setattr(module, "_CHUNK", 2**12)
    seen = []
    monkeypatch.setattr(module, "_plain", lambda q, *rest: seen.append(q.shape) or torch.zeros_like(q))
    draw(2)(x(64, 64, 8))
    assert all(b * w * h * t * t * 8 <= 2**12 for b, w, h, t, _ in seen)
    assert sum(b * w for b, w, *_ in seen) == 64 * 16
    assert len(seen) == 2**18 // 2**12  # and no smaller chunk than it may be


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("shift", [0, 3])
def test_the_fused_path_is_the_definition(relative_bias, shift):
    """Windows of more than 48 places without the gradient of a bias, in evaluation or without a bias."""
    layer, tokens = draw(7, shift, relative_bias=relative_bias), x(3, 150, 8)
    with use_backend("reference"):
        expected = layer(tokens, grid=(15, 10))
    with torch.no_grad():
        torch.testing.assert_close(layer(tokens, grid=(15, 10)), expected.detach())
    actual, cotangent = layer(tokens, grid=(15, 10)), torch.randn_like(expected)
    of = list(layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(actual, of, cotangent), torch.autograd.grad(expected, of, cotangent)
    )


@pytest.mark.parametrize(
    ("trains", "options", "masked", "expected"),
    [
        (False, {}, False, "fused"),
        (True, {"relative_bias": False}, False, "fused"),
        (True, {}, False, "chunks"),
        (False, {}, True, "chunks"),
        (False, {"window": 4}, False, "chunks"),
        (True, {"relative_bias": False, "dropout": 0.5}, False, "chunks"),
    ],
)
@pytest.mark.parametrize("shift", [0, 1])
def test_the_path_is_the_one_that_is_fast(monkeypatch, trains, options, masked, expected, shift):
    seen = []
    for name, what in ("_plain", "chunks"), ("_at_once", "fused"), ("_image_by_image", "fused"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, r=real, w=what: (seen.append(w), r(*a))[1])
    layer = draw(**{"window": 7, "shift": shift, **options})
    with torch.set_grad_enabled(trains):
        layer(x(1, 196, 8), key_mask=torch.ones(1, 196, dtype=torch.bool) if masked else None)
    assert {*seen} == {expected}


@given(seed=seeds, grid=st.tuples(sides, sides), shift=st.integers(0, 5))
def test_one_window_is_plain_attention_with_the_bias(seed, grid, shift):
    torch.manual_seed(seed)
    layer, tokens = draw(6, shift), x(2, grid[0] * grid[1], 8)
    plain = MultiHeadAttention(8, 2, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "relative" not in k})
    bias = layer.relative_bias(grid)
    torch.testing.assert_close(layer(tokens, grid=grid), plain(tokens, bias=bias))
    torch.testing.assert_close(layer.weights(tokens, grid=grid), plain.weights(tokens, bias=bias))


def swin(size: int, shift: int, grid: tuple[int, int], qkv_bias: bool = True):
    """Transformers' whole block, left with the attention alone, and our layer with its weights."""
    theirs = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = theirs.SwinConfig(window_size=size, qkv_bias=qkv_bias, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "sdpa"  # their eager softmax rounds to float32
    block = theirs.SwinLayer(config, 8, grid, 2, shift_size=shift).double()
    block.layernorm_before, block.mlp = nn.Identity(), Zero()
    for parameter in block.attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    state = block.attention.state_dict()
    moved = {
        f"{our}.{p}": state.get(f"{name}.{p}") for our, name in names.items() for p in ("weight", "bias")
    }
    moved["relative_bias.weight"] = state["relative_position_bias.relative_position_bias_table"]
    ours = WindowAttention(8, 2, window=size, shift=shift, bias=qkv_bias, dtype=torch.float64)
    ours.load_state_dict({k: v for k, v in moved.items() if v is not None})
    return ours, lambda tokens: block(tokens, grid)[0] - tokens, block.attention


class Zero(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tokens)


@pytest.mark.parametrize(
    ("size", "shift", "grid"),
    [(4, 0, (8, 12)), (4, 2, (8, 12)), (3, 1, (6, 9)), (5, 2, (10, 10)), (7, 3, (7, 7)), (5, 2, (3, 3))],
)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_equals_swin(size, shift, grid, qkv_bias):
    ours, theirs, attention = swin(size, shift, grid, qkv_bias)
    if size > min(grid):
        # Theirs makes the window smaller, and has no smaller table: it only works where it was made so.
        theirs, ours.shift = swin_of_the_grid(ours, grid), (shift, shift)
    tokens = x(2, grid[0] * grid[1], 8).requires_grad_()
    actual, expected = ours(tokens, grid=grid), theirs(tokens)
    # Their mask is -100 where ours excludes: e^-100.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    cotangent = torch.randn_like(actual)
    grad = partial(torch.autograd.grad, grad_outputs=cotangent)
    torch.testing.assert_close(
        grad(actual, tokens, retain_graph=True), grad(expected, tokens, retain_graph=True)
    )
    if size <= min(grid):
        pairs = [
            (ours.query.weight, attention.q_proj.weight),
            (ours.value.weight, attention.v_proj.weight),
            (ours.out.bias, attention.o_proj.bias),
            (ours.relative_bias.weight, attention.relative_position_bias.relative_position_bias_table),
        ]
        mine, other = zip(*pairs, strict=True)
        torch.testing.assert_close(grad(actual, mine), grad(expected, other))


def swin_of_the_grid(ours: WindowAttention, grid: tuple[int, int]):
    """A Swin attention made for a window as small as the grid, with the middle of our table."""
    _, theirs, attention = swin(grid[0], 0, grid, ours.query.bias is not None)
    side, part = ours.window[0], slice(ours.window[0] - grid[0], ours.window[0] + grid[0] - 1)
    with torch.no_grad():
        for other, mine in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            (ours.query, ours.key, ours.value, ours.out),
            strict=True,
        ):
            other.load_state_dict(mine.state_dict())
        table = ours.relative_bias.weight.unflatten(0, (2 * side - 1, 2 * side - 1))[part, part]
        attention.relative_position_bias.relative_position_bias_table.copy_(table.flatten(0, 1))
    return theirs


@every_path
@given(seed=seeds, grid=st.tuples(sides, sides), shift=st.integers(0, 2))
def test_what_is_masked_has_no_influence(backend, seed, grid, shift):
    torch.manual_seed(seed)
    n = grid[0] * grid[1]
    layer, tokens, key_mask = draw(3, shift), x(2, n, 8), torch.rand(2, n) < 0.5
    other = torch.where(key_mask[..., None], tokens, 1e3).requires_grad_()
    forward = partial(layer, grid=grid, key_mask=key_mask)
    if backend is not None:
        with use_backend(backend):
            out, changed = forward(tokens), forward(other)
    else:
        out, changed = forward(tokens), forward(other)
    torch.testing.assert_close(changed[key_mask], out[key_mask])
    (grad,) = torch.autograd.grad(changed[key_mask], other, torch.randn_like(changed[key_mask]))
    assert (grad[~key_mask] == 0).all()
    assert grad.isfinite().all()


def test_a_window_without_keys_gives_the_bias_of_the_output_and_no_gradient():
    layer, tokens = draw(2), x(1, 16, 8).requires_grad_()
    key_mask = torch.ones(1, 16, dtype=torch.bool)
    key_mask[0, [0, 1, 4, 5]] = False
    out = layer(tokens, key_mask=key_mask)
    torch.testing.assert_close(out[0, [0, 1, 4, 5]], layer.out.bias.expand(4, 8))
    (grad,) = torch.autograd.grad(out, tokens, torch.randn_like(out))
    assert (grad[0, [0, 1, 4, 5]] == 0).all()
    assert (grad[0, [2, 3, 6, 7]] != 0).all()


def test_opposite_edges_never_meet():
    layer, tokens = draw(4, 2), x(1, 64, 8).requires_grad_()
    out = layer(tokens)
    (grad,) = torch.autograd.grad(out[:, 0], tokens, x(1, 8))
    reached = (grad[0] != 0).any(-1).view(8, 8)
    assert reached[:2, :2].all()
    assert reached.sum() == 4


def test_a_shift_connects_windows():
    """After a plain and a shifted layer a token reaches beyond its window."""
    plain, shifted, tokens = draw(4), draw(4, 2), x(1, 64, 8).requires_grad_()
    (grad,) = torch.autograd.grad(shifted(plain(tokens))[:, 3 * 8 + 3], tokens, x(1, 8))
    assert (grad[0] != 0).any(-1).all()


@given(seed=seeds, grid=st.tuples(sides, sides), shift=st.integers(0, 2))
def test_rows_of_a_batch_do_not_meet(seed, grid, shift):
    torch.manual_seed(seed)
    layer, tokens = draw(3, shift), x(3, grid[0] * grid[1], 8)
    torch.testing.assert_close(layer(tokens, grid=grid)[1:2], layer(tokens[1:2], grid=grid))


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(masked):
    layer = WindowAttention(4, 2, window=2, shift=1, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    key_mask = torch.tensor([[True, False, True, False, False, True]]) if masked else None
    names = [name for name, _ in layer.named_parameters()]

    def call(tokens, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, tokens, {"grid": (2, 3), "key_mask": key_mask})

    inputs = x(1, 6, 4).requires_grad_(), *(p.detach().requires_grad_() for p in layer.parameters())
    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_half_precision_is_finite_and_near(dtype, backend):
    layer, tokens = draw(3, 1), x(2, 35, 8)
    key_mask = torch.rand(2, 35) < 0.7
    for mask in None, key_mask:
        expected = layer.double()(tokens, grid=(5, 7), key_mask=mask)
        low, half = layer.to(dtype), tokens.to(dtype)
        if backend is None:
            out = low(half, grid=(5, 7), key_mask=mask)
        else:
            with use_backend(backend):
                out = low(half, grid=(5, 7), key_mask=mask)
        assert out.dtype is dtype
        assert (out.double() - expected).norm() < 0.05 * expected.norm()
        layer = layer.double()


@pytest.mark.parametrize("grid", [(0, 0), (0, 3), (2, 0)])
def test_an_empty_grid_gives_nothing(grid):
    layer = draw(2, 1)
    assert layer(x(3, 0, 8), grid=grid).shape == (3, 0, 8)
    assert layer.weights(x(3, 0, 8), grid=grid).shape == (3, 2, 0, 0)
    assert layer(x(0, 9, 8)).shape == (0, 9, 8)
    assert layer(x(0, 9, 8), key_mask=torch.ones(0, 9, dtype=torch.bool)).shape == (0, 9, 8)


def test_dropout_is_of_the_weights_and_in_training_only():
    layer, tokens = draw(dropout=0.5), x(2, 16, 8)
    dropped = layer(tokens)
    assert not torch.equal(dropped, layer(tokens))
    layer.eval()
    plain = layer(tokens)
    assert torch.equal(layer(tokens), plain)
    layer.train()
    torch.testing.assert_close(layer(tokens[:1].expand(3000, -1, -1)).mean(0), plain[0], rtol=0, atol=0.5)
    with use_backend("reference"):
        assert not torch.equal(layer(tokens), layer(tokens))
    layer.dropout = 0.0
    assert torch.equal(layer(tokens), plain)


def test_the_grid_is_that_of_the_call_then_the_layer_s_then_a_square():
    layer, tokens = draw(2, grid=(2, 8)), x(1, 16, 8)
    square, wide = draw(2), layer(tokens)
    square.load_state_dict(layer.state_dict())
    torch.testing.assert_close(square(tokens), layer(tokens, grid=(4, 4)))
    torch.testing.assert_close(wide, square(tokens, grid=(2, 8)))
    assert not torch.allclose(wide, square(tokens))
    assert not torch.allclose(square(tokens, grid=(8, 2)), square(tokens, grid=(2, 8)))


def test_starts_xavier_uniform_with_zero_bias():
    layer = WindowAttention(64, 4)
    for projection in layer.query, layer.key, layer.value, layer.out:
        assert projection.weight.std().item() == pytest.approx((6 / 128) ** 0.5 / 3**0.5, rel=0.05)
        assert (projection.bias == 0).all()
    assert layer.relative_bias.weight.shape == (169, 4)
    assert WindowAttention(16).relative_bias.weight.shape == (169, 8)
    assert WindowAttention(8, 2, bias=False).query.bias is None
    assert WindowAttention(8, 2, bias=False).out.bias is not None
    assert WindowAttention(8, 2, out_bias=False).out.bias is None


def test_stands_in_a_block_and_in_a_model():
    block = EncoderBlock(16, 2, attention=partial(WindowAttention, window=4, shift=2, grid=(8, 8)))
    assert block(torch.randn(3, 64, 16)).shape == (3, 64, 16)
    model = create_model("vit_digits", pool="mean", attention=partial(WindowAttention, window=2))
    assert model(*model.example_inputs(2)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim, got dim=8 and num_heads=3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"window": 0}, "window must be at least 1 and shift from 0 to window - 1, got window=0 and shift=0"),
        ({"window": (4, 2), "shift": 2}, r"shift from 0 to window - 1, got window=\(4, 2\) and shift=2"),
        ({"window": 4, "shift": (0, -1)}, r"shift from 0 to window - 1, got window=4 and shift=\(0, -1\)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(8, **{"num_heads": 2, **options})


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((2, 10, 8), {}, "grid must be given where the tokens are not a square, got 10 tokens"),
        (
            (2, 10, 8),
            {"grid": (3, 4)},
            r"grid must have a cell for each token, got grid=\(3, 4\) and 10 tokens",
        ),
        ((2, 9, 7), {}, r"query must be \(B, rows \* columns, 8\), got \(2, 9, 7\)"),
        ((9, 8), {}, r"query must be \(B, rows \* columns, 8\), got \(9, 8\)"),
        ((2, 9, 8), {"key_mask": torch.ones(9).bool()}, r"key_mask must be \(B, N\) = \(2, 9\), got \(9,\)"),
        (
            (2, 9, 8),
            {"key_mask": torch.ones(2, 8).bool()},
            r"key_mask must broadcast to \(2, 9\), got \(2, 8\)",
        ),
        ((2, 9, 8), {"key_mask": torch.ones(2, 9)}, "key_mask must be boolean"),
    ],
)
def test_bad_inputs_are_named(shape, given, message):
    layer = draw()
    for call in layer, layer.weights:
        with pytest.raises(ValueError, match=message):
            call(x(*shape), **given)


def test_what_it_cannot_honour_is_not_in_its_signature():
    for name in "mask", "bias", "is_causal":
        with pytest.raises(TypeError, match=name):
            draw()(x(1, 9, 8), **{name: None})
