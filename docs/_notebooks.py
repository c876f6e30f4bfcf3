"""Notebooks as pages: each is run when the site is built, and a cell that fails fails the build."""

import asyncio
import base64
import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

SECONDS = 300  # of a cell; a kernel that hangs must not hang CI
AT_ONCE = 2
FOLDERS = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")


@dataclass
class Page:
    """The Markdown of a notebook that was run, and its pictures by their file names."""

    markdown: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)


def run_all(files: list[Path]) -> list[Page]:
    """Runs the notebooks, two at once, each in an empty folder of its own.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed; the message shows it.
    """
    with TemporaryDirectory() as scratch:
        # Jupyter's files go there too; one thread each, so that the results are the same on every machine.
        own = {**dict.fromkeys(FOLDERS, scratch), "OMP_NUM_THREADS": "1"}

        async def run() -> list[Any]:
            free = asyncio.Semaphore(AT_ONCE)
            return await asyncio.gather(*(_run(file, Path(scratch), free) for file in files))

        with patch.dict(os.environ, own):
            nodes = asyncio.run(run())
    return [_page(file, node) for file, node in zip(files, nodes, strict=True)]


async def _run(file: Path, scratch: Path, free: asyncio.Semaphore) -> Any:
    node = nbformat.read(file, as_version=4)
    folder = scratch / file.stem
    folder.mkdir()
    sockets = {"transport": "ipc", "ip": str(scratch / f"{file.stem}-ipc")}  # no port is opened
    client = NotebookClient(
        node,
        timeout=SECONDS,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        config=Config({"KernelManager": sockets}),
    )
    async with free:
        await client.async_execute()
    return node


def _page(file: Path, node: Any) -> Page:
    page = Page()
    parts = []
    for cell in node.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%")).strip()
        if code:
            parts.append(f"```python\n{code}\n```")
        parts += [_output(output, file.stem, page) for output in cell.outputs]
    heading, _, rest = "\n\n".join(part for part in parts if part).partition("\n")
    where = f"This page is a notebook, [{file.name}]({file.name}), run when the site was built."
    page.markdown = f"{heading}\n\n{where}\n{rest}\n"
    return page


def _output(output: Any, stem: str, page: Page) -> str:
    """Text as text, a picture as a file; what is neither has a text too."""
    if output.output_type == "stream":
        return "" if output.name == "stderr" else f"```text\n{output.text.rstrip()}\n```"
    if "image/png" in output.data:
        name = f"{stem}-{len(page.pictures) + 1}.png"
        page.pictures[name] = base64.b64decode(output.data["image/png"])
        return f"![]({name})"
    return f"```text\n{output.data['text/plain']}\n```"
