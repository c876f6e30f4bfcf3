"""Local attention: the layer against its weights, plain attention, and the libraries that people use."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import LocalAttention, MultiHeadAttention, RotaryPositions
from torch import Tensor, nn

seeds = st.integers(0, 2**31)
lengths = st.integers(1, 19)
KINDS = {
    "plain": {},
    "back": {"look_ahead": 0, "look_back": 2},
    "rotary": {"rotary": RotaryPositions(4)},
    "wide": {"head_dim": 5, "bias": False},
}


def draw(kind: str = "plain", **options) -> LocalAttention:
    """A layer with weights of order one."""
    layer = LocalAttention(8, 2, **{"window": 4, "dtype": torch.float64, **KINDS[kind], **options})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, length=lengths, is_causal=st.booleans(), with_mask=st.booleans())
def test_output_is_the_weights_times_the_values(kind, seed, length, is_causal, with_mask):
    torch.manual_seed(seed)
    layer, tokens = draw(kind), x(2, length, 8)
    key_mask = torch.rand(2, length) < 0.7 if with_mask else None
    weights = layer.weights(tokens, key_mask=key_mask, is_causal=is_causal)
    values = layer.value(tokens).unflatten(-1, (2, -1)).transpose(1, 2)
    expected = layer.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(tokens, key_mask=key_mask, is_causal=is_causal), expected)
    chunk = torch.arange(length) // 4
    distance = chunk - chunk[:, None]
    seen = (distance >= -layer.look_back) & (distance <= layer.look_ahead)
    seen = seen & (torch.ones(length, length).tril().bool() if is_causal else True)
    seen = seen & (True if key_mask is None else key_mask[:, None, None])
    assert torch.equal(weights > 0, seen.expand_as(weights))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [3, 64])
def test_windows_that_reach_everything_are_plain_attention(window, is_causal):
    layer = draw("rotary", window=window, look_back=9, look_ahead=9)
    whole = MultiHeadAttention(8, 2, rotary=RotaryPositions(4), dtype=torch.float64)
    whole.load_state_dict(layer.state_dict())
    tokens, key_mask = x(2, 13, 8), torch.rand(2, 13) < 0.8
    torch.testing.assert_close(
        layer(tokens, key_mask=key_mask, is_causal=is_causal),
        whole(tokens, key_mask=key_mask, is_causal=is_causal),
    )


@given(seed=seeds, length=lengths, padding=st.integers(1, 9))
def test_padding_has_no_influence(seed, length, padding):
    torch.manual_seed(seed)
    layer, tokens = draw(), x(2, length, 8)
    padded = torch.cat([tokens, 9 * x(2, padding, 8)], dim=1).requires_grad_()
    key_mask = torch.arange(length + padding).expand(2, -1) < length
    out = layer(padded, key_mask=key_mask)
    torch.testing.assert_close(out[:, :length], layer(tokens))
    (gradient,) = torch.autograd.grad(out[:, :length], padded, x(2, length, 8))
    assert (gradient[:, length:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, length=lengths, at=st.integers(0, 18))
def test_causal_reaches_no_later_token_and_its_gradient_no_earlier(kind, seed, length, at):
    torch.manual_seed(seed)
    at %= length
    layer, tokens = draw(kind), x(1, length, 8).requires_grad_()
    out = layer(tokens, is_causal=True)
    (gradient,) = torch.autograd.grad(out[:, at], tokens, x(1, 8))
    assert (gradient[:, at + 1 :] == 0).all()
    later = tokens.detach().clone()
    later[:, at + 1 :] += 1.0
    torch.testing.assert_close(layer(later, is_causal=True)[:, : at + 1], out[:, : at + 1])


def test_sees_behind_itself_unless_causal():
    layer, tokens = draw(), x(1, 12, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(tokens)[:, 0], tokens, x(1, 8))
    assert (gradient[:, :8] != 0).all()
    assert (gradient[:, 8:] == 0).all()


def test_by_default_it_sees_one_chunk_back_and_one_ahead():
    layer, tokens = LocalAttention(8, 2, window=4), torch.randn(1, 24, 8)
    seen = layer.weights(tokens)[0, 0, 13] > 0
    assert seen.nonzero().flatten().tolist() == list(range(8, 20))
    layer = LocalAttention(16)
    assert (layer.num_heads, layer.window) == (8, 64)


def test_a_chunk_may_be_one_token():
    seen = draw(window=1).weights(x(1, 5, 8))[0, 0] > 0
    assert seen.tolist() == [[abs(i - j) <= 1 for j in range(5)] for i in range(5)]


def test_tokens_that_see_none_give_the_bias_of_the_output():
    layer = draw()
    out = layer(x(2, 9, 8), key_mask=torch.tensor([[False] * 9, [True] * 9]))
    torch.testing.assert_close(out[0], layer.out.bias.expand(9, 8))


@pytest.mark.parametrize(("before", "ahead"), [(1, 0), (2, 0), (0, 0)])
@pytest.mark.parametrize("length", [24, 4])
def test_equals_transformers(length, before, ahead):
    """Causal without a look ahead: its chunks form a ring, so that its last would look ahead at the first."""
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    config = pytest.importorskip("transformers").ReformerConfig(
        hidden_size=8,
        num_attention_heads=2,
        attention_head_size=5,
        local_attn_chunk_length=4,
        local_num_chunks_before=before,
        local_num_chunks_after=ahead,
        is_decoder=True,
        local_attention_probs_dropout_prob=0.0,
    )
    theirs = reformer.LocalSelfAttention(config).double()
    dense = nn.Linear(10, 8, bias=False).double()  # their output projection is a module of its own
    layer = draw("wide", look_back=before, look_ahead=ahead)
    layer.load_state_dict({**theirs.state_dict(), "out.weight": dense.weight})
    tokens = x(2, length, 8).requires_grad_()
    key_mask = torch.arange(length) < torch.tensor([[length], [length - 3]])
    actual = layer(tokens, key_mask=key_mask, is_causal=True)
    expected = dense(theirs(tokens, attention_mask=key_mask).hidden_states)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, [tokens, *layer.parameters()], cotangent),
        torch.autograd.grad(expected, [tokens, *theirs.parameters(), dense.weight], cotangent),
    )


def test_any_length_works():
    layer = draw()
    for length in 0, 1, 3, 4, 5, 9:
        assert layer(x(2, length, 8)).shape == (2, length, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    layer, tokens = draw(dtype=dtype), torch.randn(2, 37, 8, dtype=dtype, requires_grad=True)
    out = layer(tokens, key_mask=torch.arange(37) < torch.tensor([[30], [0]]), is_causal=True)
    gradients = torch.autograd.grad(out, [tokens, *layer.parameters()], torch.randn_like(out))
    assert all(t.isfinite().all() for t in [out, *gradients])


def test_dropout_is_in_training_only():
    layer, tokens = draw(dropout=0.5), x(2, 11, 8)
    assert not torch.equal(layer(tokens), layer(tokens))
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))


def test_starts_xavier_uniform_with_zero_bias():
    layer = LocalAttention(64, 4)
    for projection in layer.query, layer.key, layer.value, layer.out:
        assert projection.weight.abs().max() <= (6 / 128) ** 0.5
        assert projection.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
        assert (projection.bias == 0).all()


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((8, 3), {}, "num_heads must divide dim, got dim=8 and num_heads=3"),
        ((8, 2), {"window": 0}, "window must be positive.*got window=0"),
        ((8, 2), {"look_back": -1}, "look_back and look_ahead not negative.*look_back=-1"),
        ((8, 2), {"look_ahead": -1}, "look_ahead=-1"),
        ((8, 2), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes_are_named(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        LocalAttention(*sizes, **options)


def test_a_bad_mask_is_named():
    with pytest.raises(ValueError, match=r"key_mask must broadcast to \(2, 5\), got \(2, 4\)"):
        draw()(x(2, 5, 8), key_mask=torch.ones(2, 4).bool())
