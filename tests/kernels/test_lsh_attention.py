"""LSH attention: its definition one pair at a time, its limits, and the two libraries that people use."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import _lsh_chunks, explain, lsh_attention, use_backend
from lamina.kernels._lsh_last import attend_last
from lamina.kernels._lsh_rounds import Options
from lamina.kernels.lsh_attention import lsh_attention_weights
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

seeds = st.integers(0, 2**31)
lengths = st.integers(1, 13)

# What decides which pairs meet, in the combinations that meet each other in the code.
OPTIONS = [
    {},
    {"is_causal": True},
    {"look_back": 2, "look_ahead": 1, "scale": 0.3},
    {"look_back": 0},
    {"same_bucket": True, "is_causal": True},
    {"deduplicate": True},
    {"deduplicate": True, "same_bucket": True, "look_ahead": 1},
    {"circular": True, "is_causal": True},
    {"circular": True, "deduplicate": True, "look_ahead": 1},
    {"circular": True, "same_bucket": True, "deduplicate": True, "look_back": 2},
]
SOME = [OPTIONS[1], OPTIONS[6], OPTIONS[8]]
on_the_device = pytest.mark.usefixtures("kernels_device")


def draw(*sizes: int, rounds: int = 3, num_buckets: int = 4, dtype=torch.float64) -> list[Tensor]:
    batch, heads, length, dim = sizes
    query_key, value = (
        torch.randn(*sizes, dtype=dtype),
        torch.randn(batch, heads, length, dim + 2, dtype=dtype),
    )
    buckets = torch.randint(num_buckets, (batch, heads, rounds, length))
    return [query_key.requires_grad_(), value.requires_grad_(), buckets]


def in_numpy(
    query_key, value, buckets, *, num_buckets, chunk_size, look_back=1, look_ahead=0, circular=False,
    same_bucket=False, deduplicate=False, key_mask=None, is_causal=False, scale=1.0,
):  # fmt: skip
    """The definition, one token and one key at a time. Returns outputs and weights."""
    x, v, buckets = (t.detach().numpy() for t in (query_key, value, buckets))
    (batch, heads, length, dim), rounds = x.shape, buckets.shape[2]
    out, weights = np.zeros(v.shape), np.zeros((batch, heads, length, length))
    for b, h in itertools.product(range(batch), range(heads)):
        real = [t for t in range(length) if key_mask is None or key_mask[b, t]]
        count = math.ceil(length / chunk_size)
        ring = []  # the chunks of all rounds, as lists of (round, token)
        for r in range(rounds):
            order = [(r, t) for t in sorted(real, key=lambda t: (buckets[b, h, r, t], t))]
            ring += [order[c * chunk_size : (c + 1) * chunk_size] for c in range(count)]
        pairs: dict[int, list[int]] = {t: [] for t in real}
        for g, chunk in enumerate(ring):
            around = {(g + o) for o in range(-look_back, look_ahead + 1)}
            if circular:
                around = {n % len(ring) for n in around}
            else:
                around = {n for n in around if n // count == g // count}
            for (r, i), n in itertools.product(chunk, around):
                for s, j in ring[n]:
                    same = r == s and buckets[b, h, r, i] == buckets[b, h, s, j]
                    if (not is_causal or j <= i) and (not same_bucket or same):
                        pairs[i].append(j)
        for i, seen in pairs.items():
            others = [j for j in seen if j != i]
            score = {
                j: scale * x[b, h, i] @ x[b, h, j] / math.sqrt(x[b, h, j] @ x[b, h, j] + 1e-6 * dim)
                - (math.log(others.count(j)) if deduplicate else 0.0)
                for j in others
            }
            top = max(score.values(), default=0.0)
            total = sum(math.exp(score[j] - top) for j in others)
            for j in others:
                weights[b, h, i, j] += math.exp(score[j] - top) / total
            if not others:
                weights[b, h, i, i] = 1.0
        out[b, h] = weights[b, h] @ v[b, h]
    return torch.from_numpy(out), torch.from_numpy(weights)


def masked(batch: int, length: int) -> Tensor:
    mask = torch.rand(batch, length) < 0.7
    mask[-1] = False
    return mask


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("chunk_size", [3, 4, 11])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_formula(options, chunk_size, with_mask):
    query_key, value, buckets = draw(2, 3, 11, 5)
    options = {**options, "num_buckets": 4, "chunk_size": chunk_size}
    options["key_mask"] = masked(2, 11) if with_mask else None
    out, weights = in_numpy(query_key, value, buckets, **options)
    torch.testing.assert_close(lsh_attention(query_key, value, buckets, **options), out)
    torch.testing.assert_close(lsh_attention_weights(query_key, buckets, **options), weights)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(seed=seeds, length=lengths, chunk_size=st.integers(1, 15), rounds=st.integers(1, 4))
def test_is_the_formula_at_every_size(options, seed, length, chunk_size, rounds):
    torch.manual_seed(seed)
    query_key, value, buckets = draw(1, 1, length, 2, rounds=rounds)
    options = {**options, "num_buckets": 4, "chunk_size": chunk_size, "key_mask": torch.rand(1, length) < 0.8}
    out, weights = in_numpy(query_key, value, buckets, **options)
    torch.testing.assert_close(lsh_attention(query_key, value, buckets, **options), out)
    torch.testing.assert_close(lsh_attention_weights(query_key, buckets, **options), weights)


@pytest.mark.parametrize("cells", [1, 2 * 11 * 11, 3 * 11 * 11, 2**19])
def test_on_a_cpu_a_few_heads_at_a_time_are_all_of_them(cells, monkeypatch):
    """One head of one batch, two heads, all of a batch, and everything."""
    monkeypatch.setattr(_lsh_chunks, "CELLS", cells)
    query_key, value, buckets = draw(2, 3, 11, 5)
    options = {"num_buckets": 4, "chunk_size": 5, "key_mask": masked(2, 11), "circular": True}
    cotangent = torch.randn_like(value)
    outcomes = []
    for backend in "torch", "reference":
        with use_backend(backend):
            assert explain(lsh_attention, query_key, value, buckets, **options).chosen == backend
            out = lsh_attention(query_key, value, buckets, **options)
        outcomes.append((out, *torch.autograd.grad(out, query_key, cotangent)))
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected)


IN_CHUNKS = [options for options in OPTIONS if "deduplicate" not in options]
IN_CHUNKS += [
    {"circular": True, "look_ahead": 1},
    {"same_bucket": True},
    {"circular": True, "same_bucket": True},
    {"look_back": 0, "look_ahead": 1, "scale": -2.0},
]


def on_both_paths(query_key, value, buckets, **options) -> list[tuple[Tensor, ...]]:
    """Outputs and gradients on a CPU's path, and the definition's."""
    cotangent, outcomes = torch.randn_like(value), []
    for backend in "torch", "reference":
        with use_backend(backend):
            out = lsh_attention(query_key, value, buckets, **options)
        outcomes.append((out, *torch.autograd.grad(out, (query_key, value), cotangent)))
    assert outcomes[1][0].grad_fn.name() != "_AttendBackward"
    return outcomes


@pytest.mark.parametrize("options", IN_CHUNKS, ids=str)
@given(
    seed=seeds,
    length=lengths,
    chunk_size=st.integers(1, 15),
    rounds=st.integers(1, 4),
    cells=st.integers(1, 300),
    highest=st.sampled_from([_lsh_chunks.FLAT, -1.0]),
)
def test_in_chunks_is_the_definition_with_gradients(
    options, seed, length, chunk_size, rounds, cells, highest
):
    """With the highest score that is possible taken off, and with the highest that there is."""
    torch.manual_seed(seed)
    query_key, value, buckets = draw(2, 2, length, 3, rounds=rounds)
    before = _lsh_chunks.CELLS, _lsh_chunks.FLAT
    _lsh_chunks.CELLS, _lsh_chunks.FLAT = cells, highest
    try:
        found, expected = on_both_paths(
            query_key,
            value,
            buckets,
            num_buckets=4,
            chunk_size=chunk_size,
            key_mask=torch.rand(2, length) < 0.8,
            **options,
        )
    finally:
        _lsh_chunks.CELLS, _lsh_chunks.FLAT = before
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("options", IN_CHUNKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("highest", [_lsh_chunks.FLAT, -1.0])
def test_in_chunks_is_as_exact_as_the_definition(options, dtype, highest, compare, monkeypatch):
    monkeypatch.setattr(_lsh_chunks, "FLAT", highest)
    query_key, value, buckets = draw(2, 3, 41, 8, dtype=dtype)
    options = {**options, "num_buckets": 4, "chunk_size": 7, "key_mask": masked(2, 41)}
    compare(
        lambda *inputs: lsh_attention(*inputs, buckets, **options), [query_key, value], "torch", terms=4.0
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [1e-6, 10.0, 29.9, 30.1, 1e2, 1e4])
def test_in_chunks_scores_of_any_size(size, is_causal):
    """e^x is not taken far below 0, where it takes long, and what a query does not see may score highest."""
    query_key, value, buckets = draw(2, 3, 40, 8)
    options = {"num_buckets": 4, "chunk_size": 8, "is_causal": is_causal}
    large = (query_key / query_key.norm(dim=-1).amax() * size).detach()
    for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 1e-5):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (large, value)]
        found, expected = on_both_paths(*inputs, buckets, **options)
        for mine, its in zip(found, expected, strict=True):
            # Where a token sees one other alone, gradients are differences of numbers of order one.
            scale = max(1.0, its.abs().max().item())
            torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance * scale)


def test_in_chunks_takes_what_it_can():
    query_key, value, buckets = draw(2, 3, 11, 5)
    options = {"num_buckets": 4, "chunk_size": 4}

    def node(*inputs, **more):
        return lsh_attention(*inputs, buckets, **options, **more).grad_fn.name()

    assert node(query_key, value) == "_AttendBackward"
    assert node(query_key.detach(), value) == "_AttendBackward"
    for more in {"dropout": 0.1}, {"deduplicate": True}, {"circular": True, "look_back": 9}:
        assert node(query_key, value, **more) != "_AttendBackward"
    half = [t.detach().bfloat16().requires_grad_() for t in (query_key, value)]
    assert node(*half) != "_AttendBackward"
    assert not lsh_attention(query_key.detach(), value.detach(), buckets, **options).requires_grad
    with torch.autocast("cpu"):  # casts products, here and there
        single = [t.detach().float().requires_grad_() for t in (query_key, value)]
        assert node(*single) != "_AttendBackward"
    many = options | {"num_buckets": 2**24, "same_bucket": True}  # float32 does not tell them apart
    single = [t.detach().float().requires_grad_() for t in (query_key, value)]
    assert lsh_attention(*single, buckets, **many).grad_fn.name() != "_AttendBackward"
    assert lsh_attention(query_key, value, buckets, **many).grad_fn.name() == "_AttendBackward"


def test_in_chunks_weights_are_saved_where_autograd_frees_them():
    query_key, value, buckets = draw(1, 2, 64, 4)
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = lsh_attention(query_key, value, buckets, num_buckets=4, chunk_size=16)
    assert saved.count((2 * 4, 16, 32)) == 3  # of each round
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_in_chunks_gradients_are_those_of_the_type_wherever_they_are_taken():
    query_key, value, buckets = draw(1, 2, 16, 4, dtype=torch.float32)
    out = lsh_attention(query_key, value, buckets, num_buckets=4, chunk_size=4).sum()
    expected = torch.autograd.grad(out, (query_key, value), retain_graph=True)
    with torch.autocast("cpu"):
        found = torch.autograd.grad(out, (query_key, value))
    assert all(map(torch.equal, found, expected))


def test_in_chunks_a_graph_that_was_gone_through_has_no_second_derivative():
    """Rather than one of weights that it takes for constants."""
    query_key, value, buckets = draw(1, 2, 16, 4)
    out = lsh_attention(query_key, value, buckets, num_buckets=4, chunk_size=4).sum()
    torch.autograd.grad(out, query_key, retain_graph=True)
    (gradient,) = torch.autograd.grad(out, query_key, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_no_batch_and_no_heads_on_a_cpu(shape):
    query_key, value, buckets = draw(*shape, 11, 5)
    assert lsh_attention(query_key, value, buckets, num_buckets=4, chunk_size=3).shape == value.shape


@pytest.mark.parametrize("options", [*OPTIONS, *IN_CHUNKS[-3:]], ids=str)
@given(seed=seeds, length=lengths, chunk_size=st.integers(1, 15), rounds=st.integers(1, 4))
def test_a_step_of_decoding_is_the_last_token_of_the_whole(options, seed, length, chunk_size, rounds):
    torch.manual_seed(seed)
    query_key, value, buckets = draw(2, 2, length, 3, rounds=rounds)
    options = {**options, "num_buckets": 4, "chunk_size": chunk_size, "is_causal": True}
    expected = lsh_attention(query_key, value, buckets, **options)[:, :, -1:]
    torch.testing.assert_close(attend_last(query_key, value, buckets, Options(**options)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_decoding_is_as_exact_as_the_definition(dtype):
    query_key, value, buckets = draw(2, 3, 41, 8, dtype=dtype)
    options = Options(4, 7, is_causal=True)
    exact = [t.detach().double() for t in (query_key, value)]
    out = attend_last(query_key, value, buckets, options)
    assert out.dtype is dtype
    expected = lsh_attention(*exact, buckets, **options._asdict())[:, :, -1:]
    definition = lsh_attention(query_key, value, buckets, **options._asdict())[:, :, -1:]
    error, allowed = ((t.double() - expected).abs().max() for t in (out, definition))
    assert error <= 2 * allowed + torch.finfo(dtype).eps


def plain(query_key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Shared-QK attention, in which the token itself counts only where there is no other."""
    length, dim = query_key.shape[-2:]
    keys = query_key / (query_key.square().sum(-1, keepdim=True) + 1e-6 * dim).sqrt()
    scores = query_key @ keys.transpose(-2, -1)
    others = ~torch.eye(length, dtype=torch.bool)
    others = others.tril() if is_causal else others
    weights = scores.masked_fill(~others, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ value + torch.where(others.any(-1, keepdim=True), 0.0, value)


@on_the_device
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"circular": True}, {"deduplicate": True}, {"look_ahead": 1}], ids=str
)
@pytest.mark.parametrize("chunk_size", [17, 64])
def test_one_chunk_is_plain_shared_attention(chunk_size, options, is_causal):
    for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 1e-5):
        query_key, value, buckets = draw(2, 3, 17, 5, dtype=dtype)
        out = lsh_attention(
            query_key, value, buckets, num_buckets=4, chunk_size=chunk_size, is_causal=is_causal, **options
        )
        expected = plain(query_key, value, is_causal)
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        cotangent = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, (query_key, value), cotangent),
            torch.autograd.grad(expected, (query_key, value), cotangent),
            rtol=10 * tolerance,
            atol=10 * tolerance,
        )


@on_the_device
def test_chunks_that_all_see_each_other_are_plain_attention_in_every_round():
    """Four chunks a round, which each look three back and three ahead: sorting plays no part any more."""
    query_key, value, buckets = draw(2, 3, 16, 5)
    options = {"num_buckets": 4, "chunk_size": 4, "look_back": 3, "look_ahead": 3}
    for deduplicate in False, True:
        out = lsh_attention(query_key, value, buckets, deduplicate=deduplicate, is_causal=True, **options)
        torch.testing.assert_close(out, plain(query_key, value, True))


def test_a_token_that_sees_no_other_is_itself_exactly_in_float32():
    """The original's -1e5 costs up to 0.75 % here, in the sum over rounds."""
    query_key, value, _ = draw(1, 1, 6, 3, dtype=torch.float32)
    buckets = torch.arange(6).expand(1, 1, 7, 6)
    out = lsh_attention(query_key, value, buckets, num_buckets=6, chunk_size=2, same_bucket=True)
    assert torch.equal(out, value)


@on_the_device
def test_a_round_in_which_a_token_sees_only_itself_counts_nothing():
    query_key, value, _ = draw(1, 1, 4, 3, dtype=torch.float32)
    found, lost = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 3])
    options = {"num_buckets": 4, "chunk_size": 2, "same_bucket": True}
    both = lsh_attention(query_key, value, torch.stack([found, lost])[None, None], **options)
    alone = lsh_attention(query_key, value, found[None, None, None], **options)
    assert torch.equal(both, alone)
    torch.testing.assert_close(both, value[:, :, [1, 0, 3, 2]], rtol=3e-7, atol=0)  # p v / p, rounded thrice


@on_the_device
@given(seed=seeds, length=lengths, padding=st.integers(1, 9))
@pytest.mark.parametrize("options", [o for o in OPTIONS if "circular" not in o], ids=str)
def test_padding_has_no_influence(options, seed, length, padding):
    torch.manual_seed(seed)
    query_key, value, buckets = draw(2, 1, length, 3)
    options = {**options, "num_buckets": 4, "chunk_size": 3}
    expected = lsh_attention(query_key, value, buckets, **options)
    longer = [
        torch.cat([t, 9 * torch.randn_like(t)[:, :, :1].expand(-1, -1, padding, -1)], 2)
        for t in (query_key, value)
    ]
    longer = [t.detach().requires_grad_() for t in longer]
    more = torch.cat([buckets, torch.randint(4, (2, 1, 3, padding))], -1)
    key_mask = (torch.arange(length + padding) < length).expand(2, -1)
    out = lsh_attention(*longer, more, key_mask=key_mask, **options)
    torch.testing.assert_close(out[:, :, :length], expected)
    assert (out[:, :, length:] == 0).all()
    gradients = torch.autograd.grad(out, longer, torch.randn_like(out))
    assert all((g[:, :, length:] == 0).all() for g in gradients)


@on_the_device
@given(seed=seeds, length=lengths, at=st.integers(0, 12))
def test_masked_tokens_have_no_influence_wherever_they_stand(seed, length, at):
    torch.manual_seed(seed)
    query_key, value, buckets = draw(1, 2, length, 3)
    key_mask = torch.rand(1, length) < 0.6
    key_mask[:, at % length] = False
    options = {"num_buckets": 4, "chunk_size": 3, "key_mask": key_mask}
    expected = lsh_attention(query_key, value, buckets, **options)
    hidden = ~key_mask[0]
    changed = [t.detach().clone() for t in (query_key, value, buckets)]
    changed[0][:, :, hidden] *= -70.0
    changed[1][:, :, hidden] += 5.0
    changed[2][..., hidden] = 3 - changed[2][..., hidden]
    torch.testing.assert_close(lsh_attention(*changed, **options), expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"circular": True, "deduplicate": True}], ids=str)
@given(seed=seeds, length=lengths, at=st.integers(0, 12))
def test_causal_values_and_gradients_come_from_no_later_token(options, seed, length, at):
    torch.manual_seed(seed)
    at %= length
    query_key, value, buckets = draw(1, 2, length, 3)
    options = {**options, "num_buckets": 4, "chunk_size": 3, "is_causal": True}
    out = lsh_attention(query_key, value, buckets, **options)
    gradients = torch.autograd.grad(out[:, :, at], (query_key, value), torch.randn_like(out[:, :, at]))
    assert all((g[:, :, at + 1 :] == 0).all() for g in gradients)
    later = query_key.detach().clone()
    later[:, :, at + 1 :] += 1.0
    same = lsh_attention(later, value, buckets, **options)
    torch.testing.assert_close(same[:, :, : at + 1], out[:, :, : at + 1], rtol=0, atol=0)


@given(seed=seeds, length=lengths)
def test_the_numbers_of_the_buckets_do_not_matter_to_a_bucket(seed, length):
    """Where only one's own bucket is seen, and whole, the order of the buckets is nothing."""
    torch.manual_seed(seed)
    query_key, value, buckets = draw(1, 2, length, 3)
    options = {"num_buckets": 4, "chunk_size": 2, "look_back": 7, "look_ahead": 7, "same_bucket": True}
    renamed = torch.randperm(4)[buckets]
    torch.testing.assert_close(
        lsh_attention(query_key, value, renamed, **options),
        lsh_attention(query_key, value, buckets, **options),
    )


@pytest.mark.parametrize("options", SOME, ids=str)
def test_gradients_to_second_order(options):
    query_key, value, buckets = draw(1, 2, 5, 2, rounds=2)
    key_mask = torch.tensor([[True, True, False, True, True]])

    def operation(query_key, value):
        return lsh_attention(
            query_key, value, buckets, num_buckets=4, chunk_size=2, key_mask=key_mask, **options
        )

    assert gradcheck(operation, (query_key, value), check_forward_ad=True)
    assert gradgradcheck(operation, (query_key, value), fast_mode=True)


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", SOME, ids=str)
def test_half_precision_is_finite_and_near(options, dtype):
    exact = draw(2, 2, 61, 16)
    half = [
        exact[0].detach().to(dtype).requires_grad_(),
        exact[1].detach().to(dtype).requires_grad_(),
        exact[2],
    ]
    options = {**options, "num_buckets": 4, "chunk_size": 8, "key_mask": masked(2, 61)}
    cotangent = torch.randn(2, 2, 61, 18, dtype=torch.float64)
    outcomes = []
    for inputs in exact, half:
        out = lsh_attention(*inputs, **options)
        assert out.dtype == inputs[0].dtype
        outcomes.append([out, *torch.autograd.grad(out, inputs[:2], cotangent.to(out.dtype))])
    for truth, near in zip(*outcomes, strict=True):
        assert near.isfinite().all()
        assert (near.double() - truth).norm() / truth.norm() < 4 * torch.finfo(dtype).eps


def test_float16_does_not_overflow_in_the_sum_of_many_keys():
    query_key = torch.ones(1, 1, 256, 8, dtype=torch.float16)
    value = torch.full((1, 1, 256, 4), 2e4, dtype=torch.float16)
    out = lsh_attention(query_key, value, torch.zeros(1, 1, 2, 256).long(), num_buckets=1, chunk_size=128)
    torch.testing.assert_close(out, value)


@on_the_device
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4])
def test_queries_of_any_size_have_finite_gradients(size):
    query_key, value, buckets = draw(1, 2, 13, 4, dtype=torch.float32)
    query_key = (size * query_key.detach()).requires_grad_()
    out = lsh_attention(query_key, value, buckets, num_buckets=4, chunk_size=4, is_causal=True)
    assert out.isfinite().all()
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(out, (query_key, value), torch.randn_like(out))
    )


@on_the_device
def test_dropout_is_of_the_weights_and_keeps_the_mean():
    query_key, buckets = torch.zeros(1, 1, 400, 2), torch.zeros(1, 1, 1, 400).long()
    value = torch.eye(400)[None, None]
    out = lsh_attention(query_key, value, buckets, num_buckets=1, chunk_size=400, dropout=0.3)
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert out.mean().item() == pytest.approx(1 / 400, rel=0.02)
    alone = lsh_attention(
        query_key,
        value,
        torch.arange(400).expand(1, 1, 1, -1),
        num_buckets=400,
        chunk_size=1,
        look_back=0,
        dropout=0.3,
    ).diagonal(dim1=-2, dim2=-1)
    assert sorted({round(x, 4) for x in alone.flatten().tolist()}) == [0.0, round(1 / 0.7, 4)]


@on_the_device
def test_nothing_gives_nothing():
    assert lsh_attention(*draw(2, 3, 0, 5), num_buckets=4, chunk_size=3).shape == (2, 3, 0, 7)
    assert lsh_attention(*draw(0, 3, 5, 5), num_buckets=4, chunk_size=3).shape == (0, 3, 5, 7)
    assert lsh_attention(*draw(2, 3, 0, 5), num_buckets=4, chunk_size=3, same_bucket=True).shape == (
        2,
        3,
        0,
        7,
    )


def offset(buckets: Tensor, num_buckets: int) -> Tensor:
    """As the two libraries number them: buckets of another round are other buckets."""
    return (buckets + num_buckets * torch.arange(buckets.shape[2])[:, None]).flatten(2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("same_bucket", [False, True])
@pytest.mark.parametrize("deduplicate", [False, True])
def test_equals_reformer_pytorch(deduplicate, same_bucket, with_mask, is_causal):
    reformer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    theirs = reformer.LSHAttention(
        bucket_size=8,
        n_hashes=3,
        causal=is_causal,
        allow_duplicate_attention=not deduplicate,
        attend_across_buckets=not same_bucket,
    )
    query_key, value, buckets = draw(2, 3, 48, 5)
    query_key = (10 * query_key.detach()).requires_grad_()  # their keys have no 1e-6
    value = value[..., :5].detach().requires_grad_()  # nor values of another size
    key_mask = torch.arange(48) < torch.tensor([[48], [31]]) if with_mask else torch.ones(2, 48).bool()
    last = buckets.masked_fill(~key_mask[:, None, None], 4)  # they leave padding in its buckets
    theirs.hash_vectors = lambda *_, **__: offset(last, 5).flatten(0, 1)
    given = {"input_mask": key_mask.repeat_interleave(3, 0)} if with_mask else {}
    expected = theirs(query_key.flatten(0, 1), value.flatten(0, 1), **given)[0].view(2, 3, 48, -1)
    actual = lsh_attention(
        query_key,
        value,
        buckets,
        num_buckets=4,
        chunk_size=8,
        circular=True,
        same_bucket=same_bucket,
        deduplicate=deduplicate,
        key_mask=key_mask,
        is_causal=is_causal,
        scale=5**-0.5,
    )
    compared = key_mask[:, None, :].expand(2, 3, 48)
    if deduplicate:  # they raise by 20.7 the score of a pair that meets across the end of a round
        order = last.argsort(dim=-1, stable=True)
        first = torch.zeros(2, 3, 48).bool().scatter_(-1, order[..., :8].flatten(2), True)
        compared = compared & ~first
        assert compared.float().mean() > 0.3
    torch.testing.assert_close(actual[compared], expected[compared], rtol=1e-6, atol=1e-6)
    cotangent = torch.randn_like(actual) * compared[..., None]
    inputs = query_key, value
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("ahead", [0, 1])
def test_equals_transformers(ahead, with_mask, is_causal):
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    config = pytest.importorskip("transformers").ReformerConfig(
        hidden_size=15,
        num_attention_heads=3,
        attention_head_size=5,
        lsh_attn_chunk_length=8,
        lsh_num_chunks_after=ahead,
        num_hashes=3,
        num_buckets=4,
        is_decoder=is_causal,
        lsh_attention_probs_dropout_prob=0.0,
    )
    theirs = reformer.LSHSelfAttention(config).double()
    tokens = torch.randn(2, 48, 15, dtype=torch.float64, requires_grad=True)
    buckets = torch.randint(4, (2, 3, 3, 48))
    key_mask = torch.arange(48) < torch.tensor([[48], [31]]) if with_mask else torch.ones(2, 48).bool()
    last = buckets.masked_fill(~key_mask[:, None, None], 4)
    expected = theirs(tokens, attention_mask=key_mask, buckets=offset(last, 5)).hidden_states
    query_key, value = (
        projection(tokens).unflatten(-1, (3, 5)).transpose(1, 2)
        for projection in (theirs.query_key, theirs.value)
    )
    actual = lsh_attention(
        query_key,
        value,
        buckets,
        num_buckets=4,
        chunk_size=8,
        look_ahead=ahead,
        circular=True,
        key_mask=key_mask,
        is_causal=is_causal,
    )
    actual = actual.transpose(1, 2).flatten(2)
    torch.testing.assert_close(actual[key_mask], expected[key_mask])
    cotangent = torch.randn_like(actual) * key_mask[..., None]
    of = [tokens, theirs.query_key.weight, theirs.value.weight]
    torch.testing.assert_close(
        torch.autograd.grad(actual, of, cotangent, retain_graph=True),
        torch.autograd.grad(expected, of, cotangent),
    )


Q, B = (2, 3, 11, 5), (2, 3, 4, 11)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ((Q[1:], Q, B), {}, r"expected query_key \(B, H, L, D\).*got query_key \(3, 11, 5\)"),
        ((Q, (2, 3, 7, 5), B), {}, r"value \(2, 3, 7, 5\)"),
        ((Q, Q, (2, 3, 4, 7)), {}, r"buckets \(2, 3, 4, 7\)"),
        ((Q, Q, (2, 3, 0, 11)), {}, r"buckets \(2, 3, 0, 11\)"),
        ((Q, Q, B), {"chunk_size": 0}, "chunk_size must be positive.*got.*chunk_size=0"),
        ((Q, Q, B), {"num_buckets": 0}, "num_buckets and chunk_size must be positive.*num_buckets=0"),
        ((Q, Q, B), {"look_back": -1}, "look_back and look_ahead not negative.*look_back=-1"),
        ((Q, Q, B), {"look_ahead": -1}, "look_ahead=-1"),
        ((Q, Q, B), {"key_mask": torch.ones(11).bool()}, r"must be \(B, L\) = \(2, 11\), got \(11,\)"),
        ((Q, Q, B), {"key_mask": torch.ones(2, 7).bool()}, r"key_mask must broadcast to \(2, 11\)"),
        ((Q, Q, B), {"key_mask": torch.ones(2, 11)}, "key_mask must be boolean.*got torch.float32"),
        ((Q, Q, B), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input_is_named(shapes, options, message):
    query_key, value, buckets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        lsh_attention(query_key, value, buckets.long(), **{"num_buckets": 4, "chunk_size": 3, **options})


def test_bad_dtypes_are_named():
    query_key, value, buckets = draw(2, 3, 11, 5)
    with pytest.raises(ValueError, match=r"must share one dtype, got torch.float64 and torch.float32"):
        lsh_attention(query_key, value.float(), buckets, num_buckets=4, chunk_size=3)
    with pytest.raises(ValueError, match=r"buckets must be of int64, got torch.int32"):
        lsh_attention(query_key, value, buckets.int(), num_buckets=4, chunk_size=3)
