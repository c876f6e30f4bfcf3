"""Packed sequences: each is attention by itself, whatever stands beside it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import DistanceBias, dot_product_attention, packed_attention, use_backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

seeds = st.integers(0, 2**31)
lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=0, max_size=4)
on_every_backend = pytest.mark.parametrize("backend", ["reference", "torch"])
on_the_device = pytest.mark.usefixtures("kernels_device")


def draw(queries: int, keys: int) -> list[Tensor]:
    shapes = (queries, 4, 5), (keys, 2, 5), (keys, 2, 3)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def starts(numbers) -> Tensor:
    return torch.tensor([0, *numbers]).cumsum(0)


@on_the_device
@on_every_backend
@given(seed=seeds, lengths=lengths, options=st.sampled_from([{}, {"is_causal": True}, {"window": (1, 2)}]))
def test_each_sequence_is_attention_by_itself(backend, seed, lengths, options):
    torch.manual_seed(seed)
    of_queries, of_keys = starts(q for q, _ in lengths), starts(k for _, k in lengths)
    query, key, value = draw(int(of_queries[-1]), int(of_keys[-1]))
    score_bias = DistanceBias(-torch.rand(4, dtype=torch.float64))
    with use_backend(backend):
        actual = packed_attention(query, key, value, of_queries, of_keys, score_bias=score_bias, **options)
    assert actual.shape == (len(query), 4, 3)
    for b in range(len(lengths)):
        i, j = slice(of_queries[b], of_queries[b + 1]), slice(of_keys[b], of_keys[b + 1])
        q, k, v = (t.transpose(0, 1)[None] for t in (query[i], key[j], value[j]))
        expected = dot_product_attention(q, k, v, score_bias=score_bias, **options)
        torch.testing.assert_close(actual[i], expected[0].transpose(0, 1))


@on_the_device
def test_keys_start_where_queries_do_unless_they_say():
    query, key, value = draw(7, 7)
    at = torch.tensor([0, 3, 7])
    torch.testing.assert_close(
        packed_attention(query, key, value, at), packed_attention(query, key, value, at, at, scale=5**-0.5)
    )
    torch.testing.assert_close(
        packed_attention(query, key, value, at.int(), scale=1.0),
        packed_attention(query * 5**0.5, key, value, at, longest=(4, 4)),
    )


@on_the_device
def test_derivatives():
    inputs, at = draw(5, 5), torch.tensor([0, 2, 5])
    with use_backend("torch"):
        assert gradcheck(lambda *inputs: packed_attention(*inputs, at, is_causal=True), inputs)
        assert gradgradcheck(lambda *inputs: packed_attention(*inputs, at, is_causal=True), inputs)


@on_the_device
def test_dropout_drops():
    query, key, value = draw(50, 50)
    at = torch.tensor([0, 20, 50])
    assert not torch.allclose(
        packed_attention(query, key, value, at, dropout=0.5), packed_attention(query, key, value, at)
    )


AT = torch.tensor([0, 3, 7])
Q, K, V = (7, 4, 5), (7, 2, 5), (7, 2, 3)


@pytest.mark.parametrize(
    ("shapes", "given", "options", "message"),
    [
        ((Q[1:], K, V), (AT,), {}, r"expected query \(N, H, D\).*got query \(4, 5\)"),
        ((Q, K, (6, 2, 3)), (AT,), {}, r"value \(6, 2, 3\)"),
        ((Q, (7, 2, 4), V), (AT,), {}, r"key \(7, 2, 4\)"),
        ((Q, (7, 3, 5), (7, 3, 3)), (AT,), {}, "where G divides H"),
        (
            (Q, K, V),
            (AT.float(),),
            {},
            r"query_starts must be .* of int32 or int64, got \(3,\) of",
        ),
        ((Q, K, V), (AT, AT[:2]), {}, r"key_starts must be \(B \+ 1,\) .*got \(2,\)"),
        ((Q, K, V), (AT[:2],), {}, r"starts must rise from 0 to the number of tokens, 7, got \[0, 3\]"),
        ((Q, K, V), (AT[[1, 0, 2]],), {}, r"got \[3, 0, 7\]"),
        ((Q, K, V), (torch.tensor([0, 5, 3, 7]),), {}, r"got \[0, 5, 3, 7\]"),
        ((Q, K, V), (AT,), {"score_bias": torch.ones(4)}, "score_bias must be a DistanceBias, got Tensor"),
        (
            (Q, K, V),
            (AT,),
            {"score_bias": DistanceBias(torch.ones(3))},
            "must have 4 coefficients.*got 3",
        ),
        ((Q, K, V), (AT,), {"window": (0, -1)}, r"window must be \(before, after\)"),
        ((Q, K, V), (AT,), {"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
    ],
)
def test_bad_input_is_named(shapes, given, options, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*(torch.zeros(shape) for shape in shapes), *given, **options)


def test_dtypes_must_be_one():
    tokens = torch.zeros(7, 4, 5)
    with pytest.raises(ValueError, match=r"must share one dtype, got torch.float32, torch.float64 and"):
        packed_attention(tokens, tokens.double(), tokens, torch.tensor([0, 7]))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("sizes", [(4, 4, 5, 5), (4, 2, 5, 3)], ids=str)
def test_gradients_of_the_one_operation(sizes, options):
    """First and second ones, of heads that PyTorch's fused attention takes and of such as it does not.

    The third sequence has no key, the fourth no query; of the last, causal, two queries see no key.
    """
    of_queries, of_keys = starts([3, 2, 1, 0, 4]), starts([3, 4, 0, 2, 2])
    heads, groups, dim, of_value = sizes
    shapes = (10, heads, dim), (11, groups, dim), (11, groups, of_value)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return packed_attention(*inputs, of_queries, of_keys, **options)

    assert gradcheck(seeded, inputs)
    assert gradgradcheck(seeded, inputs)
    if not options.get("dropout"):
        with use_backend("reference"):
            expected = seeded(*inputs)
        torch.testing.assert_close(seeded(*inputs), expected)


def test_dropout_keeps_the_mean():
    query, key, value = (t.detach() for t in draw(7, 7))
    at = torch.tensor([0, 3, 7])
    drawn = torch.stack([packed_attention(query, key, value, at, dropout=0.3) for _ in range(600)])
    error = (drawn.mean(0) - packed_attention(query, key, value, at)).abs()
    assert (error < 6 * drawn.std(0) / 600**0.5).all()


def test_a_compiled_graph_holds_sequences_of_any_length():
    def attention(query, key, value, at):
        return packed_attention(query, key, value, at, is_causal=True)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in [3, 4], [1, 0, 5, 2, 2], []:
        at = starts(lengths)
        inputs = draw(int(at[-1]), int(at[-1]))
        expected, actual = attention(*inputs, at), compiled(*inputs, at)
        torch.testing.assert_close(actual, expected)
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
        )


def test_half_precision_stays_near():
    inputs, at = [t.float() for t in draw(50, 50)], torch.tensor([0, 20, 50])
    exact = packed_attention(*inputs, at)
    halves = packed_attention(*(t.bfloat16() for t in inputs), at)
    assert halves.dtype is torch.bfloat16
    assert (halves.float() - exact).norm() / exact.norm() < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(*inputs, at).dtype is torch.bfloat16
