"""One small finished run for many tests, and the command line as a function."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SMALL = ["lstm_digits", "--set", "epochs=2", "--set", "model.hidden_dim=7", "--accelerator", "cpu"]


@dataclass(frozen=True)
class Answer:
    """What a command gave: its exit status and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr that an error is told by."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("lamina: ")
        return lines[0]


Lamina = Callable[..., Answer]


@pytest.fixture
def lamina(capfd: pytest.CaptureFixture[str]) -> Lamina:
    """Runs `lamina …` in this process."""
    from lamina.__main__ import main

    def run(*words: str | Path) -> Answer:
        capfd.readouterr()
        status = main([str(word) for word in words])
        return Answer(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lamina.__main__ import main

    out = tmp_path_factory.mktemp("finished") / "report"
    assert main(["reproduce", *SMALL, "--seed", "1,2", "--out", str(out)]) == 1  # two epochs miss the bar
    return out


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A report folder of its own with one complete run of two seeds."""
    return Path(shutil.copytree(_finished, tmp_path / "report"))


@pytest.fixture
def short_text(tmp_path: Path) -> Path:
    """A folder with a text of 300 lines, which is read in no time."""
    folder = tmp_path / "text"
    folder.mkdir()
    sentence = "the baker brings two old tools before noon and then returns them to her sister"
    words = sentence.split()
    lines = (" ".join(words[n % k :: k]) for n in range(100) for k in (1, 2, 3))
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file under a folder, but for locks."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read
