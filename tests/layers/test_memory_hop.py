"""A hop of a memory network: the paper's loops, both ways of reading, empty slots, and how hops are tied."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import (
    MemoryHop,
    SentenceEncoding,
    TemporalEncoding,
    TokenEmbedding,
    memory_hops,
    temporal_noise_ages,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

seeds, sizes = st.integers(0, 2**31), st.integers(1, 5)
# The vocabulary decides the way: the tables are read where it is small, the words embedded where it is large.
ways = pytest.mark.parametrize("vocab_size", [11, 997], ids=["tables", "words"])
CODE = SentenceEncoding(5, form="code")


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def hop_of(vocab_size: int = 11, **options) -> MemoryHop:
    """A hop of 5 channels with weights of order one, but for the padding row."""
    return MemoryHop(5, vocab_size=vocab_size, std=0.7, dtype=torch.float64, **options)


def stories(batch: int, memories: int, words: int, padding: float = 0.3) -> Tensor:
    """Ids from 1 to 10, each sentence with padding behind it, some of padding alone."""
    ids = torch.randint(1, 11, (batch, memories, words))
    lengths = torch.randint(0, words + 1, (batch, memories, 1))
    return torch.where(torch.rand(batch, memories, 1) < padding, ids * 0, ids) * (
        torch.arange(words) < lengths
    )


def by_words(hop: MemoryHop) -> MemoryHop:
    """The same hop, whose embeddings are called: a hook must be."""
    twin = copy.deepcopy(hop)
    twin.input_embedding.register_forward_hook(lambda *_: None)
    return twin


def encoded(sentence: np.ndarray, table: np.ndarray) -> np.ndarray:
    """One sentence, word by word, by the paper's formula. 0 is padding, at its end."""
    words, dim = [w for w in sentence if w], table.shape[1]
    total = np.zeros(dim)
    for j, word in enumerate(words, 1):
        for k in range(1, dim + 1):
            weight = (1 - j / len(words)) - (k / dim) * (1 - 2 * j / len(words))
            total[k - 1] += weight * table[word, k - 1]
    return total


def looped(hop: MemoryHop, state: Tensor, story: Tensor, part: np.ndarray, linear: bool) -> list[np.ndarray]:
    """The weights and the next state, in loops over rows, memories and words."""
    arrays = {name: p.detach().numpy() for name, p in hop.named_parameters()}
    weights, states = [], []
    for u, sentences, takes in zip(state.numpy(), story.numpy(), part, strict=True):
        keys, values, age = [], [], 0
        for i in reversed(range(len(sentences))):
            m = encoded(sentences[i], arrays["input_embedding.weight"])
            c = encoded(sentences[i], arrays["output_embedding.weight"])
            if takes[i] and sentences[i].any():
                age += 1
                m = m + arrays["input_temporal.weight"][age - 1]
                c = c + arrays["output_temporal.weight"][age - 1]
            keys.insert(0, m)
            values.insert(0, c)
        scores = np.array([u @ m for m in keys])
        p = np.where(takes, scores if linear else np.exp(scores), 0.0)
        if not linear and takes.any():
            p = p / p.sum()
        o = sum((p_i * c for p_i, c in zip(p, values, strict=True)), np.zeros(hop.dim))
        weights.append(p)
        states.append(arrays["hidden_map.weight"] @ u + o)
    return [np.array(weights), np.array(states)]


@ways
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@given(seed=seeds, memories=sizes, words=sizes)
def test_is_the_paper_s_loops(vocab_size, linear, masked, seed, memories, words):
    torch.manual_seed(seed)
    hop = hop_of(vocab_size, max_memories=7, hidden_map=True, padding_id=0)
    state, story = x(3, 5), stories(3, memories, words)
    mask = torch.rand(3, memories) < 0.7 if masked else None
    part = np.ones((3, memories), bool) if mask is None else mask.numpy()
    weights, states = looped(hop, state, story, part, linear)
    actual = hop.weights(state, story, key_mask=mask, linear=linear)
    torch.testing.assert_close(actual, torch.tensor(weights))
    torch.testing.assert_close(hop(state, story, key_mask=mask, linear=linear), torch.tensor(states))


def test_a_small_vocabulary_is_read_without_embedding_words(monkeypatch):
    def fail(*_):
        raise AssertionError("the words were embedded")

    monkeypatch.setattr(TokenEmbedding, "forward", fail)
    story = torch.randint(1, 11, (2, 3, 4))
    hop_of()(x(2, 5), story)
    with pytest.raises(AssertionError):
        hop_of(997)(x(2, 5), story)
    with pytest.raises(AssertionError):
        by_words(hop_of())(x(2, 5), story)
    with pytest.raises(AssertionError):
        hop_of(input_embedding=TokenEmbedding(11, 5, scale=True))(x(2, 5), story)
    with pytest.raises(AssertionError):
        hop_of(output_embedding=TokenEmbedding(11, 5, padding_id=3))(x(2, 5), story)


@pytest.mark.parametrize("kind", ["words", "sentences", "code", "bag", "columns", "temporal", "no padding"])
@pytest.mark.parametrize("linear", [False, True])
@given(seed=seeds, memories=sizes, words=sizes)
def test_both_ways_give_the_same_values_and_gradients(kind, linear, seed, memories, words):
    torch.manual_seed(seed)
    options = {
        "code": {"encoding": CODE},
        "bag": {"encoding": SentenceEncoding(5, form="bag")},
        "columns": {"encoding": SentenceEncoding(5, form="code", max_words=7)},
        "temporal": {"max_memories": memories},
    }
    tables = hop_of(padding_id=None if kind == "no padding" else 0, **options.get(kind, {}))
    words_too = by_words(tables)
    story = stories(2, memories, words)
    story = story[:, :, 0] if kind == "words" else story
    state, mask, outcomes = x(2, 5).requires_grad_(), torch.rand(2, memories) < 0.8, []
    cotangent = x(2, 5)
    for hop in tables, words_too:
        out = hop(state, story, key_mask=mask, linear=linear)
        of = [state, *hop.parameters()]
        gradients = torch.autograd.grad(out, of, cotangent, allow_unused=True, materialize_grads=True)
        outcomes.append([out, *gradients])
    torch.testing.assert_close(*outcomes)


@ways
@pytest.mark.parametrize("kind", ["words", "sentences"])
@given(seed=seeds, more=sizes)
def test_what_is_masked_and_padding_have_no_influence(vocab_size, kind, seed, more):
    torch.manual_seed(seed)
    hop = hop_of(vocab_size, padding_id=0, max_memories=9)
    with torch.no_grad():
        for embedding in hop.input_embedding, hop.output_embedding:
            embedding.weight[0] = 1e3  # as a checkpoint may have it
            embedding.weight[10] = 1e3
    state, story = x(2, 5), torch.randint(1, 10, (2, 4, 3))
    wide = torch.cat([story, torch.zeros(2, 4, more, dtype=torch.int64)], 2)
    wide = torch.cat([wide, torch.full((2, more, 3 + more), 10)], 1)
    if kind == "words":
        story, wide = story[:, :, 0], wide[:, :, 0]
    mask = (torch.arange(4 + more) < 4).expand(2, -1)
    torch.testing.assert_close(hop(state, wide, key_mask=mask), hop(state, story))
    torch.testing.assert_close(hop.weights(state, wide, key_mask=mask)[:, :4], hop.weights(state, story))
    out = hop(state, wide, key_mask=mask)
    for gradient in torch.autograd.grad(
        out, [hop.input_embedding.weight, hop.output_embedding.weight], x(2, 5)
    ):
        assert (gradient[[0, 10]] == 0).all()
        assert (gradient != 0).any()


@ways
@pytest.mark.parametrize("kind", ["words", "sentences"])
def test_an_empty_slot_takes_the_mass_of_exp_0_unless_it_is_masked(vocab_size, kind):
    hop = hop_of(vocab_size, padding_id=0, max_memories=5)
    with torch.no_grad():
        for embedding in hop.input_embedding, hop.output_embedding:
            embedding.weight[0] = 1e3  # as a checkpoint may have it
    state, story = x(2, 5), torch.randint(1, 11, (2, 3, 4))
    padded = torch.cat([story, torch.zeros(2, 2, 4, dtype=torch.int64)], 1)
    if kind == "words":
        story, padded = story[:, :, 0], padded[:, :, 0]
    alone, with_empty = hop.weights(state, story), hop.weights(state, padded)
    scores = hop.weights(state, story, linear=True)
    total = scores.exp().sum(1, keepdim=True)
    torch.testing.assert_close(with_empty[:, :3], alone * total / (total + 2))
    torch.testing.assert_close(with_empty[:, 3:], (1 / (total + 2)).expand(-1, 2))
    read, whole = hop(state, story) - state, hop(state, padded) - state
    torch.testing.assert_close(whole, read * total / (total + 2))
    mask = (torch.arange(5) < 3).expand(2, -1)
    torch.testing.assert_close(hop(state, padded, key_mask=mask), hop(state, story))


@ways
@given(seed=seeds, memories=sizes)
def test_without_temporal_encodings_order_is_nothing_and_with_them_it_is(vocab_size, seed, memories):
    torch.manual_seed(seed)
    state, story, order = x(2, 5), torch.randint(1, 11, (2, memories, 3)), torch.randperm(memories)
    hop, timed = hop_of(vocab_size), hop_of(vocab_size, max_memories=9)
    torch.testing.assert_close(hop(state, story[:, order]), hop(state, story))
    ages = torch.arange(memories, 0, -1).expand(2, -1)
    torch.testing.assert_close(timed(state, story[:, order], ages=ages[:, order]), timed(state, story))
    if memories > 1:
        assert not torch.allclose(timed(state, story.flip(1)), timed(state, story))


@ways
def test_ages_are_those_of_the_noise(vocab_size):
    hop, state, story = hop_of(vocab_size, padding_id=0, max_memories=9), x(2, 5), stories(2, 7, 3)
    held = (story != 0).any(-1)
    ages = temporal_noise_ages(held, 9, noise=0.0)
    torch.testing.assert_close(hop(state, story, ages=ages), hop(state, story))
    noisy = temporal_noise_ages(held, 9, noise=0.9, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(hop(state, story, ages=noisy), hop(state, story))


@ways
@pytest.mark.parametrize(
    "names", [("input_temporal", "output_temporal"), ("output_temporal", "input_temporal")]
)
def test_one_temporal_encoding_is_two_of_which_one_is_zero(vocab_size, names):
    times = [TemporalEncoding(3, 5, std=std, dtype=torch.float64) for std in (0.7, 0.0)]
    one = hop_of(vocab_size, **{names[0]: times[0]})
    tables = {name: getattr(one, name) for name in ("input_embedding", "output_embedding")}
    two = hop_of(vocab_size, **tables, **dict(zip(names, times, strict=True)))
    state, story = x(2, 5), torch.randint(1, 11, (2, 3, 4))
    torch.testing.assert_close(one(state, story), two(state, story))
    torch.testing.assert_close(one.weights(state, story), two.weights(state, story))


@ways
def test_a_row_without_memories_keeps_its_state_and_passes_no_gradient(vocab_size):
    hop = hop_of(vocab_size, max_memories=5)
    state, story = x(2, 5).requires_grad_(), torch.randint(1, 11, (2, 3, 4))
    mask = torch.tensor([[False] * 3, [True] * 3])
    out = hop(state, story, key_mask=mask)
    torch.testing.assert_close(out[0], state[0])
    gradients = torch.autograd.grad(out[0], [state, *hop.parameters()], x(5), allow_unused=True)
    assert all(g.isfinite().all() for g in gradients)
    assert all((g == 0).all() for g in gradients[1:])
    assert (hop.weights(state, story, key_mask=mask)[0] == 0).all()
    for none in torch.zeros(2, 0, 4, dtype=torch.int64), torch.zeros(2, 3, 0, dtype=torch.int64):
        assert hop_of(vocab_size)(state, none).equal(state)
    nobody = torch.zeros(0, 5).double()
    assert hop(nobody, torch.zeros(0, 3, 4, dtype=torch.int64)).shape == (0, 5)


@ways
@given(seed=seeds)
def test_rows_of_a_batch_do_not_meet(vocab_size, seed):
    torch.manual_seed(seed)
    hop, state, story = hop_of(vocab_size, padding_id=0, max_memories=9), x(3, 5), stories(3, 4, 3)
    torch.testing.assert_close(hop(state[1:2], story[1:2])[0], hop(state, story)[1])


@ways
@pytest.mark.parametrize("linear", [False, True])
def test_gradients(vocab_size, linear):
    hop = hop_of(vocab_size, padding_id=0, max_memories=3, hidden_map=True)
    names, parameters = zip(*hop.named_parameters(), strict=True)
    few = [p.detach()[:11].clone().requires_grad_() for p in parameters]
    state, story = x(2, 5).requires_grad_(), stories(2, 3, 2, padding=0.0)
    mask = torch.tensor([[True, True, False], [True] * 3])

    def of(state, *some):
        wholes = [torch.cat([s, p.detach()[11:]]) for s, p in zip(some, parameters, strict=True)]
        given = {"key_mask": mask, "linear": linear}
        return torch.func.functional_call(hop, dict(zip(names, wholes, strict=True)), (state, story), given)

    assert gradcheck(of, (state, *few), fast_mode=True)
    assert gradgradcheck(of, (state, *few), fast_mode=True)


def test_other_embeddings_and_features():
    hop = MemoryHop(5, input_embedding=nn.Linear(7, 5), output_embedding=nn.Linear(7, 5))
    state, features = torch.randn(2, 5), torch.randn(2, 3, 7)
    keys, values = hop.input_embedding(features), hop.output_embedding(features)
    p = torch.softmax(torch.einsum("bc,bmc->bm", state, keys), -1)
    torch.testing.assert_close(hop(state, features), state + torch.einsum("bm,bmc->bc", p, values))
    torches = nn.Embedding(11, 5, padding_idx=0), nn.Embedding(11, 5, padding_idx=0)
    with_torch = MemoryHop(5, input_embedding=torches[0], output_embedding=torches[1])
    assert with_torch.padding_id == 0
    ours = MemoryHop(5, vocab_size=11, padding_id=0)
    ours.load_state_dict(with_torch.state_dict())
    story = stories(2, 3, 4)
    torch.testing.assert_close(with_torch(state, story), ours(state, story))


@pytest.mark.parametrize("linear_dim", [0, 2])
def test_the_nonlinearity_leaves_the_first_channels_alone(linear_dim):
    state, story = x(3, 5), torch.randint(1, 11, (3, 4))
    plain = hop_of(hidden_map=True)
    hop = hop_of(hidden_map=plain.hidden_map, activation=nn.ReLU, linear_dim=linear_dim)
    hop.load_state_dict(plain.state_dict())
    expected = plain(state, story)
    assert (expected < 0).any()
    expected = torch.cat([expected[:, :linear_dim], expected[:, linear_dim:].relu()], 1)
    torch.testing.assert_close(hop(state, story), expected)


def test_a_question_is_encoded_in_the_input_embedding():
    hop = hop_of(padding_id=0)
    question = torch.tensor([[3, 7, 0], [2, 9, 4]])
    table = hop.input_embedding.weight.detach().numpy()
    expected = np.array([encoded(q, table) for q in question.numpy()])
    torch.testing.assert_close(hop.encode(question), torch.tensor(expected))


def test_the_released_code_s_time_words():
    """There the time is one more word, in the last of fixed columns; a nil word's embedding is zero."""
    encoding = SentenceEncoding(5, form="code", max_words=4)
    hop = hop_of(17, encoding=encoding, padding_id=0)
    story = torch.tensor([[[3, 7, 0, 12], [5, 9, 2, 11], [0, 0, 0, 0]]])
    state, weights = x(1, 5), encoding.weights(4, like=x(1))
    a, c = hop.input_embedding.weight, hop.output_embedding.weight
    m, o = (a[story] * weights).sum(2), (c[story] * weights).sum(2)
    p = torch.softmax((m @ state[0]), -1)
    torch.testing.assert_close(hop(state, story), state + (p[..., None] * o).sum(1))


@pytest.mark.parametrize("temporal", [False, True])
def test_adjacent_hops_share_neighbouring_tables(temporal):
    hops = memory_hops(3, 11, 5, max_memories=7 if temporal else None, padding_id=0)
    for hop, following in pairwise(hops):
        assert following.input_embedding is hop.output_embedding
        assert following.input_temporal is hop.output_temporal
        assert (hop.input_temporal is not None) == temporal
    shapes = [tuple(p.shape) for p in hops.parameters()]
    assert sorted(shapes) == sorted([(11, 5)] * 4 + ([(7, 5)] * 4 if temporal else []))
    assert all(hop.hidden_map is None for hop in hops)
    tables = [hops[0].input_embedding, *(hop.output_embedding for hop in hops)]
    assert len({id(table) for table in tables}) == 4


def test_layerwise_hops_share_all_and_a_map():
    hops = memory_hops(3, 11, 5, tying="layerwise", max_memories=7)
    shapes = [tuple(p.shape) for p in hops.parameters()]
    assert sorted(shapes) == [(5, 5), (7, 5), (7, 5), (11, 5), (11, 5)]
    for hop in hops[1:]:
        for name in "input_embedding", "output_embedding", "input_temporal", "output_temporal", "hidden_map":
            assert getattr(hop, name) is getattr(hops[0], name)
    assert hops[0].hidden_map.bias is None


@pytest.mark.parametrize("tying", ["adjacent", "layerwise"])
def test_tied_hops_stay_tied_and_load(tying):
    options = {"tying": tying, "max_memories": 7, "padding_id": 0, "activation": nn.ReLU, "linear_dim": 2}
    hops, others = memory_hops(3, 11, 5, **options), memory_hops(3, 11, 5, **options)
    others.load_state_dict(hops.state_dict())
    twin = copy.deepcopy(hops)
    assert sum(1 for _ in twin.parameters()) == sum(1 for _ in hops.parameters())
    story = stories(2, 6, 4)
    states = []
    for stack in hops, others, twin:
        state = stack[0].encode(story[:, 0])
        for hop in stack:
            state = hop(state, story)
        states.append(stack[-1].output_embedding.logits(state))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    states[0].backward(torch.randn_like(states[0]))
    for name, parameter in hops.named_parameters():
        assert (parameter.grad != 0).any(), name
        if "embedding" in name:
            assert (parameter.grad[0] == 0).all(), "padding got a gradient"


@pytest.mark.parametrize("tying", ["adjacent", "layerwise"])
def test_a_stack_of_one_is_a_hop_with_the_same_defaults(tying):
    options = {"activation": nn.ReLU, "max_memories": 3}
    torch.manual_seed(0)
    (hop,) = memory_hops(1, 11, 5, tying=tying, **options)
    torch.manual_seed(0)
    alone = MemoryHop(5, vocab_size=11, hidden_map=tying == "layerwise", **options)
    assert hop(STATE, STORY).equal(alone(STATE, STORY))


def test_the_last_options_reach_every_hop():
    hops = memory_hops(2, 11, 5, encoding=CODE, activation=nn.ReLU, linear_dim=2, padding_id=3)
    assert all(hop.encoding is CODE and hop.linear_dim == 2 and hop.padding_id == 3 for hop in hops)
    assert all(isinstance(hop.activation, nn.ReLU) for hop in hops)


def test_starts_normal_with_a_padding_row_of_zeros():
    hop = MemoryHop(40, vocab_size=500, max_memories=300, hidden_map=True, padding_id=3)
    for name, parameter in hop.named_parameters():
        assert parameter.std().item() == pytest.approx(0.1, rel=0.1), name
        assert parameter.mean().abs().item() < 0.01
    for embedding in hop.input_embedding, hop.output_embedding:
        assert (embedding.weight[3] == 0).all()
    hop = MemoryHop(40, vocab_size=500, max_memories=300, hidden_map=True, std=0.5)
    assert all(p.std().item() == pytest.approx(0.5, rel=0.1) for p in hop.parameters())


@ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_near(vocab_size, dtype):
    hop = MemoryHop(5, vocab_size=vocab_size, max_memories=7, padding_id=0)
    low = MemoryHop(5, vocab_size=vocab_size, max_memories=7, padding_id=0, dtype=dtype)
    low.load_state_dict(hop.state_dict())
    state, story = torch.randn(2, 5), stories(2, 6, 3)
    mask = torch.tensor([[True] * 5 + [False], [False] * 6])
    for masks in {}, {"key_mask": mask}:
        out = low(state.to(dtype), story, **masks)
        assert out.dtype is dtype
        torch.testing.assert_close(out.float(), hop(state, story, **masks), rtol=0.03, atol=0.03)


STATE, STORY = torch.randn(2, 5), torch.ones(2, 3, 4, dtype=torch.int64)


def small(**options) -> MemoryHop:
    return MemoryHop(5, vocab_size=11, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryHop(5), "vocab_size must be given where an embedding is not"),
        (
            lambda: MemoryHop(5, input_embedding=TokenEmbedding(11, 5)),
            "vocab_size must be given where an embedding is not",
        ),
        (lambda: small()(torch.randn(2, 4), STORY), r"state must be \(B, 5\), got \(2, 4\)"),
        (lambda: small()(torch.randn(2, 1, 5), STORY), r"state must be \(B, 5\), got \(2, 1, 5\)"),
        (
            lambda: small()(STATE, STORY[:1]),
            r"memories must be \(B, M\) or \(B, M, J\) with B = 2, got \(1, 3, 4\)",
        ),
        (lambda: small()(STATE, STORY[:, 0, 0]), r"memories must be \(B, M\) or .* got \(2,\)"),
        (
            lambda: MemoryHop(5, input_embedding=nn.Linear(4, 6), output_embedding=nn.Linear(4, 5))(
                STATE, STORY.float()
            ),
            r"memories must be embedded as \(2, 3, 5\), got \(2, 3, 6\)",
        ),
        (lambda: small()(STATE, STORY.float()), "ids must be integers"),
        (lambda: small()(STATE, STORY.bool()), "ids must be integers"),
        (lambda: small()(STATE, STORY, key_mask=torch.ones(2, 3)), "key_mask must be boolean"),
        (
            lambda: small()(STATE, STORY, key_mask=torch.ones(3, 2).bool()),
            r"key_mask must broadcast to \(2, 3\), got \(3, 2\)",
        ),
        (
            lambda: small()(STATE, STORY, ages=torch.ones(2, 3).long()),
            "ages must be left out of a hop without temporal encodings",
        ),
        (
            lambda: small(max_memories=3)(STATE, STORY, ages=torch.ones(2, 2).long()),
            r"ages must be \(2, 3\) of integers, got \(2, 2\)",
        ),
        (lambda: small(max_memories=2)(STATE, STORY), "memories must be at most max_memories=2, got 3"),
        (
            lambda: small(max_memories=3, output_temporal=TemporalEncoding(2, 5))(STATE, STORY),
            "memories must be at most max_memories=2, got 3",
        ),
        (lambda: memory_hops(0, 11, 5), "num_hops must be at least 1, got 0"),
        (
            lambda: memory_hops(2, 11, 5, tying="none"),
            "tying must be 'adjacent' or 'layerwise', got 'none'",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
