"""A decoder that attends: the definition by a formula in NumPy and by layers, PyTorch's loop against it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.kernels import _attentive_gru_steps, attentive_gru, explain, use_backend
from lamina.kernels._attentive_gru_steps import Pairs
from lamina.layers import AdditiveAttention, GRUCell
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

NAMES = ["projected", "state", "weight", "context_weight", "query_weight", "keys", "values", "energy"]
SIZES = (5, 3, 7, 11, 6, 13)  # T, B, H, C, A, S


def draw(sizes=SIZES, dtype=torch.float64, *, masked=False):
    """The operation as a function of its inputs, giving one tensor; and the inputs."""
    steps, batch, size, channels, hidden, length = sizes

    def some(*shape: int, over: int = 1) -> Tensor:
        return (torch.randn(shape, dtype=dtype) / over**0.5).requires_grad_()

    mask = None
    if masked:
        mask = torch.rand(batch, length) < 0.6
        mask[:1] = False

    def operation(*inputs):
        return torch.cat([t.flatten() for t in attentive_gru(*inputs, key_mask=mask)])

    operation.mask = mask
    return operation, [
        some(steps, batch, 3 * size),
        some(batch, size),
        some(3 * size, size, over=size),
        some(3 * size, channels, over=channels),
        some(hidden, size, over=size),
        some(batch, length, hidden),
        some(batch, length, channels),
        some(hidden),
    ]


def by_formula(x, state, u, c, w, keys, values, energy, mask):
    """One sequence after the other, in NumPy."""
    (steps, batch, _), size = x.shape, state.shape[1]
    u_r, u_z, u_n = np.split(u, 3)
    results = np.zeros((steps, batch, size)), np.zeros((steps, batch, values.shape[2]))
    weights = np.zeros((steps, batch, keys.shape[1]))

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    for b in range(batch):
        s = state[b]
        for t in range(steps):
            taken = np.flatnonzero(np.ones(len(keys[b])) if mask is None else mask[b])
            if len(taken):
                scores = np.exp(np.tanh(w @ s + keys[b][taken]) @ energy)
                weights[t, b, taken] = scores / scores.sum()
            context = weights[t, b] @ values[b]
            r, z, n = np.split(x[t, b] + c @ context, 3)
            r, z = sigmoid(r + u_r @ s), sigmoid(z + u_z @ s)
            s = (1 - z) * np.tanh(n + u_n @ (r * s)) + z * s
            results[0][t, b], results[1][t, b] = s, context
    return np.concatenate([t.ravel() for t in (*results, weights)])


masks = pytest.mark.parametrize("masked", [False, True])


@masks
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_formula(backend, masked):
    operation, inputs = draw(masked=masked)
    with use_backend(backend):
        actual = operation(*inputs)
    arrays = [t.detach().numpy() for t in inputs]
    np.testing.assert_allclose(actual.detach(), by_formula(*arrays, operation.mask), rtol=1e-9, atol=1e-12)


def test_is_an_attention_and_a_cell_step_by_step():
    """What a model makes of it: `AdditiveAttention` on the last state, its mean beside the word in a GRU."""
    T, B, S, word_dim, H, C = 4, 3, 6, 5, 7, 8
    attention = AdditiveAttention(H, C, 9, dtype=torch.float64)
    cell = GRUCell(word_dim + C, H, reset_after=False, dtype=torch.float64)
    for parameter in (*attention.parameters(), *cell.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    words, annotations = (torch.randn(*s, dtype=torch.float64) for s in ((T, B, word_dim), (B, S, C)))
    key_mask, state = torch.arange(S) < torch.tensor([6, 2, 4]).unsqueeze(1), torch.randn(B, H).double()
    of_word, of_context = cell.weight_ih.split((word_dim, C), dim=1)
    states, contexts, weights = attentive_gru(
        torch.nn.functional.linear(words, of_word, cell.bias_ih),
        state,
        cell.weight_hh,
        of_context,
        attention.query.weight,
        attention.key(annotations),
        annotations,
        attention.energy.weight[0],
        key_mask=key_mask,
    )
    for t in range(T):
        query = state.unsqueeze(1)
        expected = attention(query, annotations, key_mask=key_mask)[:, 0]
        torch.testing.assert_close(contexts[t], expected)
        torch.testing.assert_close(weights[t], attention.weights(query, annotations, key_mask=key_mask)[:, 0])
        state, _ = cell(torch.cat([words[t], expected], -1), (state,))
        torch.testing.assert_close(states[t], state)


@masks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("few", [0, 2**13])
def test_pytorchs_loop(dtype, masked, few, compare, monkeypatch):
    monkeypatch.setattr(_attentive_gru_steps, "_FEW", few)
    operation, inputs = draw((5, 3, 23, 17, 29, 13), dtype, masked=masked)
    compare(operation, inputs, "torch", terms=4.0)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1, 1), (70, 2, 5, 4, 3, 6), (3, 0, 5, 4, 3, 6), (3, 2, 5, 4, 3, 0), (2, 2, 5, 4, 3, 1)],
    ids=str,
)
def test_sizes(sizes, compare):
    operation, inputs = draw(sizes, torch.float32)
    if not sizes[-1]:  # of no key there are no weights
        inputs = [t.requires_grad_(t.numel() > 0) for t in inputs]
    compare(operation, inputs, "torch", terms=16.0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_step_gives_nothing(backend):
    _, inputs = draw((0, *SIZES[1:]))
    with use_backend(backend):
        shapes = [t.shape for t in attentive_gru(*inputs)]
    assert shapes == [(0, 3, 7), (0, 3, 11), (0, 3, 13)]


@masks
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_derivatives(backend, masked):
    operation, inputs = draw((2, 2, 3, 2, 3, 4), masked=masked)
    with use_backend(backend):
        assert gradcheck(operation, inputs, fast_mode=True)
        assert gradgradcheck(operation, inputs, fast_mode=True)


@pytest.mark.parametrize("size", [1.0, 50.0, 1e4])
def test_scores_of_numbers_that_overflow_an_exponential(size, monkeypatch):
    """The exponentials of queries and keys are taken apart only where both are finite."""
    monkeypatch.setattr(_attentive_gru_steps, "_FEW", 0)
    queries, keys, energy = size * torch.randn(2, 5), size * torch.randn(2, 4, 5), torch.randn(5)
    keys[0, 0] = -queries[0]  # large, but not their sum
    expected = torch.tanh(queries.double().unsqueeze(1) + keys.double()) @ energy.double()
    actual = Pairs(keys, energy).scores(queries)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    small = Pairs(0.1 * torch.randn(2, 4, 5), energy)
    assert small.factored
    assert small.scores(queries).isfinite().all()


@given(seed=st.integers(0, 2**31), cut=st.integers(0, 5))
def test_steps_carry_over_and_are_causal(seed, cut):
    torch.manual_seed(seed)
    _, (projected, state, *rest) = draw()
    whole = attentive_gru(projected, state, *rest)
    first = attentive_gru(projected[:cut], state, *rest)
    second = attentive_gru(projected[cut:], first[0][-1] if cut else state, *rest)
    for parts in zip(whole, first, second, strict=True):
        torch.testing.assert_close(torch.cat(parts[1:]), parts[0])
    if cut:
        (gradient,) = torch.autograd.grad(first[0].sum(), projected)
        assert not gradient[cut:].any()


@given(seed=st.integers(0, 2**31))
def test_masked_keys_have_no_influence(seed):
    torch.manual_seed(seed)
    operation, inputs = draw(masked=True)
    changed = [*inputs]
    hidden = ~operation.mask.unsqueeze(-1)
    changed[5], changed[6] = (torch.where(hidden, 7.0, t.detach()).requires_grad_() for t in inputs[5:7])
    outputs = [operation(*given_inputs) for given_inputs in (inputs, changed)]
    torch.testing.assert_close(outputs[1], outputs[0])
    cotangent = torch.randn_like(outputs[0])
    gradients = torch.autograd.grad(outputs[1], changed, cotangent)
    torch.testing.assert_close(gradients[:5], torch.autograd.grad(outputs[0], inputs, cotangent)[:5])
    assert not any(g.masked_select(hidden).any() for g in gradients[5:7])
    assert all(g.isfinite().all() for g in gradients)


def test_transforms_take_the_definition():
    operation, inputs = draw()
    expected = torch.autograd.grad(operation(*inputs).square().sum(), inputs[2])[0]
    loss = lambda weight: operation(*inputs[:2], weight, *inputs[3:]).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(inputs[2]), expected)
    tangents, plain = tuple(torch.randn_like(t) for t in inputs), tuple(t.detach() for t in inputs)
    _, actual = torch.func.jvp(operation, plain, tangents)
    with use_backend("reference"):
        _, expected = torch.func.jvp(operation, plain, tangents)
    torch.testing.assert_close(actual, expected)


def test_explains_its_paths():
    _, inputs = draw()
    told = explain(attentive_gru, *inputs)
    assert told.chosen == "torch"
    assert "not on a CUDA device" in told.refusals["triton"]
    long = draw((1, 1, 1, 1, 1, 8193))[1]
    with use_backend("triton"):
        assert explain(attentive_gru, *inputs).chosen == "triton"
        assert "8193" in explain(attentive_gru, *long).refusals["triton"]
    meta = [t.to("meta") for t in inputs]
    assert "waited for" in explain(attentive_gru, *meta).refusals["torch"]
    assert [t.shape for t in attentive_gru(*meta)] == [(5, 3, 7), (5, 3, 11), (5, 3, 13)]


def test_refuses_what_does_not_fit():
    _, inputs = draw()

    def call(name, tensor, **options):
        given_inputs = dict(zip(NAMES, inputs, strict=True)) | {name: tensor}
        return attentive_gru(*(given_inputs[n] for n in NAMES), **options)

    for n, name in enumerate(NAMES):
        message = "projected must be" if name == "projected" else f"{name} must be .* of torch.float64"
        wrong = inputs[n][:-1] if name in ("keys", "values") else inputs[n][..., :-1]
        with pytest.raises(ValueError, match=message):
            call(name, wrong)
    with pytest.raises(ValueError, match=r"weight must be .* got .* of torch.float32"):
        call("weight", inputs[2].float())
    for name in "keys", "values":
        with pytest.raises(ValueError, match=rf"{name} must be \(B, S, size\), got"):
            call(name, torch.zeros(3, 13))
    for mask in torch.ones(3, 12).bool(), torch.ones(13).bool(), torch.ones(3, 13):
        with pytest.raises(ValueError, match="key_mask must be"):
            call("state", inputs[1], key_mask=mask)
