"""BERT's pre-training task: losses by hand, fixed masks, reading from the left, a model that fills masks."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from lamina.models import create_model
from lamina.recipes import RecipeError, TextSettings, get_recipe
from lamina.recipes.bert_adam import BertAdam
from lamina.recipes.masked_language import (
    LeftToRightLanguage,
    MaskedLanguage,
    MaskFiller,
    neighbours,
    unigram,
)
from lamina.recipes.masking import IGNORED
from lamina.recipes.text_data import MASK, PADDING, SEP, UNKNOWN, TextData
from lamina.recipes.text_models import encode
from tokenizers import Tokenizer
from torch import nn

SETTINGS = TextSettings(epochs=4, learning_rate=0.1, weight_decay=0.01, warmup_epochs=1.0, length=16)
SMALL = {"dim": 12, "depth": 2, "num_heads": 3, "hidden_dim": 7, "max_length": 16, "vocab_size": 150}


@pytest.fixture(scope="module")
def data():
    data = TextData(length=16, batch_size=7, vocab_size=150)
    data.setup("fit")
    return data


@pytest.fixture
def bound(data):
    """A task with what Lightning gives it, and a dictionary of what it logs."""

    def make(task, **trainer):
        logged = {}

        def log(name, value, **options):
            logged[name] = float(value.detach()), options

        task.log = log
        task._trainer = type("Trainer", (), {"datamodule": data} | trainer)()
        task.setup("fit")
        return task, logged

    return make


def bert(is_causal=False, **changes):
    torch.manual_seed(0)
    return create_model("bert_tiny_pretraining", **SMALL | changes, is_causal=is_causal).eval()


class Fixed(nn.Module):
    """A model that says of every place that it is token n % V, more or less surely."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = bert().config
        self.seen = []

    def forward(self, ids, places=None):
        self.seen.append(ids)
        shape = ids.shape if places is None else places.shape
        return self.table.expand(*shape, -1)


def test_the_loss_is_the_mean_over_the_masked_tokens(bound, data):
    log_p = F.log_softmax(torch.randn(150), 0)
    task, logged = bound(MaskedLanguage(Fixed(log_p), SETTINGS))
    torch.manual_seed(3)
    batch = data.parts["train"][:5]
    loss = task.training_step(batch, 0)
    torch.manual_seed(3)
    masked = data.hide(batch)
    asked = masked.labels[masked.labels != IGNORED]
    assert loss.item() == pytest.approx(-log_p[asked].mean().item(), rel=1e-5)
    assert logged["train/loss"][1]["batch_size"] == len(asked)
    assert not torch.equal(task.model.seen[0], batch)


def test_a_test_asks_the_same_of_every_model_and_seed(bound, data):
    batch = data.parts["test"][:9]
    torch.manual_seed(1)
    one = data.hide_fixed(batch, 2)
    torch.manual_seed(2)
    other = data.hide_fixed(batch, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one.labels, data.hide_fixed(batch, 3).labels)
    task, logged = bound(MaskedLanguage(Fixed(torch.eye(150)[17]), SETTINGS))
    task.test_step(batch, 2)
    asked = one.labels[one.labels != IGNORED]
    right = 100 * (asked == 17).float().mean().item()
    assert logged["test/accuracy"][0] == pytest.approx(right)
    assert logged["test/loss"][1]["batch_size"] == len(asked)
    assert int((one.ids == MASK).sum()) > 0


def test_nobody_is_asked_for_special_tokens(data):
    batch = data.parts["train"][:200].clone()
    batch[:, 4] = UNKNOWN
    labels = data.hide(batch).labels
    assert not torch.isin(labels, torch.tensor([PADDING, UNKNOWN, SEP])).any()
    assert MASK not in batch


def test_a_batch_of_special_tokens_alone_costs_nothing(bound):
    task, logged = bound(MaskedLanguage(bert(), SETTINGS))
    nothing = torch.full((2, 16), SEP)
    assert task.training_step(nothing, 0).item() == 0.0
    task.test_step(nothing, 0)
    assert logged["test/loss"][0] == 0.0


def test_the_language_model_is_asked_for_the_same_tokens_from_the_left(bound, data):
    model = bert(is_causal=True)
    task, logged = bound(LeftToRightLanguage(model, SETTINGS))
    batch = data.parts["test"][:6]
    task.test_step(batch, 0)
    masked = data.hide_fixed(batch, 0)
    total, count = 0.0, 0
    for row in range(6):
        for place, label in zip(masked.places[row].tolist(), masked.labels[row].tolist(), strict=True):
            if label != IGNORED:
                assert batch[row, place] == label
                logits = model(batch[row : row + 1, :place]).tokens[0, -1]  # of what stands before it alone
                total -= F.log_softmax(logits, 0)[label].item()
                count += 1
    assert logged["test/loss"][0] == pytest.approx(total / count, rel=1e-4)


def test_the_language_model_learns_every_token(bound, data):
    log_p = F.log_softmax(torch.randn(150), 0)
    task, logged = bound(LeftToRightLanguage(Fixed(log_p), SETTINGS))
    batch = data.parts["val"][-3:].clone()
    batch[0, 5] = UNKNOWN
    assert PADDING in batch
    loss = task.training_step(batch, 0)
    asked = [n for row in batch.tolist() for n in row[1:] if n not in (PADDING, UNKNOWN)]
    assert loss.item() == pytest.approx(-log_p[asked].mean().item(), rel=1e-5)
    assert logged["train/loss"][1]["batch_size"] == len(asked)
    assert torch.equal(task.model.seen[0], batch)


def test_any_model_of_logits_will_do(bound, data):
    model = create_model("linformer_small", vocab_size=150, max_length=16, dim=12, hidden_dim=7, rank=5)
    task, _ = bound(MaskedLanguage(model, SETTINGS))
    assert task.training_step(data.parts["train"][:3], 0).item() == pytest.approx(math.log(150), rel=0.1)


def test_what_was_filled_in_is_shown(bound, data):
    task, _ = bound(MaskedLanguage(Fixed(torch.eye(150)[17]), SETTINGS))
    batch = data.parts["test"][:20]
    for n in range(2):
        task.test_step(batch, n)
    shown = task.evidence()["filled"]
    assert len(shown) == 8
    labels = data.hide_fixed(batch, 0).labels
    for row, entry in enumerate(shown):
        assert entry["was"] == [data.tokenizer.id_to_token(n) for n in labels[row].tolist() if n != IGNORED]
        assert set(entry["ours"]) == {data.tokenizer.id_to_token(17)}
        assert entry["text"].startswith("[CLS]")


def test_matrices_decay_and_the_rate_rises_and_falls(bound):
    task, _ = bound(MaskedLanguage(bert(), SETTINGS), estimated_stepping_batches=40)
    made = task.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert isinstance(optimizer, BertAdam)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert {p.ndim for p in optimizer.param_groups[0]["params"]} == {2}
    assert {p.ndim for p in optimizer.param_groups[1]["params"]} == {1}
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[9] == pytest.approx(0.1)
    assert rates[24] == pytest.approx(0.05)
    assert rates[39] == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 100},
            r"vocab_size must be at most the model's 100, got 150: --set model\.vocab",
        ),
        ({"max_length": 12}, r"length must be at most the model's 12, got 16: --set model\.max_length=16"),
    ],
)
def test_a_model_too_small_for_the_text_is_named(changes, message, bound):
    with pytest.raises(RecipeError, match=message):
        bound(MaskedLanguage(bert(**changes), SETTINGS))


def test_the_unigram_knows_how_often_a_token_is(data):
    counts = [1.0] * 150
    for n in data.parts["train"].flatten().tolist():
        counts[n] += 1
    total = sum(counts[MASK:])
    wanted = [
        -math.log(counts[label] / total)
        for n, ids in enumerate(data.test_dataloader())
        for label in data.hide_fixed(ids, n).labels.flatten().tolist()
        if label != IGNORED
    ]
    assert unigram(data) == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)


def test_neighbours_are_counted_in_pairs(data):
    """Of those two alone, in the test's first batches; unseen pairs by the shares of the tokens."""
    known, train = 150, data.parts["train"].tolist()
    counts = [1.0] * known
    pairs = {}
    for row in train:
        for n in row:
            counts[n] += 1
        for pair in itertools.pairwise(row):
            pairs[pair] = pairs.get(pair, 0) + 1
    shares = [n / sum(counts[MASK:]) if id >= MASK else 0.0 for id, n in enumerate(counts)]
    after = {w: sum(n for (a, _), n in pairs.items() if a == w) for w in range(known)}
    before = {w: sum(n for (_, b), n in pairs.items() if b == w) for w in range(known)}

    def told(left, right):
        p = [
            (pairs.get((left, w), 0) + 5 * share)
            / (after[left] + 5)
            * (pairs.get((w, right), 0) + 5 * share)
            / (before[right] + 5)
            / share
            if share
            else 0.0
            for w, share in enumerate(shares)
        ]
        return [q / sum(p) for q in p]

    few = TextData(length=16, batch_size=7, vocab_size=150)
    few.tokenizer, few.parts = data.tokenizer, data.parts | {"test": data.parts["test"][-9:]}
    losses = []
    for n, ids in enumerate(few.test_dataloader()):
        masked = few.hide_fixed(ids, n)
        for row, places, labels in zip(*(part.tolist() for part in masked), strict=True):
            for place, label in zip(places, labels, strict=True):
                if label != IGNORED:
                    p = told(row[place - 1], [*row, PADDING][place + 1])
                    losses.append(-math.log(p[label]))
    assert len(losses) > 10
    assert neighbours(few) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert neighbours(few) < unigram(few)


@pytest.fixture
def filler(data):
    model = bert()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return MaskFiller(model, data.tokenizer)


def test_a_filler_tells_each_mask(filler):
    texts = ["the [MASK] baker [MASK]", "[MASK]", "in [MASK] the old smith [MASK] his [MASK]"]
    found = filler(texts, top=4, batch_size=2)
    assert [len(masks) for masks in found] == [2, 1, 3]
    tokenizer = filler.tokenizer
    for text, masks in zip(texts, found, strict=True):
        (ids,) = encode(tokenizer, [text])
        p = filler.model(torch.tensor([ids])).tokens[0].softmax(-1)
        places = [n for n, id in enumerate(ids) if id == MASK]
        for place, guesses in zip(places, masks, strict=True):
            best = p[place].topk(4)
            assert [tokenizer.token_to_id(guess.piece) for guess in guesses] == best.indices.tolist()
            assert [guess.probability for guess in guesses] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_bad_texts_are_named(filler):
    with pytest.raises(ValueError, match=r"texts must each have a \[MASK\], got 'the baker'"):
        filler(["[MASK]", "the baker"])
    with pytest.raises(ValueError, match="texts must have at most 14 pieces, got 15 in"):
        filler(["[MASK] " * 15])
    with pytest.raises(ValueError, match="texts must be a list of strings, got one string"):
        filler("[MASK]")
    assert filler([]) == []


def test_a_filler_is_read_from_a_run_s_folder(filler, data, tmp_path):
    filler.model.save_pretrained(tmp_path)
    data.save(tmp_path)
    again = MaskFiller.from_folder(tmp_path)
    assert again(["the [MASK]"]) == filler(["the [MASK]"])
    with pytest.raises(RecipeError, match=r"must hold a model and tokenizer\.json"):
        MaskFiller.from_folder(tmp_path / "nothing")
    other = Tokenizer.from_str(data.tokenizer.to_str().replace("[MASK]", "<mask>"))
    with pytest.raises(ValueError, match=r"tokenizer must have \[MASK\]"):
        MaskFiller(filler.model, other)


def test_the_recipe_compares_three_trainings(tmp_path, lamina):
    small = ["bert_mlm", "--accelerator", "cpu", "--out", tmp_path]
    sizes = [f"model.{name}={n}" for name, n in SMALL.items() if name != "max_length"]
    sizes += ["epochs=2", "batches=3", "batch_size=4", "vocab_size=150", "length=16"]
    answer = lamina("reproduce", *small, *(word for size in sizes for word in ("--set", size)))
    assert answer.status == 1, answer.err
    (run,) = (tmp_path / "bert_mlm").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert set(result["arms"]) == {"left to right", "left-to-right language model"}
    losses = [result["value"], *(arm[0]["value"] for arm in result["arms"].values())]
    assert len(set(losses)) == 3
    assert all(0 < loss < 2 * math.log(150) for loss in losses)
    saved, difference = (claim["value"] for claim in result["claims"])
    assert saved == pytest.approx(100 * (1 - losses[0] / result["baselines"]["unigram"]))
    assert difference == pytest.approx(losses[1] - losses[0])
    assert len(MaskFiller.from_folder(run / "model")(["the [MASK]"])[0][0]) == 5
    for picture in ("curves_by_arm", "attention_of_a_line"):
        assert (run / f"{picture}.png").stat().st_size > 0


def test_the_bars_are_those_of_the_issue():
    recipe = get_recipe("bert_mlm")
    assert [claim.bar for claim in recipe.claims] == [40.0, 0.0]
