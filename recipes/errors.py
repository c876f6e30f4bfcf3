"""What the user can mend, said in one line."""

import difflib
from collections.abc import Iterable


class RecipeError(Exception):
    """Something that the user can mend. The command line shows its one line and no traceback."""


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """The end of a message about an unknown name: the ones that look like it, else all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"{what}: {', '.join(names)}"
