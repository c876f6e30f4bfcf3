"""A killed run ends with the same bits, a damaged checkpoint is refused, nothing is written by halves."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lamina.recipes import RecipeError, get_recipe
from lamina.recipes import recipe as recipes
from lamina.recipes.files import only_one_process, read_json, write_bytes
from lamina.recipes.resume import derive_seed, load_checkpoint

# Everything that draws is on: the order, shifts, dropout.
SETTINGS = ["epochs=9", "batch_size=128", "model.hidden_dim=7", "model.dropout=0.3"]
WORDS = ["reproduce", "lstm_digits", "--accelerator", "cpu", "--seed", "5"]
WORDS += [word for setting in SETTINGS for word in ("--set", setting)] + ["--out"]


def only_run(out: Path) -> Path:
    (result,) = out.glob("*/*/result.json")
    return result.parent


def rows(run: Path) -> list[str]:
    path = run / "seed-5" / "metrics.csv"
    return path.read_text().splitlines() if path.exists() else []


def test_killed_and_resumed_equals_uninterrupted(lamina, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "lamina", *WORDS, str(killed)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not (list(killed.glob("*/*/result.json")) and len(rows(only_run(killed))) > 2):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(rows(only_run(killed))) < 10
    assert read_json(only_run(killed) / "result.json")["complete"] is False

    answer = lamina(*WORDS, killed)
    assert "continues the unfinished run" in answer.out
    lamina(*WORDS, whole)

    a, b = only_run(killed), only_run(whole)
    assert rows(a) == rows(b)
    assert len(rows(a)) == 10
    ours, theirs = (load_checkpoint(run / "seed-5" / "last.ckpt") for run in (a, b))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name
    results = [json.loads((run / "seed-5" / "result.json").read_text()) for run in (a, b)]
    for key in ("value", "metrics", "history", "evidence"):
        assert results[0][key] == results[1][key]
    assert (a / "model" / "model.safetensors").read_bytes() == (
        b / "model" / "model.safetensors"
    ).read_bytes()


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "text":
        content = bytearray(b"not a checkpoint")
    elif how == "bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def unfinished(lamina, tmp_path) -> tuple[list[str], Path]:
    """A command that was stopped after its first epoch, and the folder of its run."""
    words = [*WORDS, str(tmp_path / "report")]
    assert lamina(*words, "--max-minutes", "0").status == 3
    return words, only_run(tmp_path / "report")


@pytest.mark.parametrize("how", ["cut", "empty", "text", "bit"])
def test_a_damaged_checkpoint_is_refused_and_kept(lamina, unfinished, contents, how):
    words, run = unfinished
    damage(run / "seed-5" / "last.ckpt", how)
    before = contents(run / "seed-5")
    answer = lamina(*words)
    assert answer.status == 1
    assert "damaged checkpoint" in answer.line
    assert "--restart begins a new run" in answer.line
    assert contents(run / "seed-5") == before


def test_a_checkpoint_of_another_model_is_refused(lamina, unfinished):
    words, run = unfinished
    path = run / "seed-5" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, path)
    assert "of another version of the model" in lamina(*words).line


def test_a_file_that_is_no_training_state_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(RecipeError, match="no training state"):
        load_checkpoint(tmp_path / "last.ckpt")


def test_each_sitting_gets_further_and_restart_begins_beside(lamina, unfinished, contents):
    words, run = unfinished
    assert len(rows(run)) == 2
    assert lamina(*words, "--max-minutes", "0").status == 3
    assert len(rows(run)) == 3
    before = contents(run)
    answer = lamina(*words, "--max-minutes", "0", "--restart")
    assert "continues" not in answer.out
    assert contents(run) == before
    assert len(list(run.parent.iterdir())) == 2


def test_a_command_of_several_recipes_goes_on_with_the_one_it_was_at(lamina, tmp_path, monkeypatch):
    recipe = get_recipe("lstm_digits")
    stop = [True]

    def data(settings, folder):
        if stop:
            raise KeyboardInterrupt
        return recipe.data(settings, folder)

    monkeypatch.setitem(recipes._recipes, "second", replace(recipe, name="second", data=data))
    monkeypatch.setitem(recipes._recipes, "third", replace(recipe, name="third"))
    words = [
        "reproduce",
        "lstm_digits",
        "second",
        "third",
        *WORDS[2:-1],
        "--set",
        "epochs=1",
        "--out",
        tmp_path,
    ]
    assert lamina(*words).status == 130
    stop.clear()
    answer = lamina(*words)
    assert "lstm_digits: done in" in answer.out
    assert answer.line == "lamina: below the bar: lstm_digits, second, third"
    assert [len(list((tmp_path / name).iterdir())) for name in ("lstm_digits", "second", "third")] == [
        1,
        1,
        1,
    ]
    assert not list(tmp_path.glob(".unfinished*"))
    lamina(*words)  # complete: it begins anew
    assert [len(list((tmp_path / name).iterdir())) for name in ("lstm_digits", "second", "third")] == [
        2,
        2,
        2,
    ]


def test_other_settings_are_another_run(lamina, unfinished, contents):
    words, run = unfinished
    before = contents(run)
    answer = lamina(*words, "--set", "learning_rate=0.1", "--max-minutes", "0")
    assert "continues" not in answer.out
    assert contents(run) == before


def test_two_processes_do_not_share_a_run(lamina, unfinished):
    words, run = unfinished
    with only_one_process(run):
        assert "another process works on" in lamina(*words).line


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_cannot_be_read_is_none(tmp_path):
    assert read_json(tmp_path / "none") is None
    (tmp_path / "half").write_text('{"a": ')
    assert read_json(tmp_path / "half") is None
    (tmp_path / "list").write_text("[1]")
    assert read_json(tmp_path / "list") is None


def test_derived_seeds_differ_by_purpose():
    seeds = {
        derive_seed(s, purpose, e) for s in range(5) for purpose in ("weights", "draws") for e in range(7)
    }
    assert len(seeds) == 70
    assert all(0 <= seed < 2**32 for seed in seeds)
