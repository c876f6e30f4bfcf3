"""The built wheel, made once."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from house.tree import ROOT

NOT_SOURCES = {"build", "dist", "site", "report", "lightning_logs"}


def _not_sources(folder: str, names: list[str]) -> set[str]:
    hidden = {name for name in names if name.startswith(".") or name.endswith((".egg-info", "__pycache__"))}
    return hidden | (NOT_SOURCES & set(names) if Path(folder) == ROOT else set())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing of the build is left in the tree."""
    here = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, here / "source", ignore=_not_sources)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", here, here / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = here.glob("*.whl")
    return built
