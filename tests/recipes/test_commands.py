"""The command line: what it prints, its status, and that a mistake is one line and destroys nothing."""

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lamina.recipes import get_recipe
from lamina.recipes import recipe as recipes

SMALL = [
    "lstm_digits",
    "--set",
    "epochs=2",
    "--set",
    "model.hidden_dim=7",
    "--accelerator",
    "cpu",
]  # of `finished`


def test_list(lamina):
    answer = lamina("list")
    assert answer.status == 0
    for text in ("vit_digits", "lstm_digits", "test accuracy", "≥ 97.00 %", "≥ 96.00 %"):
        assert text in answer.out
    assert "vit_base" not in answer.out


def test_list_with_models(lamina):
    from lamina.models import create_model

    answer = lamina("list", "--models")
    parameters = sum(p.numel() for p in create_model("lstm_digits").parameters())
    assert ["lstm_digits", f"{parameters:,}"] in [line.split() for line in answer.out.splitlines()]


def test_help_without_a_command(lamina):
    answer = lamina()
    assert "reproduce" in answer.out + answer.err


def test_help_and_list_are_light():
    code = (
        "import sys; from lamina.__main__ import main; "
        "assert main(['--help']) == 0 and main(['list']) == 0 and main(['reproduce', '--help']) == 0; "
        "heavy = {'torch', 'lightning', 'matplotlib', 'sklearn', 'jinja2'} & sys.modules.keys(); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_finished_run_is_kept_and_the_next_stands_beside_it(lamina, finished, contents):
    before = contents(finished / "lstm_digits")
    answer = lamina("reproduce", *SMALL, "--seed", "1,2", "--out", finished)
    assert answer.status == 1  # two epochs do not reach the bar, and that is said
    assert answer.line == "lamina: below the bar: lstm_digits"
    assert "missed" in answer.out
    after = contents(finished / "lstm_digits")
    assert before.items() <= after.items()
    assert len({Path(name).parts[0] for name in after}) == 2


def test_a_bar_that_is_reached_is_status_0(lamina, tmp_path, monkeypatch):
    recipe = get_recipe("lstm_digits")
    easy = replace(recipe, metric=replace(recipe.metric, bar=0.0), seeds=(3,))
    monkeypatch.setitem(recipes._recipes, "lstm_digits", easy)
    answer = lamina("reproduce", *SMALL, "--out", tmp_path)
    assert (answer.status, answer.err) == (0, "")
    assert "bar ≥ 0.00 %: reached" in answer.out


def test_seeds_are_run_in_order_once(lamina, tmp_path):
    words = ["reproduce", *SMALL, "--set", "epochs=1", "--out", tmp_path]
    answer = lamina(*words, "--seed", "5,4", "--seed", "5")
    lines = [line.split() for line in answer.out.splitlines()]
    assert [words[1] for words in lines if words[0] == "seed" and words[2] == "test"] == ["5:", "4:"]


MISTAKES = {
    "no such command": (["reproduse"], "No such command 'reproduse'"),
    "no such option": (["reproduce", "vit_digits", "--fast"], "No such option: --fast"),
    "no recipe named": (["reproduce"], "Missing argument"),
    "unknown recipe": (["reproduce", "vit_digitz"], "no recipe 'vit_digitz'; did you mean vit_digits"),
    "unknown setting": ([*SMALL, "--set", "epoch=2"], "no setting 'epoch'; did you mean epochs?"),
    "wrong value": ([*SMALL, "--set", "epochs=two"], "'epochs' must be of type int, got 'two'"),
    "out of range": ([*SMALL, "--set", "epochs=0"], "epochs must be at least 1"),
    "not a pair": ([*SMALL, "--set", "epochs"], "--set takes key=value"),
    "unknown model setting": ([*SMALL, "--set", "model.hidden=3"], "has no setting 'hidden'"),
    "wrong model value": ([*SMALL, "--set", "model.hidden_dim=big"], "--set model"),
    "wrong seed": ([*SMALL, "--seed", "one"], "--seed takes whole numbers such as 1,2,3, got 'one'"),
    "negative seed": ([*SMALL, "--seed=-1"], "--seed takes numbers from 0"),
    "wrong minutes": ([*SMALL, "--max-minutes", "soon"], "--max-minutes"),
    "no such accelerator": ([*SMALL, "--accelerator", "abacus"], "--accelerator abacus"),
    "absent accelerator": ([*SMALL, "--accelerator", "tpu"], "--accelerator tpu"),
    "no such precision": ([*SMALL, "--precision", "7"], "--precision 7"),
    "data for a recipe without": ([*SMALL, "--data", "."], "lstm_digits takes no --data"),
}


@pytest.mark.parametrize("words_and_message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_destroys_nothing(lamina, finished, contents, words_and_message):
    words, message = words_and_message
    before = contents(finished)
    words = ["reproduce", *words] if words[: len(SMALL)] == SMALL else words
    answer = lamina(*words, *(["--out", finished] if "reproduce" in words else []))
    assert answer.status in (1, 2)
    assert message in answer.line
    assert contents(finished) == before


def test_a_missing_data_folder(lamina, finished, contents, monkeypatch):
    recipe = replace(get_recipe("lstm_digits"), data_format="a folder of images")
    monkeypatch.setitem(recipes._recipes, "lstm_digits", recipe)
    before = contents(finished)
    answer = lamina("reproduce", *SMALL, "--data", finished / "none", "--out", finished)
    assert answer.status == 1
    assert f"no data folder {finished / 'none'}; lstm_digits wants a folder of images" in answer.line
    assert contents(finished) == before


def test_data_reaches_the_recipe_and_is_part_of_the_run(lamina, tmp_path, monkeypatch):
    recipe = get_recipe("lstm_digits")
    seen = []

    def data(settings, folder):
        seen.append(folder)
        return recipe.data(settings, None)

    monkeypatch.setitem(recipes._recipes, "lstm_digits", replace(recipe, data=data, data_format="files"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.txt").write_text("1")
    words = [
        "reproduce",
        *SMALL,
        "--seed",
        "1",
        "--max-minutes",
        "0",
        "--out",
        tmp_path / "out",
        "--data",
        folder,
    ]
    assert lamina(*words).status == 3
    assert set(seen) == {folder}
    assert "continues" in lamina(*words, "--max-minutes", "0").out
    (folder / "a.txt").write_text("22")
    assert "continues" not in lamina(*words).out


def test_the_folder_cannot_be_written(lamina, tmp_path):
    (tmp_path / "file").write_text("mine")
    answer = lamina("reproduce", *SMALL, "--out", tmp_path / "file" / "report")
    assert answer.status == 1
    assert "Not a directory" in answer.line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_the_folder_is_read_only(lamina, tmp_path):
    tmp_path.chmod(0o500)
    answer = lamina("reproduce", *SMALL, "--out", tmp_path / "report")
    assert "Permission denied" in answer.line


def full_after(monkeypatch, writes: int) -> None:
    """The disk is full after so many more files."""
    left = iter(range(writes))
    fsync = os.fsync

    def limited(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", limited)


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 4, 5, 6, 7, 8])
def test_a_full_disk(lamina, finished, contents, monkeypatch, writes):
    """Before anything is written, in the first epoch, at the result, at a picture, at the report."""
    before = contents(finished)
    words = ["reproduce", *SMALL, "--set", "epochs=1", "--seed", "1", "--out", finished]
    with monkeypatch.context() as patch:
        full_after(patch, writes)
        answer = lamina(*words)
    assert answer.status == 1
    assert "No space left on device" in answer.line
    assert before.items() <= contents(finished).items()
    assert not list(finished.rglob("*.tmp"))
    again = lamina(*words)  # with room, the same command goes on
    assert again.line == "lamina: below the bar: lstm_digits"


def test_a_disk_that_is_full_for_the_model(tmp_path):
    """The operating system's own error: no file may grow beyond a size that the checkpoint exceeds."""
    limit = 3000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "lamina", "reproduce", *SMALL, "--seed", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert done.returncode == 1
    assert done.stderr.startswith("lamina: File too large")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_ctrl_c_says_how_to_go_on(lamina, tmp_path, monkeypatch):
    from lamina.recipes.training import Classification

    step = Classification.training_step

    def interrupted(self, batch, batch_idx):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    words = ["reproduce", *SMALL, "--seed", "1", "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "training_step", interrupted)
        answer = lamina(*words)
    assert answer.status == 130
    assert answer.line == "lamina: stopped; the same command continues after the last whole epoch"
    assert "continues the unfinished run" in lamina(*words).out


@pytest.mark.parametrize("package", ["typer", "lightning"])
def test_a_missing_package_names_the_extra(package, tmp_path):
    """In a fresh process, where nothing of it is imported yet."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"  # the import system then says that there is none
        "from lamina.__main__ import main\n"
        f"sys.exit(main({['reproduce', *SMALL, '--out', str(tmp_path)]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f'lamina: this command needs {package}: pip install "lamina[recipes]"\n'


@pytest.mark.parametrize("module", ["sklearn.datasets", "jinja2", "matplotlib.figure"])
def test_a_package_that_is_missing_later_names_the_extra(lamina, finished, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    answer = lamina("reproduce", *SMALL, "--set", "epochs=1", "--seed", "1", "--out", finished)
    assert answer.status == 1
    assert 'pip install "lamina[recipes]"' in answer.line


def test_a_missing_package_of_the_users_own_is_not_hidden(lamina, tmp_path, monkeypatch):
    def data(settings, folder):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    monkeypatch.setitem(recipes._recipes, "lstm_digits", replace(get_recipe("lstm_digits"), data=data))
    with pytest.raises(ModuleNotFoundError, match="mine"):
        lamina("reproduce", *SMALL, "--out", tmp_path)


def test_show_and_info_are_there(lamina):
    assert "vit_digits" in lamina("show", "vit_digits").out
    assert "torch" in lamina("info").out
