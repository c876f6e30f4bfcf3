"""Token embedding: nn.Embedding and nn.Linear with one table, and a padding row that stays zero."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import TokenEmbedding
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

seeds, sizes = st.integers(0, 2**31), st.integers(1, 7)


@given(seed=seeds, vocab=sizes, dim=sizes, length=sizes, scale=st.booleans())
def test_gives_the_rows_of_its_ids(seed, vocab, dim, length, scale):
    torch.manual_seed(seed)
    embedding = TokenEmbedding(vocab, dim, scale=scale, dtype=torch.float64)
    ids, out = torch.randint(vocab, (2, length)), None
    out = embedding(ids)
    assert out.shape == (2, length, dim)
    for b in range(2):
        for t in range(length):
            row = embedding.weight[ids[b, t]] * (dim**0.5 if scale else 1)
            torch.testing.assert_close(out[b, t], row)


@pytest.mark.parametrize("padding_id", [None, 0, 4])
def test_equals_torch(padding_id):
    ours = TokenEmbedding(11, 5, padding_id=padding_id, scale=True, dtype=torch.float64)
    theirs = nn.Embedding(11, 5, padding_idx=padding_id, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    ids, cotangent = torch.tensor([[1, 4, 0, 4], [10, 4, 2, 1]]), torch.randn(2, 4, 5).double()
    actual, expected = ours(ids), theirs(ids) * 5**0.5
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, ours.weight, cotangent),
        torch.autograd.grad(expected, theirs.weight, cotangent),
    )
    hidden, cotangent = torch.randn(2, 3, 5).double().requires_grad_(), torch.randn(2, 3, 11).double()
    actual, expected = ours.logits(hidden), F.linear(hidden, theirs.weight)
    torch.testing.assert_close(actual, expected)
    actual = torch.autograd.grad(actual, [hidden, ours.weight], cotangent)
    expected = torch.autograd.grad(expected, [hidden, theirs.weight], cotangent)
    torch.testing.assert_close(actual[0], expected[0])
    others = [i for i in range(11) if i != padding_id]
    torch.testing.assert_close(actual[1][others], expected[1][others])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_padding_row_stays_zero_where_input_and_output_are_tied(optimizer):
    embedding = TokenEmbedding(7, 3, padding_id=2)
    start = embedding.weight.detach().clone()
    optimizer = optimizer(embedding.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        logits = embedding.logits(embedding(torch.tensor([[1, 2, 5], [2, 2, 2]])))
        assert (logits[..., 2] == 0).all()
        logits.backward(torch.randn_like(logits))
        assert (embedding.weight.grad[2] == 0).all()
        optimizer.step()
    assert (embedding.weight[2] == 0).all()
    assert (embedding.weight != start).any(1).sum() == 6


@pytest.mark.parametrize("padding_id", [None, 1])
def test_the_gradient_of_both_uses_is_their_sum(padding_id):
    embedding = TokenEmbedding(5, 3, padding_id=padding_id, dtype=torch.float64)
    ids = torch.tensor([[0, 1, 3]])

    def of(weight: Tensor) -> Tensor:
        pinned = weight if padding_id is None else weight.index_fill(0, torch.tensor([padding_id]), 0.0)
        return F.embedding(ids, pinned) @ pinned.T

    out, cotangent = embedding.logits(embedding(ids)), torch.randn(1, 3, 5).double()
    expected = of(embedding.weight)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, embedding.weight, cotangent),
        torch.autograd.grad(expected, embedding.weight, cotangent),
    )


@pytest.mark.parametrize("padding_id", [None, 1])
@pytest.mark.parametrize("scale", [False, True])
def test_gradients(padding_id, scale):
    embedding = TokenEmbedding(5, 3, scale=scale, dtype=torch.float64)
    hidden = torch.randn(2, 3, requires_grad=True, dtype=torch.float64)
    ids = torch.tensor([[0, 4, 4]])

    def rows(weight):
        return torch.func.functional_call(embedding, {"weight": weight}, ids)

    assert gradcheck(rows, embedding.weight)
    assert gradgradcheck(rows, embedding.weight)
    assert gradcheck(embedding.logits, hidden)
    tied = TokenEmbedding(5, 3, padding_id=padding_id, dtype=torch.float64)
    assert gradgradcheck(lambda h: tied.logits(h).square(), hidden)


def test_gradients_of_each_sample_alone():
    """torch.func.vmap goes through, padding row and all."""
    embedding = TokenEmbedding(5, 3, padding_id=1)

    def loss(weight: Tensor, hidden: Tensor) -> Tensor:
        twin = {"weight": weight}
        return torch.func.functional_call(
            Logits(embedding), {"embedding.weight": twin["weight"]}, hidden
        ).sum()

    hidden = torch.randn(4, 3)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(embedding.weight, hidden)
    for gradient, h in zip(each, hidden, strict=True):
        expected = h.expand(5, -1).clone()
        expected[1] = 0
        torch.testing.assert_close(gradient, expected)


class Logits(nn.Module):
    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, hidden: Tensor) -> Tensor:
        return self.embedding.logits(hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_near(dtype):
    embedding = TokenEmbedding(11, 6, padding_id=0, scale=True)
    low = TokenEmbedding(11, 6, padding_id=0, scale=True, dtype=dtype)
    low.load_state_dict(embedding.state_dict())
    ids = torch.randint(11, (2, 3))
    torch.testing.assert_close(low(ids).float(), embedding(ids), rtol=0.02, atol=0.02)
    torch.testing.assert_close(
        low.logits(low(ids)).float(), embedding.logits(embedding(ids)), rtol=0.05, atol=0.05
    )


def test_any_shape_of_ids():
    embedding = TokenEmbedding(11, 6)
    assert embedding(torch.tensor(3)).shape == (6,)
    assert embedding(torch.zeros(2, 0, dtype=torch.int32)).shape == (2, 0, 6)
    assert embedding(torch.zeros(2, 3, 5, dtype=torch.int64)).shape == (2, 3, 5, 6)


def test_starts_normal_with_a_padding_row_of_zeros():
    embedding = TokenEmbedding(4000, 25, padding_id=7)
    assert embedding.weight.std().item() == pytest.approx(0.2, rel=0.02)
    assert TokenEmbedding(4000, 25, std=0.02).weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (embedding.weight[7] == 0).all()
    nn.init.ones_(embedding.weight)
    embedding.reset_parameters()
    assert (embedding.weight[7] == 0).all()
    assert (embedding.weight != 0).any(1).sum() == 3999


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenEmbedding(11, 6, padding_id=11), "padding_id must be from 0 to 10, got 11"),
        (lambda: TokenEmbedding(11, 6, padding_id=-1), "padding_id must be from 0 to 10, got -1"),
        (lambda: TokenEmbedding(11, 6)(torch.ones(2, 3)), "ids must be integers .* got torch.float32"),
        (lambda: TokenEmbedding(11, 6)(torch.ones(2, 3).bool()), "ids must be integers .* got torch.bool"),
        (lambda: TokenEmbedding(11, 6).logits(torch.ones(2, 5)), r"hidden must be \(..., 6\), got \(2, 5\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
