"""Which files of this folder are recipes: those that call `register` at their top level."""

import re
from pathlib import Path

_REGISTERS = re.compile(r"^(?:\w+ = )?register\(", re.M)


def recipe_modules(folder: Path = Path(__file__).parent) -> list[str]:
    """The names of their modules, sorted.

    The files are read, not run: what a recipe's data and task need is imported when it trains.
    """
    files = folder.glob("*.py")
    return sorted(file.stem for file in files if _REGISTERS.search(file.read_text(encoding="utf-8")))
