"""What `lamina show NAME` and `lamina info` print: a model from the inside, and what this machine can run.

What collects is apart from what prints: `lamina.viz.module_tree`, `versions`, `devices` and `kernel_paths`
return plain data.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from torch import Tensor

from .. import kernels
from ..kernels.backend import operations
from ..models import Model, create_model, list_models
from ..viz import ModuleRow, count_flops, module_tree
from .errors import RecipeError, nearest
from .machine import machine
from .recipe import get_recipe, list_recipes

LIBRARIES = (
    "triton",
    "einops",
    "safetensors",
    "huggingface_hub",
    "lightning",
    "torchmetrics",
    "scikit-learn",
    "matplotlib",
    "transformers",
)


class UnknownNameError(RecipeError, ValueError):
    """There is no such model or recipe: a ValueError to a caller, one line on the command line."""


def show_model(name: str, console: Console) -> None:
    """Prints the model of that name, or a recipe's model, as a tree with shapes, parameters and FLOPs.

    Raises:
        UnknownNameError: a ValueError; no model or recipe is called so. Close names are given.
    """
    model = _model_named(name)
    inputs = model.example_inputs(batch_size=1, device="meta")
    root = module_tree(model, inputs)
    tree = Tree(_label(replace(root, name=name)), guide_style="dim")
    _grow(tree, root)
    console.print(tree)
    console.print()
    shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
    flops = count_flops(model, inputs)
    totals = Table.grid(padding=(0, 2))
    totals.add_row("input", shapes)
    totals.add_row("parameters", f"{root.parameters:,}")
    totals.add_row("multiply-adds", f"{_short(flops // 2)} ({flops // 2:,})")
    totals.add_row("FLOPs", f"{_short(flops)} ({flops:,}; one multiply-add is two)")
    console.print(totals)


def info(console: Console) -> None:
    """Prints versions, devices, and for every operation which path runs here and why the others do not."""
    for title, pairs in (("Versions", versions()), ("Devices", devices())):
        table = Table.grid(padding=(0, 2))
        for key, value in pairs:
            table.add_row(key, Text(value, style="dim" if value == "not installed" else ""))
        console.print(Text(title, style="bold"))
        console.print(table)
        console.print()
    table = Table(title="Kernels", title_justify="left", title_style="bold")
    for heading in ("operation", "on", "triton", "torch", "reference"):
        table.add_column(heading)
    for path in kernel_paths():
        cells = [Text(path.operation), Text(path.device)]
        for backend in ("triton", "torch", "reference"):
            if backend == path.chosen:
                cells.append(Text("runs", style="green"))
            elif backend in path.refusals:
                cells.append(Text(path.refusals[backend], style="yellow"))
            else:
                cells.append(Text("available", style="dim"))
        table.add_row(*cells)
    console.print(table)


def versions() -> list[tuple[str, str]]:
    """Versions of Lamina, Python and each library, "not installed" where it is missing."""
    from .. import __version__

    def version(library: str) -> str:
        try:
            return metadata.version(library)
        except metadata.PackageNotFoundError:
            return "not installed"

    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [
        ("lamina", __version__),
        ("python", python),
        ("torch", torch.__version__),  # it tells its build, "+cpu"; the package's metadata may not
        *((library, version(library)) for library in LIBRARIES),
    ]


def devices() -> list[tuple[str, str]]:
    """The processor and each accelerator, with what matters to a kernel."""
    here = machine("cpu")
    found = [("cpu", f"{here['cpu']}, {here['cores']} cores, {torch.get_num_threads()} threads in PyTorch")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(
            (
                f"cuda:{index}",
                f"{card.name}, capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB",
            )
        )
    if not torch.cuda.is_available():
        found.append(("cuda", "no device" if torch.version.cuda else "PyTorch is built without it"))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU"))
    return found


@dataclass(frozen=True)
class KernelPath:
    """Which path of an operation runs on a device, and why the refused ones do not."""

    operation: str
    device: str
    chosen: str
    refusals: dict[str, str]


def kernel_paths() -> list[KernelPath]:
    """For every operation of Lamina, on every kind of device here: the path of a small typical call."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    paths = []
    for name in sorted(operations().keys() & TYPICAL_CALLS.keys()):
        for kind in kinds:
            told = kernels.explain(operations()[name], *TYPICAL_CALLS[name](torch.device(kind)))
            paths.append(KernelPath(name, kind, told.chosen, {str(k): v for k, v in told.refusals.items()}))
    return paths


def _empty(*shapes: tuple[int, ...]) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [torch.zeros(shape, device=device) for shape in shapes]


# A test holds that every operation has its call here.
TYPICAL_CALLS: dict[str, Callable[[torch.device], list[Any]]] = {
    "additive_attention": _empty((2, 16, 64), (2, 16, 64), (64,), (2, 16, 32)),
    "additive_scores": _empty((2, 16, 64), (2, 16, 64), (64,)),
    "code_sums": lambda device: [
        torch.zeros(256, 64, device=device),
        torch.zeros(256, dtype=torch.int64, device=device),
        1024,
    ],
    "attentive_gru": _empty(
        (16, 4, 192), (4, 64), (192, 64), (192, 32), (48, 64), (4, 20, 48), (4, 20, 32), (48,)
    ),
    "deformable_sampling": lambda device: [
        torch.zeros(2, 24, 4, 16, device=device),
        [(4, 6)],
        torch.zeros(2, 8, 4, 1, 4, 2, device=device),
        torch.zeros(2, 8, 4, 1, 4, device=device),
    ],
    "dot_product_attention": _empty(*[(2, 4, 256, 64)] * 3),
    "extract_glimpses": lambda device: [*_empty((2, 1, 28, 28), (2, 2))(device), 8],
    "local_attention": _empty(*[(2, 4, 256, 64)] * 3),
    "low_rank_attention": _empty((2, 4, 256, 64), (2, 4, 64, 64), (2, 4, 64, 64)),
    "lsh_attention": _empty((2, 4, 256, 64), (2, 4, 256, 64), (2, 4, 4, 256)),
    "lsh_buckets": _empty((2, 4, 256, 64), (4, 64, 4, 4)),
    "lstm_sequence": _empty((16, 4, 256), (256, 64)),
    "nearest_code": _empty((256, 64), (1024, 64)),
    "packed_attention": lambda device: [
        *_empty(*[(256, 4, 64)] * 3)(device),
        torch.tensor([0, 100, 256], device=device),
    ],
}


def _model_named(name: str) -> Model:
    models, recipes = list_models(), list_recipes()
    if name not in models and name in recipes:
        name = get_recipe(name).model
    if name not in models:
        raise UnknownNameError(
            f"no model or recipe {name!r}; {nearest(name, {*models, *recipes}, 'there are')}"
        )
    return create_model(name, device="meta")


def _grow(tree: Tree, row: ModuleRow) -> None:
    for child in row.children:
        _grow(tree.add(_label(child)), child)


def _label(row: ModuleRow) -> Text:
    shapes = ", ".join(map(str, row.output))
    text = Text(row.name, style="bold")
    text.append(f"  {row.repeats} × {row.kind}" if row.repeats > 1 else f"  {row.kind}", style="cyan")
    if shapes:
        text.append(f"  {shapes}", style="green")
    if row.parameters:
        text.append(f"  {row.parameters:,}", style="magenta")
        text.append(" parameters each" if row.repeats > 1 else " parameters", style="dim")
    return text


def _short(count: int) -> str:
    """1234567 -> 1.23 M."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
