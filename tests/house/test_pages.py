"""The code in README and in the site's pages runs, and the pages name every public part."""

import importlib
import re

import pytest
from house.tree import FOLDERS, ROOT, blocks, of_the_site

SITE = of_the_site("_pages")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace = {"__name__": "__main__"}  # one for the page: a block goes on where the last one ended
    for block in blocks(page):
        if block.skip is None:
            block.run(namespace)


def test_a_block_is_found_where_it_stands_and_fails_there(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# T\n\n```python\na = 1\nassert a == 2\n```\n\n<!-- skip: shown only -->\n```python\nno code\n```\n"
    )
    first, second = blocks(page)
    assert (first.skip, second.skip) == (None, "shown only")
    with pytest.raises(AssertionError) as failure:
        first.run({})
    assert failure.traceback[-1].lineno + 1 == 5


def test_a_printed_value_that_is_wrong_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(AssertionError, match="Expected:\n    3\nGot:\n    2"):
        blocks(page)[0].run({})


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_api_page_names_every_public_part_and_no_other(folder):
    page = SITE.filled((ROOT / "docs" / "api" / f"{folder}.md").read_text())
    named = re.findall(rf"^::: lamina\.{folder}\.(\w+)$", page, re.M)
    assert sorted(named) == sorted(importlib.import_module(f"lamina.{folder}").__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_what_a_page_is_filled_with_is_there(page):
    assert not re.search("^<!-- fill: ", SITE.filled(page.read_text()), re.M)


def test_a_page_that_cannot_be_filled_says_so():
    with pytest.raises(ValueError, match=r"filled by one of papers, .*, got 'paper'"):
        SITE.filled("# T\n\n<!-- fill: paper -->\n")
    with pytest.raises(ValueError, match=r"no preset of models/nobody\.py"):
        SITE.filled("<!-- fill: presets nobody -->\n")
    with pytest.raises(ValueError, match=r"no recipe nothing_\* stands in replications\.md"):
        SITE.filled("<!-- fill: results nothing_* -->\n")


def test_code_stands_in_a_page_as_it_is_written():
    shown = SITE.filled("<!-- fill: source lamina.recipes.schedules.noam_peak -->")
    assert shown == (
        '```python title="recipes/schedules.py"\n'
        "def noam_peak(dim: int, warmup: int) -> float:\n"
        "    return float((dim * warmup) ** -0.5)\n```"
    )


def test_an_api_page_names_first_what_it_groups():
    page = "::: lamina.models.ViT\n\n<!-- fill: exports lamina.models -->\n"
    assert SITE.filled(page).count("::: lamina.models.ViT\n") == 1
    assert "::: lamina.models.ViTConfig\n" in SITE.filled(page)


def test_readme_shows_the_three_uses():
    code = [block.code for block in blocks(ROOT / "README.md") if block.skip is None]
    assert any(re.search(r"^from lamina\.layers import", block, re.M) for block in code)
    assert any(re.search(r"\battention=", block) for block in code)
    assert "pytest benchmarks" in (ROOT / "README.md").read_text()


def test_the_paper_table_tells_the_truth():
    def names(*folders: str) -> set[str]:
        return {name for folder in folders for name in importlib.import_module(f"lamina.{folder}").__all__}

    rows = re.findall(r"^\| \d{4} \|(.+)\|(.*)\| *([\w ]+?) *\|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 36
    for paper, here, status in rows:
        parts = set(re.findall(r"`(\w+)`", here))
        assert parts <= names("layers", "blocks", "models"), paper
        models = parts & names("models")
        expected = "there" if models else "parts" if parts else "not yet"
        assert status == expected, paper
