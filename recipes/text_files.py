"""Reads plain and gzipped text, and says clearly what is missing or malformed."""

import gzip
import zlib
from pathlib import Path

from .errors import RecipeError

ENDINGS = ("", ".txt", ".gz", ".txt.gz")


def find_file(folder: Path, name: str) -> Path:
    """The file of that name, plain, as .txt, or gzipped.

    Raises:
        RecipeError: there is none.
    """
    for ending in ENDINGS:
        if (path := folder / (name + ending)).is_file():
            return path
    raise RecipeError(
        f"the data folder {folder} must hold {name}, as text or gzipped ({', '.join(ENDINGS[1:])})"
    )


def read_lines(path: Path) -> list[str]:
    """Its lines, without their ends and without blanks around them.

    Raises:
        RecipeError: it is not UTF-8, or a damaged gzip file.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
                text = file.read()
        else:
            text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecipeError(
            f"{path} must be UTF-8 text{' in gzip' if path.suffix == '.gz' else ''}: {error}"
        ) from error
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.strip() for line in lines]
