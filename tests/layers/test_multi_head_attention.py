"""Multi-head attention: its formula, PyTorch with the same weights, and what every mask and size keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import DistanceBias, use_backend
from lamina.layers import (
    KeyValueCache,
    MultiHeadAttention,
    Packing,
    RotaryPositions,
    mask_from_lengths,
    pack,
)
from torch import nn

sizes, seeds = st.integers(1, 6), st.integers(0, 2**31)
KINDS = ["plain", "grouped", "rotary", "normalised", "narrow values"]


def draw(kind: str = "plain", dropout: float = 0.0, **options) -> MultiHeadAttention:
    """A layer with weights of order one."""
    options |= {
        "plain": {},
        "grouped": {"num_kv_heads": 2},
        "rotary": {"rotary": RotaryPositions(2)},
        "narrow values": {"num_kv_heads": 2, "head_dim": 5, "value_head_dim": 3},
        "normalised": {"qk_norm": nn.RMSNorm, "bias": False, "num_kv_heads": 1},
    }[kind]
    layer = MultiHeadAttention(8, 4, dropout=dropout, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def twins(**options) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    ours, theirs = draw(**options), nn.MultiheadAttention(8, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for name in "weight", "bias":
            parts = [getattr(p, name) for p in (ours.query, ours.key, ours.value)]
            getattr(theirs, f"in_proj_{name}").copy_(torch.cat(parts))
            getattr(theirs.out_proj, name).copy_(getattr(ours.out, name))
    return ours, theirs


@given(seed=seeds, queries=sizes, keys=sizes)
def test_equals_torch(seed, queries, keys):
    torch.manual_seed(seed)
    ours, theirs = twins()
    query, key, value = x(3, queries, 8), x(3, keys, 8), x(3, keys, 8)
    mask = torch.rand(queries, keys) < 0.7
    key_mask = torch.rand(3, keys) < 0.7
    mask[:, 0] = key_mask[:, 0] = True  # PyTorch's has NaN in a row without keys
    expected, weights = theirs(
        query, key, value, key_padding_mask=~key_mask, attn_mask=~mask, average_attn_weights=False
    )
    torch.testing.assert_close(ours(query, key, value, key_mask=key_mask, mask=mask), expected)
    torch.testing.assert_close(ours.weights(query, key, key_mask=key_mask, mask=mask), weights)


def test_gradients_equal_torch():
    ours, theirs = twins()
    tokens, cotangent = x(2, 5, 8).requires_grad_(), x(2, 5, 8)
    actual = torch.autograd.grad(
        ours(tokens),
        [tokens, ours.query.weight, ours.key.weight, ours.value.weight, ours.out.weight],
        cotangent,
    )
    expected = torch.autograd.grad(
        theirs(tokens, tokens, tokens)[0], [tokens, theirs.in_proj_weight, theirs.out_proj.weight], cotangent
    )
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(torch.cat(actual[1:4]), expected[1])
    torch.testing.assert_close(actual[4], expected[2])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_weights_times_the_values(kind, backend):
    layer, query, key = draw(kind), x(2, 3, 8), x(2, 5, 8)
    given = {"key_mask": torch.rand(2, 5) < 0.7, "bias": x(4, 3, 5), "is_causal": True}
    weights = layer.weights(query, key, **given)
    groups = layer.num_kv_heads
    values = layer.value(key).unflatten(-1, (groups, layer.value_head_dim)).transpose(1, 2)
    values = values.repeat_interleave(4 // groups, 1)
    expected = layer.out((weights @ values).transpose(1, 2).flatten(2))
    with use_backend(backend):
        torch.testing.assert_close(layer(query, key, **given), expected)


def test_grouped_queries_are_repeated_keys():
    grouped, whole = draw("grouped"), draw()
    state = grouped.state_dict()
    for name in "key.weight", "key.bias", "value.weight", "value.bias":
        state[name] = state[name].unflatten(0, (2, 2)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(state)
    tokens = x(2, 5, 8)
    torch.testing.assert_close(grouped(tokens), whole(tokens))


@given(seed=seeds, queries=sizes, keys=sizes, padding=sizes)
def test_what_is_masked_has_no_influence(seed, queries, keys, padding):
    torch.manual_seed(seed)
    layer, query, key = draw(), x(2, queries, 8), x(2, keys, 8)
    padded = torch.cat([key, torch.full((2, padding, 8), 1e3).double()], dim=1).requires_grad_()
    key_mask = torch.arange(keys + padding).expand(2, -1) < keys
    out = layer(query, padded, key_mask=key_mask)
    torch.testing.assert_close(out, layer(query, key))
    (gradient,) = torch.autograd.grad(out, padded, torch.randn_like(out))
    assert (gradient[:, keys:] == 0).all()


@given(seed=seeds, length=sizes, at=sizes)
def test_causal_reaches_no_later_token_and_its_gradient_no_earlier(seed, length, at):
    torch.manual_seed(seed)
    at %= length
    layer, tokens = draw("rotary"), x(1, length, 8).requires_grad_()
    out = layer(tokens, is_causal=True)
    (gradient,) = torch.autograd.grad(out[:, at], tokens, x(1, 8))
    assert (gradient[:, at + 1 :] == 0).all()
    assert (gradient[:, : at + 1] != 0).any()


@given(seed=seeds, length=sizes)
def test_self_attention_follows_a_permutation_of_its_tokens(seed, length):
    torch.manual_seed(seed)
    layer, tokens, order = draw(), x(2, length, 8), torch.randperm(length)
    torch.testing.assert_close(layer(tokens[:, order]), layer(tokens)[:, order])


@given(seed=seeds, length=sizes, shift=st.integers(0, 5))
def test_rotary_positions_are_relative(seed, length, shift):
    """More keys before, which the mask hides, shift all positions by as many: nothing changes."""
    torch.manual_seed(seed)
    layer, tokens = draw("rotary"), x(1, length, 8)
    padded = torch.cat([x(1, shift, 8), tokens], dim=1)
    key_mask = torch.arange(length + shift)[None] >= shift
    torch.testing.assert_close(layer(tokens, padded, key_mask=key_mask), layer(tokens))
    if length > 2:
        assert not torch.allclose(layer(tokens.flip(1)), layer(tokens).flip(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_gradients", [False, True])
@given(seed=seeds, steps=st.lists(st.integers(1, 3), min_size=1, max_size=4), padding=st.integers(0, 3))
def test_cached_equals_uncached(kind, with_gradients, seed, steps, padding):
    torch.manual_seed(seed)
    layer, length = draw(kind), sum(steps)
    tokens = x(2, length, 8)
    key_mask = torch.arange(length)[None] >= torch.tensor([[0], [padding]])  # left padding in the second
    expected = layer(tokens, key_mask=key_mask, is_causal=True)
    cache, at, outputs = KeyValueCache(), 0, []
    with torch.set_grad_enabled(with_gradients):
        for n in steps:
            new = tokens[:, at : at + n]
            outputs.append(layer(new, key_mask=key_mask[:, : at + n], is_causal=True, cache=cache))
            at += n
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    if with_gradients:
        cotangent = torch.randn_like(expected)
        actual = torch.autograd.grad(torch.cat(outputs, 1), list(layer.parameters()), cotangent)
        torch.testing.assert_close(actual, torch.autograd.grad(expected, list(layer.parameters()), cotangent))


def test_cross_attention_projects_the_memory_once():
    layer, query, memory = draw(), x(2, 3, 8), x(2, 5, 8)
    expected, cache, calls = layer(query, memory), KeyValueCache(), []
    layer.key.register_forward_hook(lambda *_: calls.append(1))
    steps = [layer(query[:, i : i + 1], memory, cache=cache) for i in range(3)]
    torch.testing.assert_close(torch.cat(steps, 1), expected)
    assert len(calls) == 1


def test_sizes_of_keys_values_and_heads_are_free():
    layer = MultiHeadAttention(6, 5, head_dim=3, key_dim=7, value_dim=11)
    out = layer(torch.randn(2, 3, 6), torch.randn(2, 4, 7), torch.randn(2, 4, 11))
    assert out.shape == (2, 3, 6)
    assert layer.query.weight.shape == (15, 6)
    assert sum(p.numel() for p in layer.parameters()) == 15 * (6 + 7 + 11) + 3 * 15 + 6 * 15 + 6


def test_dropout_is_of_the_weights_and_in_training_only():
    layer, tokens = draw(dropout=0.5), x(2, 5, 8)
    assert not torch.equal(layer(tokens), layer(tokens))
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))
    torch.testing.assert_close(layer(tokens), layer.train(False)(tokens))


def test_a_query_without_keys_gives_the_bias_of_the_output():
    layer = draw()
    out = layer(x(2, 3, 8), key_mask=torch.tensor([[False] * 3, [True] * 3]))
    torch.testing.assert_close(out[0], layer.out.bias.expand(3, 8))


def test_starts_xavier_uniform_with_zero_bias():
    layer = MultiHeadAttention(64, 4)
    bound = (6 / 128) ** 0.5
    for projection in layer.query, layer.key, layer.value, layer.out:
        assert projection.weight.abs().max() <= bound
        assert projection.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert (projection.bias == 0).all()


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((8, 3), {}, "num_heads must divide dim, got dim=8 and num_heads=3"),
        (
            (8, 4),
            {"num_kv_heads": 3},
            "num_kv_heads must divide num_heads, got num_heads=4 and num_kv_heads=3",
        ),
        ((8, 4), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes_are_named(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(*sizes, **options)


def test_a_bad_mask_is_named():
    with pytest.raises(ValueError, match=r"mask must broadcast to \(2, 4, 3, 3\), got \(2, 3, 3\)"):
        draw()(x(2, 3, 8), mask=torch.ones(2, 3, 3).bool())


# --- packed tokens

packed_lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)


def packings(lengths: list[tuple[int, int]]) -> tuple[tuple[torch.Tensor, Packing], ...]:
    """The masks of padded queries and keys, each with its packing."""
    both = []
    for numbers in zip(*lengths, strict=True):
        mask = mask_from_lengths(torch.tensor(numbers), 5)
        both.append((mask, pack(mask, mask)[1]))
    return tuple(both)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, lengths=packed_lengths)
def test_packed_tokens_equal_padded_ones(kind, is_causal, backend, seed, lengths):
    """Outputs, and the gradients of the tokens and of every parameter."""
    torch.manual_seed(seed)
    layer, ((key_mask, packing), _) = draw(kind), packings(lengths)
    tokens = x(len(lengths), 5, 8).requires_grad_()
    with use_backend(backend):
        expected = layer(tokens, key_mask=key_mask, is_causal=is_causal)[key_mask]
        actual = layer(tokens[key_mask], packing=packing, is_causal=is_causal)
    torch.testing.assert_close(actual, expected)
    cotangent, of = torch.randn_like(expected), [tokens, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(actual, of, cotangent), torch.autograd.grad(expected, of, cotangent)
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, lengths=packed_lengths)
def test_packed_keys_equal_padded_ones(kind, is_causal, seed, lengths):
    """Causal and rotary, the last query of a sequence stands where its last key stands."""
    torch.manual_seed(seed)
    layer, ((mask, packing), (key_mask, key_packing)) = draw(kind), packings(lengths)
    query, key = x(len(lengths), 5, 8), x(len(lengths), 5, 8)
    actual = layer(query[mask], key[key_mask], packing=packing, key_packing=key_packing, is_causal=is_causal)
    for b, (queries, keys) in enumerate(lengths):
        alone = layer(query[b : b + 1, :queries], key[b : b + 1, :keys], is_causal=is_causal)
        start = int(packing.starts[b])
        torch.testing.assert_close(actual[start : start + queries], alone[0])


def test_packed_tokens_take_a_bias_by_distance():
    layer, ((key_mask, packing), _) = draw(), packings([(5, 5), (3, 3)])
    tokens, bias = x(2, 5, 8), DistanceBias(-torch.rand(4, dtype=torch.float64))
    expected = layer(tokens, key_mask=key_mask, bias=bias)[key_mask]
    torch.testing.assert_close(layer(tokens[key_mask], packing=packing, bias=bias), expected)


def test_packed_tokens_compile_whole():
    """With a graph for sequences of any number and length, empty ones too, forward and backward."""
    layer = draw("grouped")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in [3, 4], [1, 0, 5, 2, 2]:
        starts = torch.tensor([0, *lengths]).cumsum(0)
        tokens, given = x(sum(lengths), 8).requires_grad_(), {"packing": Packing(starts, max(lengths))}
        expected, actual = layer(tokens, **given), compiled(tokens, **given)
        torch.testing.assert_close(actual, expected)
        cotangent, of = torch.randn_like(expected), [tokens, *layer.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(actual, of, cotangent), torch.autograd.grad(expected, of, cotangent)
        )


def test_dropout_of_packed_tokens_keeps_the_mean():
    layer, packing = draw(dropout=0.3), Packing(torch.tensor([0, 3, 7]), 4)
    tokens = x(7, 8)
    drawn = torch.stack([layer(tokens, packing=packing) for _ in range(600)])
    error = (drawn.mean(0) - layer.eval()(tokens, packing=packing)).abs()
    assert (error < 6 * drawn.std(0) / 600**0.5).all()
    assert (drawn.std(0) > 0).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"key_mask": torch.ones(2, 4).bool()}, "key_mask must be None with packed tokens, got a Tensor"),
        ({"mask": torch.ones(7, 7).bool()}, "mask must be None with packed tokens"),
        ({"cache": KeyValueCache()}, "cache must be None with packed tokens, got a KeyValueCache"),
        ({"bias": torch.zeros(7, 7)}, "bias must be None with packed tokens, or a DistanceBias"),
        ({"key": torch.zeros(2, 7, 8)}, r"key must be \(N, C\) with a packing, got \(2, 7, 8\)"),
        ({"packing": None, "key_packing": Packing(torch.tensor([0, 7]), 7)}, "packing must be given with"),
        ({"packing": Packing(torch.tensor([0, 6]), 7)}, "must rise from 0 to the number of tokens, 7"),
    ],
)
def test_what_packed_tokens_cannot_have_is_named(given, message):
    given = {"packing": Packing(torch.tensor([0, 3, 7]), 4)} | given
    with pytest.raises(ValueError, match=message):
        draw()(x(7, 8), **given)
