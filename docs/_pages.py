"""What the site says of the code, read from the code: a new paper is a page, and no edit of other pages.

A line `<!-- fill: NAME ARGUMENT -->` of a page stands for what the function NAME of `FILLS` gives. The
functions here need no mkdocs, so that tests use them too.
"""

import ast
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_MARKER = re.compile(r"^<!-- fill: (?P<name>\w+)(?: (?P<argument>\S+))? -->$", re.M)
_ROW = re.compile(r"^\| (?P<year>\d{4}) \| (?P<paper>.+?) \| *(?P<here>.*?) *\| (?P<status>.+?) \|$", re.M)


def filled(page: str) -> str:
    """The page with all its markers filled.

    Raises:
        ValueError: nothing is known by a marker's name, or there is nothing to fill it with.
    """

    def fill(found: re.Match[str]) -> str:
        if found["name"] not in FILLS:
            raise ValueError(f"a page is filled by one of {', '.join(FILLS)}, got {found['name']!r}")
        return FILLS[found["name"]](page, found["argument"])

    return _MARKER.sub(fill, page)


def papers(page: str = "", argument: str | None = None) -> str:
    """README's table of the papers; those that have a page link it, and their notebook."""
    table = (ROOT / "README.md").read_text().partition("[start:papers] -->")[2]

    def linked(row: re.Match[str]) -> str:
        paper, here = row["paper"], row["here"]
        for name in paper_names(here):
            if (ROOT / "docs" / "papers" / f"{name}.md").exists():
                paper = f"[{paper}](papers/{name}.md)"
            if (ROOT / "docs" / "notebooks" / f"{name}.ipynb").exists():
                here += f"; [notebook](notebooks/{name}.md)"
        return f"| {row['year']} | {paper} | {here} | {row['status']} |"

    return _ROW.sub(linked, table.partition("<!-- --8<-- [end:papers]")[0])


def paper_names(here: str) -> list[str]:
    """Which papers' models stand in a cell of that table, by the names of their files in `models`."""
    models = importlib.import_module("lamina.models")
    parts = (getattr(models, name, None) for name in re.findall(r"`(\w+)`", here))
    return list(dict.fromkeys(part.__module__.rpartition(".")[2] for part in parts if part is not None))


def in_order(pattern: str, docs: Path = ROOT / "docs") -> list[Path]:
    """The files of `docs` that match, in the order in which README names their papers; others behind them."""
    rows = _ROW.finditer((ROOT / "README.md").read_text())
    order = [name for row in rows for name in paper_names(row["here"])]
    place = {name: n for n, name in reversed(list(enumerate(order)))}
    return sorted(docs.glob(pattern), key=lambda file: (place.get(file.stem, len(order)), file.stem))


def title(file: Path) -> str:
    """The first heading of a page, or of a notebook."""
    text = file.read_text()
    if file.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    return re.search(r"^# (.+)$", text, re.M)[1]  # type: ignore[index]


def exports(page: str, argument: str | None) -> str:
    """An API entry for each public name of a package that the page does not name."""
    names = importlib.import_module(str(argument)).__all__
    return "\n\n".join(f"::: {argument}.{name}" for name in names if f"::: {argument}.{name}\n" not in page)


def presets(page: str, argument: str | None) -> str:
    """The presets with their parameters: of one paper, or one line a family without an argument."""
    from lamina.models import create_model

    if argument is not None:
        rows = [
            f"| `{name}` | {create_model(name, device='meta').num_parameters():,} |"
            for family, names in families().items()
            for name in names
            if family.__module__.endswith(f".{argument}")
        ]
        if not rows:
            raise ValueError(f"there is no preset of models/{argument}.py")
        return "\n".join(["| preset | parameters |", "|---|---:|", *rows])
    rows = []
    for family, names in families().items():
        paper = family.__module__.rpartition(".")[2]
        page_of = ROOT / "docs" / "papers" / f"{paper}.md"
        link = f"[{title(page_of)}](papers/{paper}.md)" if page_of.exists() else ""
        shown = ", ".join(f"`{name}`" for name in names[:4])
        shown += f" … {len(names)} in all" if names[4:] else ""
        rows.append(f"| `{family.__name__}` | {shown} | {link} |")
    return "\n".join(["| family | presets | page |", "|---|---|---|", *rows])


def published(page: str, argument: str | None) -> str:
    """A line for each format of published weights: what its module says of itself."""
    folder = importlib.import_module("lamina.models.checkpoints")
    modules = [importlib.import_module(f"{folder.__name__}.{m.name}") for m in iter_modules(folder.__path__)]
    return "\n".join(f"- {inspect.getdoc(m)}".partition("\n")[0] for m in modules if hasattr(m, "load_state"))


@cache
def families() -> dict[type, list[str]]:
    """Every class of model that has presets, and their names."""
    from lamina.models import create_model, list_models

    found: dict[type, list[str]] = {}
    for name in list_models():
        found.setdefault(type(create_model(name, device="meta")), []).append(name)
    return found


def results(page: str, argument: str | None) -> str:
    """The rows of the recipes that match, and what was compared, as the page of replications has them."""
    from lamina.recipes import get_recipe, list_recipes

    top, *sections = (ROOT / "docs" / "replications.md").read_text().split("\n## ")
    head = re.findall(r"^\|(?: Recipe |-).*$", top, re.M)
    names = list_recipes(str(argument))
    rows = [row for name in names for row in re.findall(rf"^\| `{name}` \|.*$", top, re.M)]
    if not rows:
        raise ValueError(f"no recipe {argument} stands in replications.md: lamina report --docs writes it")
    parts = ["\n".join([*head, *rows])]
    for section in sections:
        title, _, text = section.partition("\n")
        if title in {get_recipe(name).title for name in names}:
            tables = re.findall(r"(?:^\|.*\n?)+", text, re.M)
            parts += [f"{title}:", *(table.strip() for table in tables)] if tables else []
    return "\n\n".join(parts)


def source(page: str, argument: str | None) -> str:
    """The code of a function, a method or a class, as it stands, without its docstring."""
    part = inspect.unwrap(_find(str(argument)))
    lines = textwrap.dedent(inspect.getsource(part)).rstrip().splitlines()
    [tree] = ast.parse("\n".join(lines)).body
    first = tree.body[0]  # type: ignore[attr-defined]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del lines[first.lineno - 1 : first.end_lineno]
    file = Path(str(inspect.getsourcefile(part))).resolve().relative_to(ROOT)
    return "\n".join([f'```python title="{file}"', *lines, "```"])


def _find(name: str) -> Any:
    """A module, or something in one, by its dotted name."""
    above, _, last = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(_find(above), last)


FILLS: dict[str, Callable[[str, str | None], str]] = {
    "papers": papers,
    "presets": presets,
    "published": published,
    "exports": exports,
    "results": results,
    "source": source,
}
