"""The repository as files: its root, the package's folders, their modules, the code blocks of its pages."""

import ast
import doctest
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "layers", "blocks", "models", "recipes", "viz")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def of_the_site(name: str) -> ModuleType:
    """A module of `docs`, such as `_pages`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package, by dotted name. A package's name stands for its `__init__`."""
    files = [*root.glob("*.py"), *(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))]
    return {
        ".".join(("lamina", *file.relative_to(root).with_suffix("").parts)): file for file in sorted(files)
    }


def imports(name: str, source: str) -> Iterator[str]:
    """What the module called `name` imports, as absolute dotted names, anywhere in it.

    `from a import b` gives `a.b`: whether b is a module is not known from the text. A relative import of the
    package gives `lamina…`, an absolute one `absolute lamina…`.
    """
    package = name.split(".")[:-1]  # of `lamina.layers.__init__` too
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (_absolute(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (_absolute(f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + ([node.module] if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from _dynamic(node, package)


def _absolute(name: str) -> str:
    return f"absolute {name}" if name.split(".")[0] == "lamina" else name


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _dynamic(node: ast.Call, package: list[str]) -> Iterator[str]:
    """`import_module(".x", __package__)` with the name written out; an f-string gives its written part."""
    for argument in node.args[:1]:
        parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
        first = parts[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            dots = len(first.value) - len(first.value.lstrip("."))
            below = first.value[dots:].rstrip(".")
            base = package[: len(package) - dots + 1] if dots else []
            yield ".".join([*base, below]) if dots else _absolute(below)


@dataclass(frozen=True)
class Block:
    """A block of Python in a page, and the line it starts on."""

    page: Path
    line: int
    code: str
    skip: str | None

    def run(self, namespace: dict[str, Any]) -> None:
        """Runs it as written; a block of `>>>` lines must print what it says it prints."""
        where = f"{self.page.name}:{self.line}"
        if self.code.lstrip().startswith(">>>"):
            check_examples(
                doctest.DocTestParser().get_doctest(self.code, namespace, where, str(self.page), self.line)
            )
            return
        padding = "\n" * self.line  # so that a traceback names the page's line
        exec(compile(padding + self.code, str(self.page), "exec"), namespace)


_FENCE = re.compile(r"^```(?:python|pycon)\b[^\n]*\n(?P<code>.*?)^```[ \t]*$", re.M | re.S)


def blocks(page: Path) -> list[Block]:
    """The page's ```python blocks. `<!-- skip: reason -->` on the line before keeps one from being run."""
    text = "\n" + page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].splitlines()[-1]
        skip = re.search(r"<!-- skip: (.+?) -->", before)
        line = text[: match.start("code")].count("\n") - 1
        found.append(Block(page, line, match["code"], skip[1] if skip else None))
    return found


def check_examples(test: doctest.DocTest) -> None:
    """Runs a doctest; what it printed instead of what it says is the failure's text."""
    said: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed = doctest.DocTestRunner(optionflags=flags).run(test, out=said.append, clear_globs=False).failed
    assert not failed, "".join(said)
