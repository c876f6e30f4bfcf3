"""Plain text as blocks: files and parts, word pieces, the text made by rule."""

import gzip
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.recipes import RecipeError, TextSettings
from lamina.recipes.market_words import SEASONS, TRADES, sentences
from lamina.recipes.text_data import (
    CLS,
    MASK,
    PADDING,
    SEP,
    SPECIAL,
    UNKNOWN,
    TextData,
    as_blocks,
    learn_word_pieces,
    read_texts,
)

WORDS = re.compile(r"[a-z]+")


def write(folder, **files):
    """Names with "_" for "."; those in .gz are packed."""
    for name, text in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def test_a_sentence_agrees_with_itself():
    """Trade, tool and place; season and weather; one and many."""
    plural = {many for _, many in TRADES}
    told = {word: pair for names, pair in TRADES.items() for word in names}
    for line in sentences()["val"]:
        words = WORDS.findall(line)
        (trade,) = set(words) & set(told)
        assert set(told[trade]) <= set(words)
        assert ("their" in words) == (trade in plural)
        assert ("their" in words) != bool({"his", "her"} & set(words))
        (season,) = set(words) & set(SEASONS)
        for other, (weather, feeling) in SEASONS.items():
            if other != season:
                assert weather not in line
                assert feeling not in words


def test_the_text_by_rule_stays_what_it_is():
    first, second = sentences(), sentences()
    assert first == second
    assert [len(lines) for lines in first.values()] == [12_000, 600, 600]


@pytest.fixture(scope="module")
def data():
    data = TextData(length=16, batch_size=7, vocab_size=150)
    data.setup("fit")
    return data


def test_blocks_hold_the_whole_text_in_order(data):
    for part, lines in sentences().items():
        blocks = data.parts[part]
        assert blocks.shape[1] == 16
        assert (blocks[:, 0] == CLS).all()
        pieces = blocks[:, 1:].flatten()
        pieces = pieces[pieces != PADDING]
        assert int((pieces == SEP).sum()) == len(lines)
        start = pieces[:400].tolist()
        start = start[: len(start) - start[::-1].index(SEP)]
        known = [id for line in lines[:100] for id in (*data.tokenizer.encode(line).ids, SEP)]
        assert known[: len(start)] == start
        assert (blocks[:-1] != PADDING).all()  # but for the last


def test_batches_are_blocks(data):
    torch.manual_seed(0)
    batches = list(data.val_dataloader())
    assert torch.equal(torch.cat(batches), data.parts["val"])
    assert {len(batch) for batch in batches[:-1]} == {7}
    train = torch.cat(list(data.train_dataloader()))
    assert not torch.equal(train, data.parts["train"])
    assert sorted(train.tolist()) == sorted(data.parts["train"].tolist())


@pytest.mark.parametrize("batches", [2, 400])
def test_an_epoch_may_be_a_number_of_steps(data, batches):
    some = TextData(length=16, batch_size=7, vocab_size=150, batches=batches)
    some.parts = {"train": data.parts["train"][:1000]}
    torch.manual_seed(0)
    first, second = list(some.train_dataloader()), list(some.train_dataloader())
    assert len(first) == batches
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parts_by_name(tmp_path):
    write(
        tmp_path,
        ptb_train_txt_gz=" a cat \n\nthe <unk> sat\n",
        ptb_valid_txt_gz="a\n",
        ptb_test_txt="b\n",
        notes_txt="left out",
    )
    assert read_texts(tmp_path) == {"train": ["a cat", "the [UNK] sat"], "val": ["a"], "test": ["b"]}


def test_multi30k_s_english_files(tmp_path):
    write(tmp_path, train_en="a\n", val_en_gz="b\n", train_de_txt="nein\n", val_de_txt="nein\n")
    with pytest.raises(RecipeError, match=r"must hold test_2016_flickr\.en"):
        read_texts(tmp_path)
    (tmp_path / "test_2016_flickr.en.txt").write_text("c\n")
    (tmp_path / "test_2017_flickr.en.txt").write_text("another\n")
    assert read_texts(tmp_path) == {"train": ["a"], "val": ["b"], "test": ["c"]}


@given(st.lists(st.text("ab ", min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=60))
def test_files_without_parts_are_cut_in_order(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("text")
    write(folder, b_txt="\n".join(lines), a_txt="x\n" * 20)
    parts = read_texts(folder)
    lines = [line.strip() for line in lines]
    mine = {part: [line for line in found if line != "x"] for part, found in parts.items()}
    assert mine["train"] + mine["val"] + mine["test"] == lines
    assert [parts[part].count("x") for part in ("train", "val", "test")] == [18, 1, 1]
    total = sum(map(len, lines))
    assert sum(map(len, mine["train"])) <= 0.9 * total < sum(map(len, mine["train"])) + 9
    assert sum(map(len, mine["train"] + mine["val"])) <= 0.95 * total


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"must hold text, as \*\.txt or \*\.txt\.gz; there is none"):
        read_texts(tmp_path)
    write(tmp_path, train_txt="a b\n" * 50, test_txt="a b\n" * 50)
    with pytest.raises(RecipeError, match=r"a file for each of train, val and test, or for none; .* for val"):
        read_texts(tmp_path)
    write(tmp_path, dev_txt="a\n")
    with pytest.raises(RecipeError, match="the val part must have text for one block of 10 pieces, got 1 li"):
        TextData(tmp_path, length=10).setup("fit")
    (tmp_path / "dev.txt").write_text("")
    with pytest.raises(RecipeError, match="the val part must have text for one block of 10 pieces, got 0 li"):
        TextData(tmp_path, length=10).setup("fit")
    (tmp_path / "dev.txt").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match=r"dev\.txt must be UTF-8 text"):
        read_texts(tmp_path)


def test_special_tokens_have_the_ids_of_the_constants():
    pieces = learn_word_pieces(["a bad [UNK] dab"], 20)
    ids = [pieces.token_to_id(token) for token in SPECIAL]
    assert ids == [PADDING, UNKNOWN, CLS, SEP, MASK] == [0, 1, 2, 3, 4]
    assert pieces.encode("A [MASK] bad, z").ids[1] == MASK
    assert pieces.encode("a z").ids[-1] == UNKNOWN
    assert pieces.encode("[UNK]").ids == [UNKNOWN]
    assert not any("[" in piece or "unk" in piece for piece in set(pieces.get_vocab()) - set(SPECIAL))


@given(st.lists(st.text("abc", min_size=1, max_size=20), min_size=1, max_size=9))
def test_word_pieces_give_the_words_back(words):
    pieces = learn_word_pieces(["a b c abcabc", *words], 40)
    text = " ".join(words)
    assert pieces.decode(pieces.encode(text.upper()).ids) == text
    assert pieces.get_vocab_size() <= 40


def test_a_vocabulary_is_the_same_in_every_process():
    code = (
        "from lamina.recipes.market_words import sentences; from lamina.recipes.text_data import *;"
        "print(learn_word_pieces(sentences()['val'], 90).to_str())"
    )
    learned = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(learned) == 1


def test_a_vocabulary_holds_the_characters_at_least(tmp_path):
    write(tmp_path, train_txt="abc\n" * 50, val_txt="a\n" * 50, test_txt="a\n" * 50)
    with pytest.raises(RecipeError, match="vocab_size must be at least 10, the single characters alone"):
        TextData(tmp_path, length=10, vocab_size=7).setup("fit")


def test_the_vocabulary_is_of_the_training_part(tmp_path):
    write(tmp_path, train_txt="a b\n" * 50, val_txt="a b\n" * 50, test_txt="a q\n" * 50)
    data = TextData(tmp_path, length=10, vocab_size=20)
    data.setup("test")
    assert UNKNOWN in data.parts["test"]
    data.save(tmp_path)
    assert (tmp_path / "tokenizer.json").stat().st_size > 0


@given(length=st.integers(3, 9), number=st.integers(1, 30))
def test_the_last_block_is_padded(length, number):
    pieces = learn_word_pieces(["a"], 10)
    blocks = as_blocks(pieces, ["a"] * number, length)
    assert blocks.shape == (-(-2 * number // (length - 1)), length)
    assert int((blocks == SEP).sum()) == number
    assert int((blocks[:-1] == PADDING).sum()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 2}, "length must be at least 3, got 2"),
        ({"vocab_size": 5}, "vocab_size must be at least 6, got 5"),
        ({"batches": -1}, "batches must not be negative, got -1"),
        ({"mask_rate": 0.0}, "mask_rate must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TextSettings(epochs=1, learning_rate=0.1, **options)
