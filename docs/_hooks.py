"""Formulas as MathML, made when the site is built: the pages need no script and no network for them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\[\[(](?P<tex>.*?)\\[\])]\s*</(?P=tag)>', re.S
)
# "cos x", not "cosx": a function's name is set off from an argument that has no parenthesis.
_FUNCTION = re.compile(r"(<m[io]>[a-z]{2,}</m[io]>)(?=<mi>)")


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
