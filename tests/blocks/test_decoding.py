"""Searches against all sequences written out, whatever remembers what was read."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.blocks import Decoding, beam_search, greedy_search
from torch import Tensor

seeds = st.integers(0, 2**31)
END, VOCABULARY, LONGEST = 3, 5, 4


class Remembering:
    """Its distribution is drawn from all that it has read, which it keeps in the order it is told."""

    def __init__(self, seed: int, sharpness: float = 2.0) -> None:
        self.seed, self.sharpness, self.read = seed, sharpness, None

    def __call__(self, tokens: Tensor) -> Tensor:
        self.read = tokens if self.read is None else torch.cat([self.read, tokens], 1)
        return torch.stack([self.scores(row) for row in self.read.tolist()])

    def reorder(self, rows: Tensor) -> None:
        self.read = self.read[rows]

    def scores(self, read: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, *read)) % 2**31)
        return self.sharpness * torch.randn(VOCABULARY, generator=generator)


def log_p(model: Remembering, prompt: list[int], tokens) -> float:
    total, read = 0.0, list(prompt)
    for token in tokens:
        total += model.scores(read).log_softmax(-1)[token].item()
        read.append(token)
    return total


def penalised(total: float, length: int, penalty: float) -> float:
    return total / ((5 + length) / 6) ** penalty


def endings(longest: int):
    """Every sequence that ends, of at most so many tokens."""
    others = [t for t in range(VOCABULARY) if t != END]
    for n in range(longest):
        yield from ((*begun, END) for begun in itertools.product(others, repeat=n))


@given(seed=seeds, penalty=st.sampled_from([0.0, 0.6, 2.0]), longest=st.integers(1, LONGEST))
def test_enough_beams_find_the_best_of_all(seed, penalty, longest):
    model, prompt = Remembering(seed), [0, 2]
    found = beam_search(
        Remembering(seed),
        torch.tensor([prompt]),
        num_beams=VOCABULARY**LONGEST,
        length_penalty=penalty,
        max_length=longest,
        end_id=END,
        padding_id=4,
    )
    ranked = sorted(
        ((penalised(log_p(model, prompt, t), len(t), penalty), t) for t in endings(longest)), reverse=True
    )
    count = min(len(ranked), found.tokens.shape[1])
    for n, (score, tokens) in enumerate(ranked[:count]):
        length = int(found.lengths[0, n])
        assert found.tokens[0, n, :length].tolist() == list(tokens)
        assert (found.tokens[0, n, length:] == 4).all()
        assert found.scores[0, n].item() == pytest.approx(score, abs=1e-4)
    assert (found.scores[0, len(ranked) :] == -torch.inf).all()
    assert (found.lengths[0, len(ranked) :] == 0).all()


@given(seed=seeds, beams=st.integers(1, 4), penalty=st.sampled_from([0.0, 0.6]))
def test_scores_are_of_what_was_written(seed, beams, penalty):
    """Which holds only if the memory went along with its beam."""
    model = Remembering(seed, sharpness=1.0)
    prompts = [[0, 1], [2, 4]]
    found = beam_search(
        Remembering(seed, sharpness=1.0),
        torch.tensor(prompts),
        num_beams=beams,
        length_penalty=penalty,
        max_length=6,
        end_id=END,
    )
    for b, k in itertools.product(range(2), range(beams)):
        length = int(found.lengths[b, k])
        if length:
            tokens = found.tokens[b, k, :length].tolist()
            score = penalised(log_p(model, prompts[b], tokens), length, penalty)
            assert found.scores[b, k].item() == pytest.approx(score, abs=1e-4)
            assert END not in tokens[:-1]
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()


@given(seed=seeds, beams=st.integers(1, 3))
def test_rows_do_not_see_each_other(seed, beams):
    prompts = torch.tensor([[0], [1], [2]])
    options = {"num_beams": beams, "end_id": END, "padding_id": 4}
    limits = torch.tensor([5, 2, 7])
    together = beam_search(Remembering(seed), prompts, max_length=limits, **options)
    for b in range(3):
        alone = beam_search(Remembering(seed), prompts[b : b + 1], max_length=int(limits[b]), **options)
        width = alone.tokens.shape[2]
        assert torch.equal(together.tokens[b, :, :width], alone.tokens[0])
        assert (together.tokens[b, :, width:] == 4).all()
        torch.testing.assert_close(together.scores[b], alone.scores[0])
        assert torch.equal(together.lengths[b], alone.lengths[0])


@given(seed=seeds)
def test_one_beam_without_a_penalty_is_greedy(seed):
    prompt, options = torch.tensor([[0], [1]]), {"max_length": 6, "end_id": END, "padding_id": 4}
    greedy = greedy_search(Remembering(seed), prompt, **options)
    beam = beam_search(Remembering(seed), prompt, num_beams=1, length_penalty=0.0, **options)
    assert torch.equal(greedy.tokens, beam.tokens)
    assert torch.equal(greedy.lengths, beam.lengths)
    torch.testing.assert_close(greedy.scores, beam.scores)


@given(seed=seeds)
def test_greedy_takes_the_likeliest_and_stops(seed):
    model, prompts = Remembering(seed), [[0, 1], [4, 2], [1, 1]]
    limits = torch.tensor([4, 0, 6])
    found = greedy_search(
        Remembering(seed), torch.tensor(prompts), max_length=limits, end_id=END, padding_id=4
    )
    for b, limit in enumerate(limits.tolist()):
        read, written = list(prompts[b]), []
        while len(written) < limit and END not in written:
            written.append(int(model.scores(read).argmax()))
            read.append(written[-1])
        assert found.tokens[b, 0, : len(written)].tolist() == written
        assert (found.tokens[b, 0, len(written) :] == 4).all()
        assert found.lengths[b, 0] == len(written)
        assert found.scores[b, 0].item() == pytest.approx(log_p(model, prompts[b], written), abs=1e-4)


def test_what_is_cut_off_counts_only_where_nothing_ended():
    """Row 0 never ends, row 1 does, unlikely as it is."""

    def step(tokens):
        scores = torch.tensor([5.0, 0.0, 0.0, -torch.inf, 0.0]).repeat(len(tokens), 1)
        scores[tokens[:, -1] == 1, END] = 1.0
        return scores

    class Stepping:
        def __call__(self, tokens):
            return step(tokens)

        def reorder(self, rows): ...

    found = beam_search(Stepping(), torch.tensor([[0], [1]]), num_beams=2, max_length=2, end_id=END)
    assert found.best.tolist() == [[0, 0], [END, 0]]
    assert found.lengths[:, 0].tolist() == [2, 1]
    assert (found.scores[0] > -torch.inf).all()
    assert found.scores[1, 1] == -torch.inf


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_nothing_to_write(search):
    options = {"end_id": END, "max_length": 0}
    found = search(Remembering(1), torch.tensor([[0], [1]]), **options)
    assert found.tokens.shape[0] == 2
    assert found.tokens.shape[2] == 0
    assert (found.lengths == 0).all()
    found = search(Remembering(1), torch.zeros(0, 1, dtype=torch.long), **options | {"max_length": 5})
    assert found.tokens.shape[0] == 0


def test_fewer_tokens_than_beams():
    class Two:
        def __call__(self, tokens):
            return torch.zeros(len(tokens), 2)

        def reorder(self, rows): ...

    found = beam_search(Two(), torch.tensor([[0]]), num_beams=7, max_length=3, end_id=1, length_penalty=0.0)
    assert found.lengths[0, :3].tolist() == [1, 2, 3]
    assert (found.scores[0, 3:] == -torch.inf).all()


def test_gradients_are_not_kept():
    weight = torch.zeros(VOCABULARY, requires_grad=True)
    found = greedy_search(
        lambda tokens: weight.expand(len(tokens), -1), torch.tensor([[0]]), max_length=2, end_id=END
    )
    assert not found.scores.requires_grad


def test_a_model_at_work_is_known_by_what_it_can():
    assert isinstance(Remembering(0), Decoding)
    assert not isinstance(object(), Decoding)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.long), {}, r"prompt must be \(B, T\) of integers with T at least 1"),
        (torch.zeros(2, dtype=torch.long), {}, r"got \(2,\) of torch.int64"),
        (torch.zeros(2, 1), {}, r"got \(2, 1\) of torch.float32"),
        (torch.zeros(2, 1, dtype=torch.bool), {}, "of torch.bool"),
        (torch.zeros(2, 1, dtype=torch.long), {"num_beams": 0}, "num_beams must be at least 1, got 0"),
        (torch.zeros(2, 1, dtype=torch.long), {"length_penalty": -0.1}, "length_penalty must be at least 0"),
        (torch.zeros(2, 1, dtype=torch.long), {"max_length": torch.tensor([1, 2, 3])}, r"\(2,\) of them"),
        (torch.zeros(2, 1, dtype=torch.long), {"max_length": 2.5}, "max_length must be an integer or"),
        (torch.zeros(1, 1, dtype=torch.long), {"max_length": torch.ones(1, 1, dtype=torch.long)}, "got"),
    ],
)
def test_bad_input_is_named(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(Remembering(0), prompt, **{"max_length": 3, "end_id": END} | options)
