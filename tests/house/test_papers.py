"""A paper is a file in each folder. What the papers lack stands in one list, which only gets shorter."""

import ast
import json
import re

import pytest
from house.tree import ROOT, blocks, of_the_site
from lamina.recipes import get_recipe, list_recipes
from lamina.recipes.discovery import recipe_modules

SITE = of_the_site("_pages")
HEADINGS = [
    "The idea",
    "Equations and code",
    "What was hard",
    "How ours differs",
    "Results",
    "Use it",
    "References",
]
# By the file in `models`. A new paper does not come onto this list; what is done goes off it.
LACKS = {
    "linformer": {
        "a result of linformer_speed_gpu",
    },
    "recurrent_classifier": {
        "docs/papers/recurrent_classifier.md",
        "docs/notebooks/recurrent_classifier.ipynb",
    },
    "reformer": {
        "a result of reformer_duplication_gpu",
        "a result of reformer_memory_gpu",
    },
    "transformer": {"a result of transformer_translation_gpu"},
    "vit": {"docs/papers/vit.md", "docs/notebooks/vit.ipynb"},
}


def presets() -> dict[str, set[str]]:
    """Paper -> the names of all presets that its file registers."""
    found: dict[str, set[str]] = {}
    for family, names in SITE.families().items():
        found.setdefault(family.__module__.rpartition(".")[2], set()).update(names)
    return found


PRESETS = presets()


def lacks(paper: str) -> set[str]:
    """What the pattern of CONTRIBUTING names and the paper does not have."""
    page = ROOT / "docs" / "papers" / f"{paper}.md"
    files = f"tests/models/test_{paper}.py", f"docs/papers/{paper}.md", f"docs/notebooks/{paper}.ipynb"
    missing = {file for file in files if not (ROOT / file).exists()}
    recipes = [name for name in list_recipes() if get_recipe(name).model in PRESETS[paper]]
    if not recipes:
        missing.add("a recipe")
    tests = "".join(file.read_text() for file in (ROOT / "tests" / "recipes").glob("test_*.py"))
    missing |= {f"a test of {name}" for name in recipes if f'"{name}"' not in tests}
    results = [json.loads(file.read_text()) for file in (ROOT / "recipes" / "results").glob("*.json")]
    missing |= {f"a result of {name}" for name in recipes if name not in {r["recipe"] for r in results}}
    if page.exists():
        text = page.read_text()
        headings = re.findall(r"^## (.+)$", text, re.M)
        missing |= {f"the heading {heading!r}" for heading in HEADINGS if heading not in headings}
        use = text[: text.find("\n## Use it\n")].count("\n")
        if not any(block.line > use and block.skip is None for block in blocks(page)):
            missing.add("code that runs under 'Use it'")
    return missing


@pytest.mark.parametrize("paper", PRESETS)
def test_a_paper_has_all_that_the_pattern_names(paper):
    listed = LACKS.get(paper, set())
    assert lacks(paper) - listed == set(), "the paper lacks what CONTRIBUTING names under 'A paper'"
    assert listed - lacks(paper) == set(), "this is done: take it off the list"


def test_the_list_of_what_is_lacking_names_papers():
    assert LACKS.keys() <= PRESETS.keys()


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "papers").glob("*.md")), ids=lambda page: page.stem)
def test_the_headings_of_a_page_stand_in_their_order(page):
    headings = re.findall(r"^## (.+)$", page.read_text(), re.M)
    assert [heading for heading in headings if heading in HEADINGS] == HEADINGS


def test_each_paper_with_a_model_has_one_row_in_readme():
    rows = re.findall(r"^\| \d{4} \|.+\|(.*)\|.+\|$", (ROOT / "README.md").read_text(), re.M)
    assert sorted(name for row in rows for name in SITE.paper_names(row)) == sorted(PRESETS)


def test_the_index_links_each_page_and_notebook():
    index = SITE.filled((ROOT / "docs" / "papers.md").read_text())
    for kind, ending in ("papers", "md"), ("notebooks", "ipynb"):
        names = [file.stem for file in SITE.in_order(f"{kind}/*.{ending}")]
        assert all(f"({kind}/{name}.md)" in index for name in names)


def test_a_page_is_found_by_its_file_and_stands_in_readme_s_order(tmp_path):
    (tmp_path / "papers").mkdir()
    for name in "made_up", "vit", "bert", "transformer":
        (tmp_path / "papers" / f"{name}.md").write_text(f"# The {name}\n\nText.\n")
    found = SITE.in_order("papers/*.md", tmp_path)
    assert [SITE.title(file) for file in found] == ["The transformer", "The bert", "The vit", "The made_up"]


def test_a_recipe_is_found_by_its_file(tmp_path):
    (tmp_path / "made_up.py").write_text("from .recipe import register\n\nMADE_UP = register(\n    1\n)\n")
    (tmp_path / "bare.py").write_text("register(1)\n")
    (tmp_path / "helper.py").write_text("def register(recipe):\n    return register(recipe)\n")
    assert recipe_modules(tmp_path) == ["bare", "made_up"]


def test_every_file_that_registers_a_recipe_is_found():
    def registers(source: str) -> bool:
        calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        return any(getattr(call.func, "id", getattr(call.func, "attr", "")) == "register" for call in calls)

    files = (ROOT / "recipes").glob("*.py")
    assert recipe_modules() == sorted(file.stem for file in files if registers(file.read_text()))
