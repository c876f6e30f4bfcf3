"""Local attention: its definition, the chunks in the batch against it, and the package that people use."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import explain, local_attention, use_backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

seeds = st.integers(0, 2**31)
lengths = st.integers(1, 17)
REACH = [(1, 0), (1, 1), (0, 0), (2, 1), (0, 2)]
on_the_device = pytest.mark.usefixtures("kernels_device")


def draw(*sizes: int, dtype=torch.float64) -> list[Tensor]:
    batch, heads, length, dim = sizes
    shapes = sizes, sizes, (batch, heads, length, dim + 2)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def in_numpy(query, key, value, *, window, look_back, look_ahead, key_mask=None, is_causal=False, scale=None):
    """The formula, one query and one key at a time."""
    query, key, value = (t.detach().numpy() for t in (query, key, value))
    batch, heads, length, dim = query.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out = np.zeros(value.shape)
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        near = [j for j in range(length) if -look_back <= j // window - i // window <= look_ahead]
        near = [j for j in near if (key_mask is None or key_mask[b, j]) and (not is_causal or j <= i)]
        if near:
            weights = np.exp([scale * query[b, h, i] @ key[b, h, j] for j in near])
            out[b, h, i] = weights / weights.sum() @ value[b, h, near]
    return torch.from_numpy(out)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("look_back", "look_ahead"), REACH)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@given(seed=seeds, length=lengths, window=st.integers(1, 7))
def test_is_the_formula(backend, look_back, look_ahead, is_causal, with_mask, seed, length, window):
    torch.manual_seed(seed)
    inputs = draw(2, 2, length, 3)
    options = {"window": window, "look_back": look_back, "look_ahead": look_ahead, "is_causal": is_causal}
    options["key_mask"] = torch.rand(2, length) < 0.7 if with_mask else None
    with use_backend(backend):
        actual = local_attention(*inputs, **options)
    torch.testing.assert_close(actual, in_numpy(*inputs, **options))


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [60, 61, 5])
def test_torch_path_is_as_exact_as_the_definition(length, is_causal, dtype, compare):
    key_mask = torch.rand(2, length) < 0.8
    key_mask[1] = False

    def operation(query, key, value):
        return local_attention(
            query, key, value, window=12, look_ahead=1, key_mask=key_mask, is_causal=is_causal
        )

    compare(operation, draw(2, 3, length, 5, dtype=dtype), backend="torch")


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
@given(seed=seeds, length=lengths, padding=st.integers(1, 9))
def test_padding_has_no_influence(backend, seed, length, padding):
    torch.manual_seed(seed)
    inputs = draw(2, 2, length, 3)
    longer = [torch.cat([t, 9 * torch.randn(2, 2, padding, t.shape[-1])], 2) for t in inputs]
    longer = [t.detach().requires_grad_() for t in longer]
    key_mask = (torch.arange(length + padding) < length).expand(2, -1)
    with use_backend(backend):
        expected = local_attention(*inputs, window=4, look_ahead=1)
        out = local_attention(*longer, window=4, look_ahead=1, key_mask=key_mask)
        torch.testing.assert_close(out[:, :, :length], expected)
        gradients = torch.autograd.grad(out, longer[1:], torch.randn_like(out))
    assert all((g[:, :, length:] == 0).all() for g in gradients)


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
@given(seed=seeds, length=lengths, at=st.integers(0, 16))
def test_causal_reaches_no_later_key(backend, seed, length, at):
    torch.manual_seed(seed)
    at %= length
    inputs = draw(1, 2, length, 3)
    with use_backend(backend):
        out = local_attention(*inputs, window=3, look_ahead=1, is_causal=True)
        gradients = torch.autograd.grad(out[:, :, at], inputs, torch.randn_like(out[:, :, at]))
    assert all((g[:, :, at + 1 :] == 0).all() for g in gradients)
    first = max(0, at // 3 - 1) * 3  # and no chunk but its own and the one before
    assert all((g[:, :, :first] == 0).all() for g in gradients)


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_without_keys_it_gives_zero_and_passes_no_gradient(backend):
    inputs = draw(2, 2, 11, 3, dtype=torch.float32)
    key_mask = torch.tensor([[True] * 11, [False] * 11])
    with use_backend(backend):
        out = local_attention(*inputs, window=3, key_mask=key_mask)
    assert (out[1] == 0).all()
    assert all((g[1] == 0).all() for g in torch.autograd.grad(out, inputs, torch.randn_like(out)))


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_nothing_gives_nothing(backend):
    with use_backend(backend):
        assert local_attention(*draw(2, 3, 0, 5), window=4).shape == (2, 3, 0, 7)
        assert local_attention(*draw(0, 3, 9, 5), window=4).shape == (0, 3, 9, 7)


def test_gradients_of_the_definition_to_second_order():
    inputs, key_mask = draw(1, 2, 7, 2), torch.tensor([[True, True, False, True, True, True, False]])

    def operation(query, key, value):
        return local_attention(query, key, value, window=2, key_mask=key_mask, is_causal=True)

    with use_backend("reference"):
        assert gradcheck(operation, inputs, check_forward_ad=True)
        assert gradgradcheck(operation, inputs, fast_mode=True)


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_by_default_it_sees_one_chunk_back(backend):
    inputs = draw(1, 2, 13, 3)
    with use_backend(backend):
        expected = local_attention(*inputs, window=3, look_back=1, look_ahead=0)
        torch.testing.assert_close(local_attention(*inputs, window=3), expected, rtol=0, atol=0)
        assert not torch.allclose(local_attention(*inputs, window=3, look_back=2), expected)


@on_the_device
def test_forward_derivatives_take_the_definition():
    query, key, value = (t.detach() for t in draw(1, 1, 130, 3))
    tangent = torch.randn_like(query)

    def operation(query):
        return local_attention(query, key, value, window=64)

    _, actual = torch.func.jvp(operation, (query,), (tangent,))
    with use_backend("reference"):
        _, expected = torch.func.jvp(operation, (query,), (tangent,))
    torch.testing.assert_close(actual, expected)


@on_the_device
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_scale_and_dropout_reach_the_attention(backend):
    query, key, value = draw(1, 2, 13, 4)
    with use_backend(backend):
        expected = local_attention(query, key, value, window=3)
        torch.testing.assert_close(local_attention(2 * query, key, value, window=3, scale=0.25), expected)
        dropped = local_attention(
            torch.zeros(1, 1, 400, 2),
            torch.zeros(1, 1, 400, 2),
            torch.ones(1, 1, 400, 3),
            window=100,
            dropout=0.3,
        )
    assert dropped.mean().item() == pytest.approx(1.0, rel=0.02)
    assert dropped.std() > 0.01


def test_takes_the_path_that_it_says():
    query, key, value = draw(1, 2, 200, 4)
    inputs = query, key, value[..., :4]  # PyTorch fuses values of the keys' size only
    assert explain(local_attention, *inputs, window=100).chosen == "torch"
    with use_backend("reference"):
        assert explain(local_attention, *inputs, window=100).chosen == "reference"
        assert "ScaledDotProduct" not in names(local_attention(*inputs, window=100))
    assert "ScaledDotProduct" in names(local_attention(*inputs, window=100))


def names(out: Tensor) -> str:
    """Of all that a backward pass would run."""
    found, ahead = [], [out.grad_fn]
    while ahead:
        node = ahead.pop()
        found.append(node.name())
        ahead += [n for n, _ in node.next_functions if n is not None]
    return " ".join(found)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(("look_back", "look_ahead"), REACH)
def test_equals_the_package_local_attention(look_back, look_ahead, with_mask, is_causal):
    package = pytest.importorskip("local_attention")
    if is_causal:
        look_ahead = 0
    theirs = package.LocalAttention(
        8,
        causal=is_causal,
        look_backward=look_back,
        look_forward=look_ahead,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    query, key, value = draw(2, 3, 61, 5)
    value = value[..., :5].detach().requires_grad_()  # they need one size
    inputs = [query, key, value]
    key_mask = torch.arange(61) < torch.tensor([[61], [43]])
    # Theirs has the mean of what is hidden where nothing is seen; past its own end look_back sees nothing.
    key_mask[:, ::8] = True
    if not with_mask:  # their autopad lets padding take part without one
        key_mask = torch.ones(2, 61).bool()
    expected = theirs(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), mask=key_mask).view(
        2, 3, 61, 5
    )
    actual = local_attention(
        *inputs, window=8, look_back=look_back, look_ahead=look_ahead, key_mask=key_mask, is_causal=is_causal
    )
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


Q = (2, 3, 11, 5)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ((Q[1:], Q, Q), {}, r"expected query and key \(B, H, L, D\).*got query \(3, 11, 5\)"),
        ((Q, (2, 3, 7, 5), Q), {}, r"key \(2, 3, 7, 5\)"),
        ((Q, Q, (2, 3, 7, 5)), {}, r"value \(2, 3, 7, 5\)"),
        ((Q, Q, Q), {"window": 0}, "window must be positive.*got window=0"),
        ((Q, Q, Q), {"look_back": -1}, "look_back and look_ahead not negative.*look_back=-1"),
        ((Q, Q, Q), {"look_ahead": -1}, "look_ahead=-1"),
        ((Q, Q, Q), {"key_mask": torch.ones(11).bool()}, r"must be \(B, L\) = \(2, 11\), got \(11,\)"),
        ((Q, Q, Q), {"key_mask": torch.ones(2, 7).bool()}, r"key_mask must broadcast to \(2, 11\)"),
        ((Q, Q, Q), {"key_mask": torch.ones(2, 11)}, "key_mask must be boolean.*got torch.float32"),
        ((Q, Q, Q), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input_is_named(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        local_attention(*(torch.zeros(shape) for shape in shapes), **{"window": 3, **options})


def test_bad_dtypes_are_named():
    query, key, value = draw(2, 3, 11, 5)
    with pytest.raises(ValueError, match="query, key and value must share one dtype"):
        local_attention(query, key.float(), value, window=3)
