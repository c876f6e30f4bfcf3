"""Files that are whole or not there: a kill, a full disk or a second process never leaves half a result."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import RecipeError


def write_bytes(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes to the disk, and moves into place. On any failure the old file stays."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What the file holds; None where there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def check_in_clone(page: Path) -> None:
    """Raises RecipeError where there is no folder for a page of the docs, as in an installed package."""
    if not page.parent.is_dir():
        raise RecipeError(
            f"no folder {page.parent}: the docs are in a clone of the repository, not in the package"
        )


@contextmanager
def only_one_process(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the folder. The lock goes with the process, however it ends.

    Raises:
        RecipeError: another process is in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no lock, and no harm to one who starts one command at a time
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(
                f"another process works on {folder}; --restart begins a run beside it"
            ) from error
        yield
