"""Notebooks are committed clean, and a cell that fails is an error; `make docs` runs them all."""

import ast
import json

import pytest
from house.tree import ROOT, of_the_site
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
HEAD = {"cell_type": "markdown", "id": "head", "metadata": {}, "source": ["# A notebook\n", "\n", "Text."]}


def written(folder, *cells: str):
    """A notebook file of a heading and these cells of code."""
    code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    made = [HEAD, *({**code, "id": f"cell-{n}", "source": [cell]} for n, cell in enumerate(cells))]
    path = folder / "made_up.ipynb"
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_clean(file):
    book = json.loads(file.read_text())
    assert book["metadata"].keys() == {"kernelspec", "language_info"}
    assert book["cells"][0]["cell_type"] == "markdown"
    assert book["cells"][0]["source"][0].startswith("# ")
    for cell in book["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            ast.parse("".join(line for line in cell["source"] if not line.startswith("%")))


def test_a_notebook_becomes_a_page(tmp_path):
    path = written(
        tmp_path,
        "%matplotlib inline\nimport torch\nfrom lamina.viz import plot_attention",
        "print('one')\nprint('two')",
        "plot_attention(torch.eye(3))",
        "open('left behind', 'w').close()\n3 + 4",
    )
    [page] = of_the_site("_notebooks").run_all([path])
    assert page.markdown == (
        "# A notebook\n\n"
        "This page is a notebook, [made_up.ipynb](made_up.ipynb), run when the site was built.\n\n"
        "Text.\n\n"
        "```python\nimport torch\nfrom lamina.viz import plot_attention\n```\n\n"
        "```python\nprint('one')\nprint('two')\n```\n\n"
        "```text\none\ntwo\n```\n\n"
        "```python\nplot_attention(torch.eye(3))\n```\n\n"
        "![](made_up-1.png)\n\n"
        "```python\nopen('left behind', 'w').close()\n3 + 4\n```\n\n"
        "```text\n7\n```\n"
    )
    assert page.pictures["made_up-1.png"].startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["made_up.ipynb"]


def test_a_cell_that_fails_is_an_error(tmp_path):
    path = written(tmp_path, "1 + 1", "assert 1 + 1 == 3")
    with pytest.raises(CellExecutionError, match=r"assert 1 \+ 1 == 3"):
        of_the_site("_notebooks").run_all([path])
