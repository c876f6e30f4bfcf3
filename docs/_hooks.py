"""What mkdocs does beside: pages found by their files, notebooks that are run, markers filled, and formulas.

Formulas become MathML when the site is built: the pages need no script and no network for them.
"""

import html
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


def _beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages, notebooks = _beside("_pages"), _beside("_notebooks")

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\[\[(](?P<tex>.*?)\\[\])]\s*</(?P=tag)>', re.S
)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")  # of a traceback, for terminals
# "cos x", not "cosx": a function's name is set off from an argument that has no parenthesis.
_FUNCTION = re.compile(r"(<m[io]>[a-z]{2,}</m[io]>)(?=<mi>)")


def on_config(config: Any, **_: Any) -> Any:
    """The nav's patterns, such as papers/*.md, become the files that match."""

    def entries(items: list[Any]) -> list[Any]:
        found: list[Any] = []
        for item in items:
            if isinstance(item, dict):
                found += [{name: entries(of) if isinstance(of, list) else of for name, of in item.items()}]
            elif "*" in item:
                files = pages.in_order(item, Path(config.docs_dir))
                at = Path(item).parent
                found += [{pages.title(file): f"{at}/{file.stem}.md"} for file in files]
            else:
                found.append(item)
        return found

    config.nav = entries(config.nav)
    return config


def on_files(files: Any, config: Any, **_: Any) -> Any:
    sources = sorted(Path(config.docs_dir).glob("notebooks/*.ipynb"))
    try:
        found = notebooks.run_all(sources)
    except Exception as error:
        raise PluginError(f"a notebook does not run: {_COLOUR.sub('', str(error))}") from error
    for source, page in zip(sources, found, strict=True):
        made = {f"{source.stem}.md": page.markdown, **page.pictures}
        for name, content in made.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    try:
        return str(pages.filled(markdown))
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def on_page_content(content: str, page: Any, **_: Any) -> str:
    def mathml(found: re.Match[str]) -> str:
        tex = html.unescape(found["tex"]).strip()
        block = found["tag"] == "div"
        formula = convert(tex, display="block" if block else "inline")
        formula = _FUNCTION.sub(r'\1<mspace width="0.17em"/>', formula)
        if re.search(r"\\[A-Za-z]", html.unescape(formula)):
            raise PluginError(f"{page.file.src_uri}: this formula has a command that is not known: {tex}")
        return f'<div class="formula">{formula}</div>' if block else formula

    # The API pages read the package through links in .venv/src, which is nobody's path to it.
    return _FORMULA.sub(mathml, content).replace(".venv/src/lamina/", "lamina/")
