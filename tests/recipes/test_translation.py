"""Translation: pairs from files and by rule, the vocabulary, batches, BLEU, and a model that translates."""

import gzip
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.models import Transformer, create_model
from lamina.recipes import RecipeError, TranslationSettings, get_recipe
from lamina.recipes.number_words import in_english, in_german, number_pairs
from lamina.recipes.run import Plan
from lamina.recipes.text_files import find_file, read_lines
from lamina.recipes.translation import Translation, Translator
from lamina.recipes.translation_data import (
    LengthBatches,
    TranslationData,
    learn_pieces,
    padded,
    read_pairs,
)

NUMBERS = {
    0: ("zero", "null"),
    1: ("one", "eins"),
    17: ("seventeen", "siebzehn"),
    21: ("twenty-one", "einundzwanzig"),
    80: ("eighty", "achtzig"),
    101: ("one hundred and one", "einhunderteins"),
    999: ("nine hundred and ninety-nine", "neunhundertneunundneunzig"),
    1000: ("one thousand", "eintausend"),
    1100: ("one thousand one hundred", "eintausendeinhundert"),
    21_000: ("twenty-one thousand", "einundzwanzigtausend"),
    101_001: ("one hundred and one thousand and one", "einhunderteintausendeins"),
    234_005: ("two hundred and thirty-four thousand and five", "zweihundertvierunddreißigtausendfünf"),
}
WORDS = {word: n for n, word in enumerate(in_english(n) for n in range(20))}
WORDS |= {in_english(n): n for n in range(20, 100, 10)}


@pytest.mark.parametrize(("number", "words"), NUMBERS.items())
def test_numbers_in_words(number, words):
    assert (in_english(number), in_german(number)) == words


def value(words: str) -> int:
    """An independent reader of English numbers."""
    total = part = 0
    for word in re.split(r"[ -]", words.replace(" and ", " ")):
        if word == "thousand":
            total, part = total + 1000 * part, 0
        elif word == "hundred":
            part *= 100
        else:
            part += WORDS[word]
    return total + part


@given(st.integers(0, 999_999))
def test_words_say_the_number(number):
    assert value(in_english(number)) == number


def test_no_number_stands_in_two_parts():
    parts = number_pairs()
    english = [set(sides[0]) for sides in parts.values()]
    assert [len(s) for s in english] == [20_000, 500, 500]
    assert not english[0] & english[1] | english[0] & english[2] | english[1] & english[2]
    german = [text for sides in parts.values() for text in sides[1]]
    assert len(set(german)) == 21_000
    for part, size in (("val", 500), ("train", 7)):
        for n in range(size):
            first, relation, second = re.split(
                r" is (less|greater) than ", parts[part][0][n].removesuffix(".")
            )
            assert (relation == "less") == (value(first) < value(second))
            assert f" ist {'kleiner' if relation == 'less' else 'größer'} als " in parts[part][1][n]


def write_pairs(folder, ending="", **changes):
    for part, lines in (("train", 40), ("val", 3), ("test_2016_flickr", 5)):
        for language, say in (("en", in_english), ("de", in_german)):
            number = changes.get(f"{part}.{language}", lines)
            text = "".join(f" {say(n)} \n" for n in range(number))
            data = text.encode()
            (folder / f"{part}.{language}{ending}").write_bytes(
                gzip.compress(data) if ending.endswith("gz") else data
            )


@pytest.mark.parametrize("ending", ["", ".txt", ".gz", ".txt.gz"])
def test_the_published_files_are_read(ending, tmp_path):
    write_pairs(tmp_path, ending)
    pairs = read_pairs(tmp_path)
    assert {part: len(sides[0]) for part, sides in pairs.items()} == {"train": 40, "val": 3, "test": 5}
    assert pairs["train"][0][21] == "twenty-one"
    assert pairs["train"][1][21] == "einundzwanzig"


def test_bad_files_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"must hold train\.en, as text or gzipped"):
        read_pairs(tmp_path)
    write_pairs(tmp_path, **{"val.de": 2})
    with pytest.raises(RecipeError, match=r"val\.en and val\.de must have .* got 3 and 2 lines"):
        read_pairs(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.txt must be UTF-8 text"):
        read_lines(find_file(tmp_path, "latin"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a" * 9999)[:-9])
    with pytest.raises(RecipeError, match=r"cut\.gz must be UTF-8 text in gzip"):
        read_lines(find_file(tmp_path, "cut"))


def test_only_line_feeds_end_a_line(tmp_path):
    """Others stand within sentences of real files."""
    (tmp_path / "text").write_text("a\u2028b\nc\u0085d\n\ne", encoding="utf-8")
    assert read_lines(tmp_path / "text") == ["a\u2028b", "c\u0085d", "", "e"]


@given(st.lists(st.text("abc ,.ß-ü", min_size=1, max_size=20), min_size=1, max_size=5))
def test_pieces_give_the_text_back(texts):
    texts = [" ".join(text.split()) for text in texts]
    pieces = learn_pieces(["a b c , . ß - ü", *texts], 60)
    for text in texts:
        assert pieces.decode(pieces.encode(text).ids) == text


def test_what_training_has_not_is_unknown():
    pieces = learn_pieces(["a b"], 20)
    assert 3 in pieces.encode("a z").ids
    assert pieces.get_vocab_size() <= 20


@pytest.fixture(scope="module")
def data():
    data = TranslationData(tokens=120, vocab_size=150)
    data.setup("fit")
    return data


def test_pairs_begin_and_end(data):
    source, target = data.parts["train"][7]
    assert source[-1] == target[-1] == 2
    assert target[0] == 1
    assert 0 not in source + target
    assert data.text(torch.tensor(data.parts["test"][3][1])) == data.references[3]


def test_the_vocabulary_is_of_the_training_part(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "test_2016_flickr.de").write_text("QQ\n" * 5)
    data = TranslationData(tmp_path, vocab_size=60)
    data.setup("test")
    assert 3 in data.parts["test"][0][1]
    assert data.references == ["QQ"] * 5


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_have_every_sample_once_and_at_most_so_many_tokens(shuffle):
    torch.manual_seed(0)
    lengths = torch.randint(1, 30, (500,)).tolist()
    batches = LengthBatches(lengths, 100, shuffle=shuffle)
    first, second = list(batches), list(batches)
    for made in (first, second):
        assert sorted(n for batch in made for n in batch) == list(range(500))
        assert len(made) == len(batches)
        assert all(len(b) * max(lengths[n] for n in b) <= 100 for b in made)
    assert (first == second) != shuffle
    assert list(LengthBatches([200], 100, shuffle=shuffle)) == [[0]]


def test_padding_stands_behind():
    source, target = padded([([5, 2], [1, 5, 2]), ([4, 6, 7, 2], [1, 2])])
    assert source.tolist() == [[5, 2, 0, 0], [4, 6, 7, 2]]
    assert target.tolist() == [[1, 5, 2], [1, 2, 0]]


def test_bleu_is_sacrebleu_s(data):
    model = create_model("transformer_copy", vocab_size=150)
    task = Translation(model, TranslationSettings(epochs=1, learning_rate=0.1))
    logged = {}
    task.log = lambda name, value, **options: logged.__setitem__(name, value)
    task._trainer = type("Trainer", (), {"datamodule": data})()
    task.setup("test")
    targets = iter(torch.tensor(target[1:]) for _, target in data.parts["test"])
    task.write = lambda source: torch.nn.utils.rnn.pad_sequence(
        [next(targets) for _ in source], batch_first=True
    )
    task.on_test_start()
    for n, batch in enumerate(data.test_dataloader()):
        task.test_step(batch, n)
    task.texts[0] = "null"
    task.on_test_epoch_end()
    assert logged["test/exact_match"] == pytest.approx(100 * 499 / 500)
    assert logged["test/bleu"] == pytest.approx(99.8, abs=0.2)
    assert task.evidence()["translations"][0] == {"ours": "null", "reference": data.references[0]}
    small = Translation(create_model("transformer_copy"), TranslationSettings(epochs=1, learning_rate=0.1))
    small._trainer = task._trainer
    with pytest.raises(RecipeError, match=r"vocab_size must be at most the model's 11, got \d+: --set model"):
        small.setup("fit")


def test_a_translator_keeps_the_order_of_its_texts(data, tmp_path):
    torch.manual_seed(0)
    model = create_model("transformer_copy", vocab_size=150).eval()
    model.save_pretrained(tmp_path)
    data.save(tmp_path)
    translate = Translator.from_folder(tmp_path)
    texts = ["one thousand and one", "two", "ninety-nine thousand", ""]
    together = translate(texts, max_length=7, batch_size=2)
    assert together == [translate([text], max_length=7)[0] for text in texts]
    assert translate([]) == []
    with pytest.raises(ValueError, match="texts must be a list of strings, got one string"):
        translate("one")
    with pytest.raises(RecipeError, match=r"must hold a model and tokenizer\.json"):
        Translator.from_folder(tmp_path / "nothing")


def test_an_alignment_has_a_row_for_each_piece_written(data, tmp_path):
    model = create_model("transformer_copy", vocab_size=150).eval()
    translator = Translator(model, data.tokenizer)
    weights, target, source = translator.alignment("twenty-one", "einundzwanzig")
    assert weights.shape == (len(target), len(source))
    assert target[-1] == source[-1] == "</s>"
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(target)))
    translator.picture("twenty-one", "einundzwanzig", path=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"vocab_size": 4}, "vocab_size must be at least 5"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TranslationSettings(epochs=1, learning_rate=0.1, **options)


def test_it_runs_from_end_to_end(tmp_path, lamina):
    write_pairs(tmp_path)
    small = ["transformer_translation", "--data", tmp_path, "--set", "epochs=2", "--set", "tokens=60"]
    small += [
        "--set",
        "vocab_size=60",
        "--set",
        "model.dim=16",
        "--set",
        "model.hidden_dim=7",
        "--set",
        "threads=1",
    ]
    small += ["--set", "model.encoder_depth=1", "--set", "model.decoder_depth=1", "--accelerator", "cpu"]
    answer = lamina("reproduce", *small, "--out", tmp_path / "report")
    assert answer.status == 1
    assert "below the bar" in answer.err
    (run,) = (tmp_path / "report" / "transformer_translation").iterdir()
    assert isinstance(Translator.from_folder(run / "model").model, Transformer)
    assert (run / "attention_to_the_source.png").stat().st_size > 0


def test_a_result_to_commit_is_one_with_data(tmp_path):
    """The bar is Multi30k's: what comes of numbers in words is no replication of it."""
    write_pairs(tmp_path)
    recipe = get_recipe("transformer_translation")
    for folder, is_default in ((None, False), (tmp_path, True)):
        plan = Plan(recipe=recipe, settings=recipe.settings, folder=folder)
        assert plan.description["is_default"] == is_default
    lstm = get_recipe("lstm_digits")
    assert Plan(recipe=lstm, settings=lstm.settings).description["is_default"]


def test_the_recipe_for_a_gpu_trains_the_papers_base_model():
    recipe, small = get_recipe("transformer_translation_gpu"), get_recipe("transformer_translation")
    model = create_model(recipe.model, **recipe.model_options, device="meta")
    assert (model.config.dim, model.config.encoder_depth, model.config.hidden_dim) == (512, 6, 2048)
    assert model.config.vocab_size == recipe.settings.vocab_size
    # The peak of the paper's schedule: 512^-0.5 times 4000^-0.5.
    assert recipe.settings.learning_rate == pytest.approx((512 * 4000) ** -0.5, rel=0.01)
    assert recipe.metric.bar > small.metric.bar
    assert (recipe.metric.key, recipe.data, recipe.task) == (small.metric.key, small.data, small.task)
