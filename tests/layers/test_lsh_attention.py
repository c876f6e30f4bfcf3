"""LSH attention: the layer against its weights, its rotations, padding, and its peers on the same weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import lsh_buckets
from lamina.layers import LSHAttention
from lamina.layers.lsh_attention import seeded_normals
from torch import Tensor, nn

seeds = st.integers(0, 2**31)
lengths = st.integers(1, 19)
KINDS = {
    "plain": {},
    "paper": {"same_bucket": True, "deduplicate": True, "num_buckets": 4},
    "original": {"circular": True, "num_buckets": (2, 4)},
    "wide": {"look_back": 2, "look_ahead": 1, "scale": 0.3, "head_dim": 5, "bias": True},
}


def draw(kind: str = "plain", **options) -> LSHAttention:
    """A layer with weights of order one."""
    options = {"chunk_size": 4, "num_hashes": 3, "dtype": torch.float64, **KINDS[kind], **options}
    layer = LSHAttention(8, 2, **options)
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
    real = torch.ones(2, length).bool() if key_mask is None else key_mask
    torch.testing.assert_close(weights.sum(-1), real[:, None].expand(2, 2, length).double())
    assert (weights >= 0).all()


@pytest.mark.parametrize("kind", ["plain", "paper", "wide"])
@given(seed=seeds, length=lengths, padding=st.integers(1, 9))
def test_output_does_not_depend_on_how_far_it_is_padded(kind, seed, length, padding):
    torch.manual_seed(seed)
    layer, tokens = draw(kind, num_buckets=6), x(2, length, 8)
    padded = torch.cat([tokens, 9 * x(2, padding, 8)], dim=1).requires_grad_()
    key_mask = torch.arange(length + padding).expand(2, -1) < length
    out = layer(padded, key_mask=key_mask)
    torch.testing.assert_close(out[:, :length], layer(tokens))
    (gradient,) = torch.autograd.grad(out, padded, torch.randn_like(out))
    assert (gradient[:, length:] == 0).all()


def test_tokens_that_take_no_part_give_the_bias_of_the_output():
    layer, tokens = draw("wide"), x(2, 11, 8).requires_grad_()
    key_mask = torch.tensor([[False] * 11, [True] * 6 + [False] * 5])
    out = layer(tokens, key_mask=key_mask)
    torch.testing.assert_close(out[~key_mask], layer.out.bias.expand(16, 8))
    (gradient,) = torch.autograd.grad(out, tokens, torch.randn_like(out))
    assert (gradient[~key_mask] == 0).all()
    assert gradient[key_mask].abs().max() > 0


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 13, "num_buckets": 1}, {"deduplicate": True}], ids=str
)
def test_one_chunk_is_plain_shared_attention(options, is_causal):
    layer, tokens = draw(**{"chunk_size": 64, **options}), x(2, 13, 8)
    query_key = layer.query_key(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
    scores = query_key @ nn.functional.normalize(query_key, dim=-1).transpose(-2, -1)
    others = ~torch.eye(13).bool() & (torch.ones(13, 13).tril().bool() if is_causal else torch.tensor(True))
    weights = scores.masked_fill(~others, -torch.inf).softmax(-1).nan_to_num(0.0)
    weights[:, :, ~others.any(-1), ~others.any(-1)] = 1.0
    torch.testing.assert_close(layer.weights(tokens, is_causal=is_causal), weights, rtol=1e-5, atol=1e-5)
    values = layer.value(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
    expected = layer.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(tokens, is_causal=is_causal), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, length=lengths, at=st.integers(0, 18))
def test_causal_gradients_reach_no_later_token(kind, seed, length, at):
    torch.manual_seed(seed)
    at %= length
    layer, tokens = draw(kind), x(1, length, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(tokens, is_causal=True)[:, at], tokens, x(1, 8))
    assert (gradient[:, at + 1 :] == 0).all()
    assert gradient[:, : at + 1].abs().max() > 0


@given(seed=seeds, at=st.integers(0, 12))
def test_causal_in_one_chunk_does_not_change_with_later_tokens(seed, at):
    torch.manual_seed(seed)
    layer, tokens = draw(chunk_size=16), x(1, 13, 8)
    before = layer(tokens, is_causal=True)
    tokens[:, at + 1 :] += 1.0
    torch.testing.assert_close(layer(tokens, is_causal=True)[:, : at + 1], before[:, : at + 1])


def test_rotations_are_the_seed_s():
    tokens = x(2, 40, 8)
    layer, twin, other = (draw(seed=seed) for seed in (3, 3, 4))
    for copy in twin, other:
        for mine, its in zip(layer.parameters(), copy.parameters(), strict=True):
            its.data.copy_(mine)
    expected, state = layer(tokens), torch.get_rng_state()
    assert torch.equal(layer(tokens), expected)
    assert torch.equal(twin(tokens), expected)
    assert not torch.allclose(other(tokens), expected)
    assert torch.equal(torch.get_rng_state(), state)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(tokens), expected)
    other.reset_parameters()
    assert other.hash_seed.item() == 4


def test_a_generator_draws_other_rotations():
    layer, tokens = draw(), x(2, 40, 8)
    expected, state = layer(tokens), torch.get_rng_state()
    first, second = (layer(tokens, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, expected)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(layer(tokens, generator=generator), first)
    assert not torch.allclose(layer(tokens, generator=generator), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_rotations_are_redrawn_in_training_alone():
    """From the global stream, as dropout is; what evaluation and `weights` have are the seed's."""
    tokens, seeded = x(2, 40, 8), draw()
    layer = draw(redraw=True)
    layer.load_state_dict(seeded.state_dict())
    weights = layer.weights(tokens)
    assert torch.equal(weights, seeded.weights(tokens))
    torch.manual_seed(5)
    first, second = layer(tokens), layer(tokens)
    assert not torch.allclose(first, second)
    torch.manual_seed(5)
    assert torch.equal(layer(tokens), first)
    generator = torch.Generator().manual_seed(6)
    given = seeded(tokens, generator=generator)
    assert torch.equal(layer(tokens, generator=generator.manual_seed(6)), given)
    assert torch.equal(layer.eval()(tokens), seeded(tokens))


def test_more_rounds_keep_the_first_and_cover_more():
    layer, tokens = draw(num_hashes=1), x(2, 64, 8)
    one = layer.weights(tokens) > 0
    layer.num_hashes = 4
    four = layer.weights(tokens) > 0
    assert (four | ~one).all()
    assert four.sum() > 1.5 * one.sum()


def test_the_number_of_buckets_is_chosen_by_length():
    layer, tokens = draw(), x(2, 41, 8)  # eleven chunks of four, the last of one token
    given = draw(num_buckets=22)
    given.load_state_dict(layer.state_dict())
    assert torch.equal(layer(tokens), given(tokens))


def test_a_pair_of_buckets_hashes_twice():
    layer, tokens = (
        draw(num_buckets=(4, 6), num_hashes=1, look_back=0, same_bucket=True, chunk_size=20),
        x(1, 40, 8),
    )
    query_key = layer.query_key(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
    buckets = lsh_buckets(query_key, seeded_normals(torch.tensor(0), (2, 4, 1, 5)), num_buckets=(4, 6))
    together = buckets.transpose(-2, -1) == buckets
    assert buckets.max() >= 6
    assert ((layer.weights(tokens) > 0) <= together).all()


def test_normals_are_normal_and_independent():
    scipy_stats = pytest.importorskip("scipy.stats")
    for seed in 0, 1, -5, 2**40 + 1:
        z = seeded_normals(torch.tensor(seed), (8, 64, 4, 16))
        assert z.dtype == torch.float32
        assert scipy_stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
        for axis in range(4):  # no axis has a mean, or a correlation between neighbours
            assert z.mean(axis).std().item() == pytest.approx(z.shape[axis] ** -0.5, rel=0.1)
            n = z.shape[axis] - 1
            assert (z.narrow(axis, 0, n) * z.narrow(axis, 1, n)).mean().abs() < 0.02
    several = [seeded_normals(torch.tensor(s), (64, 64)).flatten() for s in (0, 1, -5, 2**40, 2**32)]
    assert (torch.corrcoef(torch.stack(several)) - torch.eye(5)).abs().max() < 0.06


def test_normals_of_a_seed_are_the_same_in_every_version():
    """A saved layer hashes by them: its seed alone is in the state dict."""
    expected = [[0.2905396, 0.1658778, 0.8635153], [-1.1228281, -1.3529539, -1.3226391]]
    torch.testing.assert_close(seeded_normals(torch.tensor(7), (2, 3)), torch.tensor(expected))
    expected = [0.5602098, -2.4811099, 0.4158162]
    torch.testing.assert_close(seeded_normals(torch.tensor(2**40), (1, 3))[0], torch.tensor(expected))


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(-(2**62), 2**62))
def test_a_smaller_shape_is_a_part_of_a_larger_one(sizes, seed):
    small = seeded_normals(torch.tensor(seed), sizes)
    large = seeded_normals(torch.tensor(seed), [n + 3 for n in sizes])
    assert small.isfinite().all()
    assert torch.equal(large[tuple(slice(n) for n in sizes)], small)


@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_transformers(is_causal):
    """The whole layer, its own hashing included; Hugging Face draws rotations from the global stream."""
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    config = pytest.importorskip("transformers").ReformerConfig(
        hidden_size=8,
        num_attention_heads=2,
        attention_head_size=5,
        lsh_attn_chunk_length=4,
        num_hashes=3,
        num_buckets=[2, 4],
        is_decoder=is_causal,
        hash_seed=7,
        lsh_attention_probs_dropout_prob=0.0,
    )
    theirs = reformer.LSHSelfAttention(config).double()
    dense = nn.Linear(10, 8, bias=False).double()  # their output projection is a module of its own
    layer = draw("original", head_dim=5)
    layer.load_state_dict({**theirs.state_dict(), "out.weight": dense.weight, "hash_seed": layer.hash_seed})
    tokens = x(2, 24, 8).requires_grad_()
    key_mask = torch.arange(24) < torch.tensor([[24], [17]])
    with torch.random.fork_rng():
        expected = dense(theirs(tokens, attention_mask=key_mask).hidden_states)
        torch.manual_seed(7)
        rotations = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.layers.lsh_attention.seeded_normals", lambda seed, shape: rotations)
        actual = layer(tokens, key_mask=key_mask, is_causal=is_causal)
    torch.testing.assert_close(actual[key_mask], expected[key_mask])
    cotangent = torch.randn_like(actual) * key_mask[..., None]
    torch.testing.assert_close(
        torch.autograd.grad(actual, [tokens, *layer.parameters()], cotangent),
        torch.autograd.grad(expected, [tokens, *theirs.parameters(), dense.weight], cotangent),
    )


def test_equals_reformer_pytorch():
    reformer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    theirs = reformer.LSHSelfAttention(8, 2, bucket_size=4, n_hashes=3, causal=True).double()
    nn.init.zeros_(theirs.to_out.bias)
    layer = draw(circular=True, scale=4**-0.5, num_buckets=6)
    names = {"toqk.weight": "query_key.weight", "tov.weight": "value.weight", "to_out.weight": "out.weight"}
    state = {names[n]: 4 * p for n, p in theirs.state_dict().items() if n in names}
    layer.load_state_dict({**state, "hash_seed": layer.hash_seed})
    theirs.load_state_dict({n: 4 * p for n, p in theirs.state_dict().items()})
    tokens = x(2, 24, 8)

    def hashed(n_buckets, vectors, **_):
        vectors = vectors.view(2, 2, 24, 4)
        buckets = lsh_buckets(vectors, seeded_normals(torch.tensor(0), (2, 4, 3, 3)), num_buckets=n_buckets)
        return (buckets + n_buckets * torch.arange(3)[:, None]).view(4, -1)

    theirs.lsh_attn.hash_vectors = hashed
    torch.testing.assert_close(layer(tokens, is_causal=True), theirs(tokens), rtol=1e-5, atol=1e-5)


def test_finds_the_token_that_a_full_attention_would():
    """Of pairs of near directions among 512 tokens, one finds the other by hashing alone."""
    layer = LSHAttention(32, 1, chunk_size=16, num_hashes=8)
    nn.init.eye_(layer.query_key.weight)
    half = torch.randn(1, 256, 32)
    tokens = 4 * torch.cat([half, half + 0.1 * torch.randn_like(half)], 1)
    weights = layer.weights(tokens)[0, 0]
    partner = torch.arange(512).roll(256)
    assert (weights.argmax(-1) == partner).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_finite(kind, dtype):
    layer, tokens = draw(kind, dtype=dtype), torch.randn(2, 37, 8, dtype=dtype, requires_grad=True)
    key_mask = torch.arange(37) < torch.tensor([[30], [0]])
    out = layer(tokens, key_mask=key_mask, is_causal=True)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(
        out, [tokens, *layer.parameters()], torch.randn_like(out), allow_unused=True
    )
    assert all(t.isfinite().all() for t in [out, *gradients])


def test_any_length_works():
    layer = draw()
    for length in 0, 1, 2, 4, 5, 9:
        assert layer(x(2, length, 8), is_causal=True).shape == (2, length, 8)
    torch.testing.assert_close(layer(tokens := x(2, 1, 8)), layer.out(layer.value(tokens)))


def test_dropout_is_in_training_only():
    layer, tokens = draw(dropout=0.5), x(2, 11, 8)
    assert not torch.equal(layer(tokens), layer(tokens))
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))


def test_defaults_are_eight_heads_of_four_rounds_over_chunks_of_64_that_look_back():
    layer = LSHAttention(16)
    assert (layer.num_heads, layer.num_hashes, layer.chunk_size) == (8, 4, 64)
    assert (layer.look_back, layer.look_ahead, layer.scale, layer.seed) == (1, 0, 1.0, 0)


def test_a_chunk_may_be_one_token():
    weights = draw(chunk_size=1, num_hashes=1, look_back=0).weights(x(1, 5, 8))
    torch.testing.assert_close(weights, torch.eye(5, dtype=torch.float64).expand(1, 2, 5, 5))


def test_starts_xavier_uniform_and_has_three_projections():
    layer = LSHAttention(64, 4, bias=True)
    for projection in layer.query_key, layer.value, layer.out:
        assert projection.weight.abs().max() <= (6 / 128) ** 0.5
        assert projection.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
        assert (projection.bias == 0).all()
    assert sum(p.numel() for p in LSHAttention(64, 4, head_dim=8).parameters()) == 3 * 64 * 32


@pytest.mark.parametrize("name", ["mask", "bias", "key"])
def test_what_it_cannot_honour_is_not_in_its_signature(name):
    with pytest.raises(TypeError, match=name):
        draw()(x(2, 5, 8), **{name: x(5, 5)})


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((8, 3), {}, "num_heads must divide dim, got dim=8 and num_heads=3"),
        ((8, 2), {"chunk_size": 0}, "chunk_size and num_hashes must be positive.*chunk_size=0"),
        ((8, 2), {"num_hashes": 0}, "num_hashes=0"),
        ((8, 2), {"look_back": -1}, "look_back and look_ahead not negative.*look_back=-1"),
        ((8, 2), {"look_ahead": -1}, "look_ahead=-1"),
        ((8, 2), {"num_buckets": 7}, "num_buckets must be even, or 1, or a pair of such, got 7"),
        ((8, 2), {"num_buckets": (4, 3)}, r"got \(4, 3\)"),
        ((8, 2), {"num_buckets": 0}, "got 0"),
        ((8, 2), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes_are_named(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        LSHAttention(*sizes, **options)


def test_a_bad_mask_is_named():
    with pytest.raises(ValueError, match=r"key_mask must broadcast to \(2, 5\), got \(2, 4\)"):
        draw()(x(2, 5, 8), key_mask=torch.ones(2, 4).bool())
