"""What mkdocstrings does not know of this library's docstrings, put into the words it knows.

A griffe extension. `.. math::` becomes a `$$` block, `Example:` becomes `Examples:` (whose `>>>` lines are
shown as code), and the sections that griffe has no name for become paragraphs. A `forward` that its class's
docstring already describes gets a line of its own, so that its signature is shown.
"""

import re
from typing import Any

from griffe import Docstring, Extension, Object

_MATH = re.compile(r"^(?P<indent> *)\.\. math::(?P<tex>.*(?:\n(?:[ \t]*\n)*(?P=indent) +\S.*)*)", re.M)
_SECTION = re.compile(
    r"^(?P<name>Shape|References?|Source):[ \t]*\n(?P<body>(?:[ \t]+\S.*\n?|[ \t]*\n)+)", re.M
)


def _display(found: re.Match[str]) -> str:
    return f"\n{found['indent']}$$ {' '.join(found['tex'].split())} $$\n"


def _paragraph(found: re.Match[str]) -> str:
    lines = [line[4:] for line in found["body"].rstrip().splitlines()]
    if found["name"] != "Shape":  # a list of references: what follows a full stop at a line's end is the next
        lines = [f"{line}  " if line.endswith(".") else line for line in lines]
    body = "\n".join(lines)
    return f"**{found['name']}:**\n\n{body}\n\n"


def readable(docstring: str) -> str:
    docstring = _MATH.sub(_display, docstring)
    docstring = re.sub(r":math:`([^`]+)`", r"$\1$", docstring)
    docstring = re.sub(r"^Example:", "Examples:", docstring, flags=re.M)
    return _SECTION.sub(_paragraph, docstring)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
        elif obj.name == "forward":
            obj.docstring = Docstring("Shapes as above.", parent=obj)
