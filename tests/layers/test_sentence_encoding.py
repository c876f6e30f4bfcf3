"""Position encoding of sentences: the printed formula, the released code's, and what padding may not do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import SentenceEncoding
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

seeds, sizes = st.integers(0, 2**31), st.integers(1, 7)
forms = pytest.mark.parametrize("form", ["paper", "code", "bag"])


def formula(form: str, k: int, j: int, dim: int, words: int) -> float:
    """l of channel k and word j, both from 1, as the paper prints it and as build_model.m has it."""
    if form == "paper":
        return (1 - j / words) - (k / dim) * (1 - 2 * j / words)
    if form == "code":
        return 1 + 4 * (k - (dim + 1) / 2) * (j - (words + 1) / 2) / dim / words
    return 1.0


def encoded(form: str, x: np.ndarray, dim: int, total: int) -> np.ndarray:
    out = np.zeros(dim)
    for j in range(len(x)):
        for k in range(dim):
            out[k] += formula(form, k + 1, j + 1, dim, total) * x[j, k]
    return out


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@forms
@given(seed=seeds, words=sizes, dim=sizes)
def test_is_the_formula(form, seed, words, dim):
    torch.manual_seed(seed)
    sentences = x(2, 3, words, dim)
    expected = [[encoded(form, s.numpy(), dim, words) for s in story] for story in sentences]
    torch.testing.assert_close(SentenceEncoding(dim, form=form)(sentences), torch.tensor(np.array(expected)))


@forms
def test_weights_are_of_words_by_channels(form):
    expected = [[formula(form, k, j, 5, 3) for k in range(1, 6)] for j in range(1, 4)]
    torch.testing.assert_close(SentenceEncoding(5, form=form).weights(3), torch.tensor(expected))


@forms
@given(seed=seeds, words=sizes, before=sizes, after=sizes)
def test_each_sentence_has_its_own_length_and_padding_no_influence(form, seed, words, before, after):
    torch.manual_seed(seed)
    encoding, sentence = SentenceEncoding(5, form=form), x(words, 5)
    padded = torch.cat(
        [torch.full((before, 5), 1e3), sentence, torch.full((after, 5), -1e3)]
    ).requires_grad_()
    mask = torch.tensor([False] * before + [True] * words + [False] * after)
    out = encoding(padded, mask)
    torch.testing.assert_close(out, encoding(sentence))
    (gradient,) = torch.autograd.grad(out, padded, x(5))
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()


def test_a_hole_in_a_sentence_is_no_word():
    encoding, sentence = SentenceEncoding(5), x(3, 5)
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(encoding(sentence, mask), encoding(sentence[mask]))


@pytest.mark.parametrize("form", ["paper", "code"])
def test_max_words_counts_columns_of_one_length(form):
    """As in the released code, where padding is a word whose embedding is zero."""
    encoding, sentence = SentenceEncoding(5, form=form, max_words=7), x(3, 5)
    expected = torch.tensor(encoded(form, sentence.numpy(), 5, 7))
    torch.testing.assert_close(encoding(sentence), expected)
    torch.testing.assert_close(encoding(torch.cat([sentence, torch.zeros(4, 5)])), expected)
    mask = torch.tensor([True] * 3 + [False] * 2)
    torch.testing.assert_close(encoding(torch.cat([sentence, x(2, 5)]), mask), expected)
    second = torch.tensor([False, True, False])
    weights = [formula(form, k, 2, 5, 7) for k in range(1, 6)]
    torch.testing.assert_close(encoding(sentence, second), torch.tensor(weights).double() * sentence[1])


@given(seed=seeds, words=st.integers(2, 7))
def test_order_counts_but_in_a_bag(seed, words):
    torch.manual_seed(seed)
    sentence, order = x(words, 5), torch.randperm(words)
    bag = SentenceEncoding(5, form="bag")
    torch.testing.assert_close(bag(sentence[order]), bag(sentence))
    for form in "paper", "code":
        encoding = SentenceEncoding(5, form=form)
        assert not torch.allclose(encoding(sentence.flip(0)), encoding(sentence))


def test_the_code_is_about_twice_the_paper():
    code, paper = (SentenceEncoding(20, form=f).weights(8, like=x(1)) for f in ("code", "paper"))
    assert code.mean().item() == pytest.approx(1.0)
    assert paper.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (code - 2 * paper).abs().max().item() == pytest.approx(0.17, abs=0.006)
    assert np.corrcoef(code.numpy().ravel(), paper.numpy().ravel())[0, 1] == pytest.approx(0.97, abs=0.006)
    gap = SentenceEncoding(2000, form="code").weights(800) - 2 * SentenceEncoding(2000).weights(800)
    assert gap.abs().max() < 0.01


@forms
@given(seed=seeds, words=sizes)
def test_factors_are_the_weights(form, seed, words):
    torch.manual_seed(seed)
    encoding, mask = SentenceEncoding(5, form=form), torch.rand(2, 3, words) < 0.7
    places, channels = encoding.factors(words, mask)
    assert places.shape == (2, 3, len(channels), words)
    torch.testing.assert_close(places.mT @ channels, encoding.weights(words, mask))


@forms
def test_gradients(form):
    encoding = SentenceEncoding(3, form=form)
    words, mask = x(2, 5, 3).requires_grad_(), torch.rand(2, 5) < 0.7
    assert gradcheck(encoding, (words, mask))
    assert gradgradcheck(encoding, (words, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_near(dtype):
    encoding, words = SentenceEncoding(6, form="code"), x(2, 4, 6)
    out = encoding(words.to(dtype))
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), encoding(words), rtol=0.03, atol=0.03)


def test_a_sentence_without_words_is_zero():
    words = x(2, 4, 6).requires_grad_()
    out = SentenceEncoding(6)(words, torch.zeros(2, 4).bool())
    assert (out == 0).all()
    assert (torch.autograd.grad(out, words, x(2, 6))[0] == 0).all()
    assert (SentenceEncoding(6)(x(2, 0, 6)) == torch.zeros(2, 6)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SentenceEncoding(6, form="sum"), "form must be 'paper', 'code' or 'bag', got 'sum'"),
        (lambda: SentenceEncoding(6)(x(4, 5)), r"words must be \(..., J, 6\), got \(4, 5\)"),
        (lambda: SentenceEncoding(6)(x(6)), r"words must be \(..., J, 6\), got \(6,\)"),
        (lambda: SentenceEncoding(6, max_words=3)(x(4, 6)), "num_words must be at most max_words=3, got 4"),
        (lambda: SentenceEncoding(6)(x(4, 6), torch.ones(4)), "word_mask must be boolean"),
        (
            lambda: SentenceEncoding(6)(x(2, 4, 6), torch.ones(3).bool()),
            r"word_mask must broadcast to \(2, 4\), got \(3,\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
