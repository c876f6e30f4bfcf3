"""Rotary positions: the formula, and what it is for: scores that see distances only."""

import cmath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import RotaryPositions
from torch.autograd import gradcheck

sizes, seeds, offsets = st.integers(1, 6), st.integers(0, 2**31), st.integers(0, 1000)
forms = pytest.mark.parametrize("interleaved", [False, True])


@pytest.mark.parametrize("base", [10000.0, 7.0])
@forms
def test_each_pair_is_a_complex_number_that_turns(interleaved, base):
    dim, length = 10, 5
    x = torch.randn(3, length, dim, dtype=torch.float64)
    y = RotaryPositions(dim, base=base, interleaved=interleaved)(x, offset=7)
    for m in range(length):
        for i in range(dim // 2):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
            turn = cmath.exp(1j * (m + 7) * base ** (-2 * i / dim))
            expected = complex(x[2, m, a], x[2, m, b]) * turn
            assert complex(y[2, m, a], y[2, m, b]) == pytest.approx(expected, abs=1e-12)


@forms
@given(seed=seeds, queries=sizes, keys=sizes, pairs=sizes, offset=offsets, shift=offsets)
def test_scores_depend_on_distances_only(interleaved, seed, queries, keys, pairs, offset, shift):
    torch.manual_seed(seed)
    rotary = RotaryPositions(2 * pairs, interleaved=interleaved)
    query, key = (torch.randn(2, n, 2 * pairs, dtype=torch.float64) for n in (queries, keys))
    scores = rotary(query, offset=offset) @ rotary(key).mT
    shifted = rotary(query, offset=offset + shift) @ rotary(key, offset=shift).mT
    torch.testing.assert_close(shifted, scores)


@forms
@given(seed=seeds, length=sizes, pairs=sizes, offset=offsets)
def test_lengths_are_kept_and_position_zero_stands_still(interleaved, seed, length, pairs, offset):
    torch.manual_seed(seed)
    rotary = RotaryPositions(2 * pairs, interleaved=interleaved)
    x = torch.randn(3, length, 2 * pairs, dtype=torch.float64)
    torch.testing.assert_close(rotary(x, offset=offset).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotary(x)[:, 0], x[:, 0])


@given(seed=seeds, length=st.integers(2, 7), offset=offsets)
def test_one_token_at_a_time_equals_all_at_once(seed, length, offset):
    torch.manual_seed(seed)
    rotary, x = RotaryPositions(6), torch.randn(2, 3, length, 6)
    steps = [rotary(x[:, :, m : m + 1], offset=offset + m) for m in range(length)]
    assert torch.equal(torch.cat(steps, 2), rotary(x, offset=offset))


def test_positions_may_differ_between_rows():
    rotary, x = RotaryPositions(6), torch.randn(2, 3, 5, 6)
    positions = torch.stack([torch.arange(5), torch.tensor([0, 0, 0, 1, 2])]).unsqueeze(1)
    y = rotary(x, positions=positions)
    assert torch.equal(y[0], rotary(x[0]))
    assert torch.equal(y[1, :, 2:], rotary(x[1, :, 2:]))
    assert torch.equal(y[1, :, 1], x[1, :, 1])
    assert torch.equal(rotary(x, positions=positions[0, 0] + 2, offset=3), rotary(x, offset=5))


def test_the_forms_differ_by_a_permutation_of_the_channels():
    x = torch.randn(2, 3, 5, 10)
    order = torch.arange(10).view(2, 5).T.flatten()  # 0 5 1 6 …: halves to neighbours
    halves, neighbours = RotaryPositions(10), RotaryPositions(10, interleaved=True)
    assert torch.equal(neighbours(x[..., order]), halves(x)[..., order])


def test_equals_the_rotary_embedding_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=3 * 16, num_attention_heads=3, head_dim=16)
    query, key = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    cosine, sine = llama.LlamaRotaryEmbedding(config)(query, torch.arange(11, 18).unsqueeze(0))
    expected = llama.apply_rotary_pos_emb(query, key, cosine, sine)
    rotary = RotaryPositions(16)
    torch.testing.assert_close((rotary(query, offset=11), rotary(key, offset=11)), expected)


def test_half_precision_keeps_the_angles():
    x = torch.randn(2, 5, 64)
    for dtype in torch.float16, torch.bfloat16:
        low = RotaryPositions(64).to(dtype)(x.to(dtype), offset=5000)
        assert low.dtype is dtype
        exact = RotaryPositions(64)(x.to(dtype).float(), offset=5000)
        assert torch.equal(low, exact.to(dtype))
    expected = RotaryPositions(64)(x, offset=5000)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(RotaryPositions(64)(x, offset=5000), expected)


def test_float64_is_computed_in_float64():
    x = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    y = RotaryPositions(2)(x, offset=12345)
    expected = 1j * cmath.exp(12345j)
    assert complex(y[0, 0], y[0, 1]) == pytest.approx(expected, abs=1e-15)


def test_there_is_nothing_to_lose_without_memory():
    x, expected = torch.randn(2, 5, 6), RotaryPositions(6)
    with torch.device("meta"):
        rotary = RotaryPositions(6)
    assert not [*rotary.parameters(), *rotary.buffers()]
    assert torch.equal(rotary.to_empty(device="cpu")(x), expected(x))
    assert rotary(x.to("meta")).device.type == "meta"


@forms
def test_gradients(interleaved):
    rotary = RotaryPositions(6, interleaved=interleaved)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: rotary(x, offset=2), x)


def test_compiles_for_any_length_and_offset():
    rotary = RotaryPositions(6)
    compiled = torch.compile(rotary, fullgraph=True, dynamic=True, backend="aot_eager")
    for length, offset in (5, 0), (7, 3), (11, 13):
        x = torch.randn(2, length, 6)
        torch.testing.assert_close(compiled(x, offset=offset), rotary(x, offset=offset))


@pytest.mark.parametrize("dim", [7, 0, -2])
def test_a_head_that_has_no_pairs_is_refused(dim):
    with pytest.raises(ValueError, match=f"dim must be even and positive, got dim={dim}"):
        RotaryPositions(dim)


@pytest.mark.parametrize("shape", [(2, 5, 4), (6,)])
def test_wrong_inputs_are_named(shape):
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., L, 6\)"):
        RotaryPositions(6)(torch.randn(shape))


@pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 1, 1, 5), (2, 1, 4), ()])
def test_wrong_positions_are_named(shape):
    with pytest.raises(ValueError, match=r"positions must be \(5,\)"):
        RotaryPositions(6)(torch.randn(2, 2, 5, 6), positions=torch.zeros(shape, dtype=torch.long))


def test_repr_tells_its_form():
    assert repr(RotaryPositions(6, base=7.0)) == "RotaryPositions(6, base=7.0, interleaved=False)"
