"""Every example in a public docstring runs and prints what it says it prints."""

import doctest
import importlib

import pytest
import torch
from house.tree import FOLDERS, check_examples
from torch import nn


def examples(folder: str) -> list[doctest.DocTest]:
    """The docstrings with an example of a folder's public parts and of their methods."""
    package = importlib.import_module(f"lamina.{folder}")
    parts = {name: getattr(package, name) for name in package.__all__}
    found = []
    for name, part in parts.items():
        globs = {"torch": torch, "nn": nn, **parts}
        found += doctest.DocTestFinder().find(part, f"{folder}.{name}", module=False, globs=globs)
    return [test for test in found if test.examples]


EXAMPLES = [test for folder in FOLDERS for test in examples(folder)]


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_example_prints_what_it_says(test, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    check_examples(test)


@pytest.mark.parametrize("folder", ["layers", "blocks", "models"])
def test_every_part_has_an_example(folder):
    with_one = {".".join(test.name.split(".")[:2]) for test in EXAMPLES}
    names = importlib.import_module(f"lamina.{folder}").__all__
    assert [name for name in names if f"{folder}.{name}" not in with_one] == []
