"""Attention with a Gaussian prior: its formula and its gradient by hand, its limits, and its regulariser."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import use_backend
from lamina.layers import (
    GaussianAttention,
    KeyValueCache,
    MultiHeadAttention,
    RotaryPositions,
    orthogonality_penalty,
)
from lamina.viz import capture_attention
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

sizes, seeds = st.integers(1, 7), st.integers(0, 2**31)


def draw(windows: tuple[float, ...] = (0.5, 1, 2, 4), **options) -> GaussianAttention:
    """A layer with projections of order one."""
    layer = GaussianAttention(8, 4, windows=windows, dtype=torch.float64, **options)
    for name, parameter in layer.named_parameters():
        if name != "log_sigma":
            nn.init.normal_(parameter, std=0.5)
    return layer


def plain_twin(layer: GaussianAttention, **options) -> MultiHeadAttention:
    plain = MultiHeadAttention(8, 4, dtype=torch.float64, **options)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "log_sigma"})
    return plain


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def prior_in_loops(sigma: list[float], queries: int, keys: int) -> Tensor:
    """The equation, place by place: query i stands at place i + Lk - Lq."""
    return torch.tensor(
        [
            [[-((i + keys - queries - j) ** 2) / (2 * s**2) for j in range(keys)] for i in range(queries)]
            for s in sigma
        ],
        dtype=torch.float64,
    )


@given(queries=sizes, keys=sizes, sigma=st.lists(st.floats(0.1, 50), min_size=4, max_size=4))
def test_the_prior_is_its_equation(queries, keys, sigma):
    layer = draw(tuple(sigma))
    torch.testing.assert_close(layer.sigma.tolist(), sigma)
    prior = layer.prior(queries, keys)
    torch.testing.assert_close(prior, prior_in_loops(sigma, queries, keys))
    assert prior.shape == (4, queries, keys)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@given(seed=seeds, queries=sizes, keys=sizes, is_causal=st.booleans())
def test_is_plain_attention_with_the_prior_as_its_bias(backend, seed, queries, keys, is_causal):
    torch.manual_seed(seed)
    layer, query, key, value = draw(), x(3, queries, 8), x(3, keys, 8), x(3, keys, 8)
    plain, prior = plain_twin(layer), prior_in_loops([0.5, 1, 2, 4], queries, keys)
    given = {
        "key_mask": torch.rand(3, keys) < 0.7,
        "mask": torch.rand(queries, keys) < 0.7,
        "is_causal": is_causal,
    }
    bias = x(3, 1, queries, keys)
    with use_backend(backend):
        torch.testing.assert_close(
            layer(query, key, value, **given), plain(query, key, value, bias=prior, **given)
        )
        torch.testing.assert_close(
            layer(query, key, bias=bias, **given), plain(query, key, bias=prior + bias, **given)
        )
    torch.testing.assert_close(
        layer.weights(query, key, bias=bias, **given), plain.weights(query, key, bias=prior + bias, **given)
    )


def test_the_prior_multiplies_the_weights_with_a_gaussian():
    layer, tokens = draw(), x(2, 7, 8)
    distances = torch.arange(7)[:, None] - torch.arange(7)
    density = torch.exp(-0.5 * (distances / layer.sigma[:, None, None]) ** 2)
    product = plain_twin(layer).weights(tokens) * density
    torch.testing.assert_close(layer.weights(tokens), product / product.sum(-1, keepdim=True))


def test_gradients_of_sigma_and_tokens_are_those_of_the_formula():
    layer, tokens, cotangent = draw(), x(2, 5, 8), x(2, 5, 8)
    key_mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    def formula(tokens: Tensor, log_sigma: Tensor) -> Tensor:
        q, k, v = (
            p(tokens).unflatten(-1, (4, 2)).transpose(1, 2) for p in (layer.query, layer.key, layer.value)
        )
        squared = (torch.arange(5)[:, None] - torch.arange(5)) ** 2
        scores = q @ k.mT / math.sqrt(2) - squared / (2 * log_sigma.exp()[:, None, None] ** 2)
        weights = scores.masked_fill(~key_mask[:, None, None], -math.inf).softmax(-1)
        return layer.out((weights @ v).transpose(1, 2).flatten(2))

    tokens.requires_grad_()
    of = [tokens, layer.log_sigma]
    actual = torch.autograd.grad(layer(tokens, key_mask=key_mask), of, cotangent)
    expected = torch.autograd.grad(formula(*of), of, cotangent)
    torch.testing.assert_close(actual, expected)

    def call(tokens: Tensor, log_sigma: Tensor) -> Tensor:
        given = ((tokens,), {"key_mask": key_mask})
        return torch.func.functional_call(layer, {"log_sigma": log_sigma}, *given)

    with use_backend("reference"):
        assert gradcheck(call, of)
        assert gradgradcheck(call, of)


@given(seed=seeds, length=sizes)
def test_a_wide_sigma_is_plain_attention(seed, length):
    torch.manual_seed(seed)
    layer, tokens = draw((1e9,)), x(2, length, 8)
    torch.testing.assert_close(layer(tokens), plain_twin(layer)(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [1e-2, 1e-8, 1e-30])
def test_a_narrow_sigma_attends_to_the_own_place_alone(sigma, dtype):
    layer = draw((sigma,)).to(dtype)
    tokens = x(2, 5, 8).to(dtype)
    torch.testing.assert_close(layer.weights(tokens), torch.eye(5, dtype=dtype).expand(2, 4, 5, 5))
    torch.testing.assert_close(layer(tokens), layer.out(layer.value(tokens)))
    assert layer.prior(3, 1000).isfinite().all()
    gradients = torch.autograd.grad(layer(tokens), list(layer.parameters()), torch.randn_like(tokens))
    assert all(g.isfinite().all() for g in gradients)


def test_a_far_key_is_still_a_key_in_half_precision():
    """At 700 tokens the prior is beyond half precision's range: -inf would exclude the only key."""
    layer = draw((1.0,)).half()
    tokens, key_mask = x(1, 700, 8).half(), torch.arange(700)[None] < 1
    out = layer(tokens[:, -1:], tokens, key_mask=key_mask)
    torch.testing.assert_close(out, layer.out(layer.value(tokens[:, :1])))
    with torch.autocast("cpu", torch.float16), use_backend("torch"):
        # Float32 parameters: the prior meets the projections in half precision all the same.
        out = layer.float()(tokens[:, -1:].float(), tokens.float(), key_mask=key_mask)
    torch.testing.assert_close(
        out.float(), layer.out(layer.value(tokens[:, :1].float())), rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize("learnable", [True, False])
def test_without_its_gradient_the_prior_stays_on_the_fused_path(learnable):
    """Beyond the CPU's rule for short sequences. For a mask of three dimensions PyTorch leaves the path."""
    layer, tokens = draw(learnable=learnable), x(2, 61, 8)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(tokens)
    assert any("flash_attention_for_cpu" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_near(dtype):
    layer, tokens = draw(), x(2, 7, 8).to(dtype)
    exact = layer(tokens.double(), is_causal=True)
    actual = layer.to(dtype)(tokens, is_causal=True)
    assert actual.dtype is dtype
    assert layer.prior(3, 3).dtype is torch.float32
    assert ((actual.double() - exact).norm() / exact.norm()).item() < 0.03


@given(seed=seeds, queries=sizes, keys=sizes, padding=sizes)
def test_what_is_masked_has_no_influence(seed, queries, keys, padding):
    """Padding stands before the keys, so that the last of them keeps its distance to the last query."""
    torch.manual_seed(seed)
    layer, query, key = draw(), x(2, queries, 8), x(2, keys, 8)
    padded = torch.cat([torch.full((2, padding, 8), 1e3).double(), key], dim=1).requires_grad_()
    key_mask = torch.arange(keys + padding).expand(2, -1) >= padding
    out, expected = layer(query, padded, key_mask=key_mask), layer(query, key)
    torch.testing.assert_close(out, expected)
    cotangent, parameters = torch.randn_like(out), list(layer.parameters())
    gradient, *of_parameters = torch.autograd.grad(out, [padded, *parameters], cotangent)
    assert (gradient[:, :padding] == 0).all()
    torch.testing.assert_close(of_parameters, list(torch.autograd.grad(expected, parameters, cotangent)))


@given(seed=seeds, length=sizes, at=sizes)
def test_causal_reaches_no_later_token(seed, length, at):
    torch.manual_seed(seed)
    at %= length
    layer, tokens = draw(), x(2, length, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(tokens, is_causal=True)[:, at], tokens, x(2, 8))
    assert (gradient[:, at + 1 :] == 0).all()
    assert (gradient[:, : at + 1] != 0).any()


@given(seed=seeds, length=sizes)
def test_rows_of_a_batch_do_not_meet_and_a_mirror_image_is_mirrored(seed, length):
    torch.manual_seed(seed)
    layer, tokens = draw(), x(3, length, 8)
    torch.testing.assert_close(layer(tokens[1:2]), layer(tokens)[1:2])
    torch.testing.assert_close(layer(tokens.flip(1)), layer(tokens).flip(1))


def test_a_query_without_keys_gives_the_bias_of_the_output():
    layer, tokens = draw(), x(2, 3, 8).requires_grad_()
    out = layer(tokens, key_mask=torch.tensor([[False] * 3, [True] * 3]))
    torch.testing.assert_close(out[0], layer.out.bias.expand(3, 8))
    gradients = torch.autograd.grad(out[0], [tokens, layer.log_sigma], x(3, 8))
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("options", [{}, {"rotary": RotaryPositions(2), "num_kv_heads": 2}])
@given(seed=seeds, steps=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_cached_equals_uncached(options, seed, steps):
    torch.manual_seed(seed)
    layer, tokens = draw(**options), x(2, sum(steps), 8)
    cache, at, outputs = KeyValueCache(), 0, []
    for n in steps:
        outputs.append(layer(tokens[:, at : at + n], is_causal=True, cache=cache))
        at += n
    torch.testing.assert_close(torch.cat(outputs, 1), layer(tokens, is_causal=True))


def test_cross_attention_with_a_cache_keeps_its_distances():
    layer, query, memory, cache = draw(), x(2, 3, 8), x(2, 5, 8), KeyValueCache()
    for _ in range(3):
        torch.testing.assert_close(layer(query, memory, cache=cache), layer(query, memory))


def test_options_of_multi_head_attention_reach_it():
    options = {"num_kv_heads": 2, "head_dim": 3, "key_dim": 7, "value_dim": 11, "bias": False}
    layer = GaussianAttention(8, 4, **options, qk_norm=nn.RMSNorm, dropout=0.5)
    out = layer(torch.randn(2, 3, 8), torch.randn(2, 5, 7), torch.randn(2, 5, 11))
    assert out.shape == (2, 3, 8)
    assert layer.value.weight.shape == (6, 11)
    assert layer.query.bias is None
    tokens = torch.randn(2, 3, 8), torch.randn(2, 5, 7), torch.randn(2, 5, 11)
    assert not torch.equal(layer(*tokens), layer(*tokens))
    layer.eval()
    assert torch.equal(layer(*tokens), layer(*tokens))


def test_windows_go_round_the_heads_and_come_back_by_a_reset():
    layer = GaussianAttention(12, 6)
    torch.testing.assert_close(layer.sigma.tolist(), [5.0, 10.0, 20.0, 40.0, 5.0, 10.0])
    with torch.no_grad():
        layer.log_sigma.zero_()
        layer.query.bias.fill_(1)
    layer.reset_parameters()
    torch.testing.assert_close(layer.sigma.tolist(), [5.0, 10.0, 20.0, 40.0, 5.0, 10.0])
    assert (layer.query.bias == 0).all()


def test_sigma_is_a_buffer_where_it_does_not_learn():
    layer = GaussianAttention(8, learnable=False)
    assert "log_sigma" not in dict(layer.named_parameters())
    assert "log_sigma" in layer.state_dict()
    assert "log_sigma" in dict(GaussianAttention(8).named_parameters())


def test_its_weights_are_captured():
    layer, tokens = draw(), x(2, 7, 8)
    with capture_attention(layer) as record:
        layer(tokens, is_causal=True)
    torch.testing.assert_close(record[""], [layer.weights(tokens, is_causal=True)])


@given(seed=seeds, heads=st.integers(1, 5), rows=st.integers(1, 3), columns=st.integers(5, 7))
def test_penalty_of_orthogonal_heads_is_none_and_of_alike_heads_the_most(seed, heads, rows, columns):
    torch.manual_seed(seed)
    orthogonal = torch.linalg.qr(x(rows * columns, heads)).Q.T * (
        1 + torch.rand(heads, 1)
    )  # lengths are free
    weight = orthogonal.reshape(heads * rows, columns)
    assert orthogonality_penalty(weight, heads).item() == pytest.approx(0, abs=1e-12)
    one = x(rows, columns)
    alike = one.repeat(heads, 1)
    assert orthogonality_penalty(alike, heads).item() == pytest.approx(heads * (heads - 1))
    # A head's direction may be turned round: what is orthogonal stays so, and what is alike too.
    signs = torch.tensor([(-1.0) ** h for h in range(heads)]).repeat_interleave(rows)[:, None]
    assert orthogonality_penalty(alike * signs, heads).item() == pytest.approx(heads * (heads - 1))


def test_penalty_in_loops_and_its_gradient():
    weight = x(6, 5).requires_grad_()
    rows = weight.detach().reshape(3, 10)
    expected = sum(
        float(rows[a] @ rows[b] / rows[a].norm() / rows[b].norm()) ** 2
        for a in range(3)
        for b in range(3)
        if a != b
    )
    assert orthogonality_penalty(weight, 3).item() == pytest.approx(expected)
    assert gradcheck(lambda w: orthogonality_penalty(w, 3), (weight,))
    assert gradgradcheck(lambda w: orthogonality_penalty(w, 3), (weight,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_penalty_of_a_head_of_zeros_is_one_and_its_gradient_finite(dtype):
    weight = torch.zeros(4, 3, dtype=dtype)
    weight[0] = 1
    weight.requires_grad_()
    penalty = orthogonality_penalty(weight, 2)
    assert penalty.dtype is torch.float32
    assert penalty.item() == pytest.approx(1)
    assert torch.autograd.grad(penalty, weight)[0].isfinite().all()


def test_penalty_of_the_layer_is_of_its_values_and_training_lowers_it():
    layer = draw(num_kv_heads=2)
    torch.testing.assert_close(layer.orthogonality_penalty(), orthogonality_penalty(layer.value.weight, 2))
    first = layer.orthogonality_penalty().item()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    for _ in range(50):
        optimizer.zero_grad()
        layer.orthogonality_penalty().backward()
        optimizer.step()
    assert layer.orthogonality_penalty().item() < 0.1 * first


@pytest.mark.parametrize("windows", [(), (5, 0), (-1.0,)])
def test_bad_windows_are_named(windows):
    with pytest.raises(ValueError, match="windows must be positive, one at the least, got"):
        GaussianAttention(8, windows=windows)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(3, 3).bool(), "bias must be a float that is added to the scores, got torch.bool"),
        (torch.ones(2, 3, 3), r"bias must broadcast to \(2, 4, 3, 3\), got \(2, 3, 3\)"),
    ],
)
def test_a_bad_bias_is_named(bias, message):
    for method in "forward", "weights":
        with pytest.raises(ValueError, match=message):
            getattr(draw(), method)(x(2, 3, 8), bias=bias)


@pytest.mark.parametrize(("shape", "heads"), [((6, 5), 4), ((6,), 2), ((6, 5), 0)])
def test_a_bad_weight_is_named(shape, heads):
    with pytest.raises(ValueError, match="weight must be a matrix whose rows num_heads divides"):
        orthogonality_penalty(x(*shape), heads)
