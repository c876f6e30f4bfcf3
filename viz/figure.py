"""What the pictures share: a figure without pyplot's global state, and a file that is whole or not there."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLOURS = "viridis"  # one colour map everywhere: even in brightness, readable in grey and to the colour-blind
DPI = 150


def new_figure(width: float, height: float, *, squares: bool = False) -> "Figure":
    """An empty figure of that size in inches on its own canvas: no window, no backend switch, no registry.

    `squares` draws panels of a fixed aspect close together.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('lamina.viz draws with matplotlib: pip install "lamina[recipes]"') from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout="compressed" if squares else "constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: "Figure", path: str | os.PathLike[str] | None) -> "Figure":
    """Writes the figure to `path`, if there is one, and hands it back.

    The file is written under another name beside `path` and then moved there, so that a full disk or a kill
    leaves the earlier picture as it was. The suffix chooses the format, PNG where there is none.
    """
    if path is None:
        return figure
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            figure.savefig(file, format=target.suffix[1:] or "png", dpi=DPI)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return figure


def as_floats(name: str, values: Tensor, *shapes: Sequence[str]) -> Tensor:
    """`values` on the CPU in float64, after checking that it has as many dimensions as one of `shapes`."""
    tensor = torch.as_tensor(values)
    if tensor.ndim not in {len(shape) for shape in shapes} or tensor.numel() == 0:
        wanted = " or ".join(f"({', '.join(shape)})" for shape in shapes)
        raise ValueError(f"{name} must be a non-empty {wanted}, got shape {tuple(tensor.shape)}")
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def check_labels(name: str, labels: Sequence[str] | None, size: int) -> None:
    if labels is not None and len(labels) != size:
        raise ValueError(f"{name} must have {size} entries, got {len(labels)}")


def add_colour_bar(figure: "Figure", image: "AxesImage", panels: "Sequence[Axes]", label: str) -> None:
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)


def without_ticks(axes: "Axes") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
