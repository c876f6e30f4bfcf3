"""Learning curves: one panel a metric, one colour a run."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from .figure import COLOURS, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Histories = Mapping[str, Mapping[str, Sequence[float]]]

LineStyle = Literal["-", "--", ":"]
LINES: dict[str, LineStyle] = {
    "train": "--",
    "val": "-",
    "valid": "-",
    "validation": "-",
    "test": ":",
    "": "-",
}
PANELS_A_ROW = 3


def plot_learning_curves(histories: Histories, *, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draws every metric over the epochs, all runs together.

    Args:
        histories: run (such as "seed 0") -> metric -> one value an epoch. `train_loss` and `val_loss`, or
            `train/loss` and `val/loss`, share the panel "loss": training dashed, validation solid. Runs may
            differ in length and in metrics; a value that is None or not finite leaves a gap.
        path: where to write the picture too.

    Returns:
        The figure; its axes are the panels, in the order in which the metrics first occur.

    Raises:
        ValueError: there is no run, or no metric in any run.

    Example:
        >>> from lamina.viz import plot_learning_curves
        >>> figure = plot_learning_curves({"seed 0": {"train_loss": [2.0, 1.0], "val_loss": [2.1, 1.3]}})
        >>> [axes.get_title() for axes in figure.axes]
        ['loss']
    """
    panels = _panels(histories)
    if not panels:
        raise ValueError(f"histories must hold at least one run with one metric, got {dict(histories)!r}")
    columns = min(len(panels), PANELS_A_ROW)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(3.4 * columns, 4.5), 2.9 * rows + 0.5)

    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    # The bright end of the colour map is left out: yellow lines do not show on white.
    runs = list(histories)
    colour = {run: colormaps[COLOURS](0.08 + 0.74 * i / max(len(runs) - 1, 1)) for i, run in enumerate(runs)}
    splits: dict[str, LineStyle] = {}
    for index, (metric, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(metric.replace("_", " "), fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.set_xlim(0.5, max(1, *(len(values) for _, _, values in lines)) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for run, split, values in lines:
            if split:
                splits[split] = LINES[split]
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=colour[run],
                linestyle=LINES[split],
                linewidth=1.0 if split == "train" else 1.6,
                marker="o" if _has_lone_points(values) else None,
                markersize=3,
                label=f"{run} {split}".strip(),
            )
    keys = [Line2D([], [], color=colour[run], label=run, linewidth=2) for run in runs]
    keys += [Line2D([], [], color="0.3", linestyle=style, label=split) for split, style in splits.items()]
    figure.legend(
        handles=keys, loc="outside lower center", ncols=min(len(keys), 6), frameon=False, fontsize=8
    )
    return finish(figure, path)


def _panels(histories: Histories) -> dict[str, list[tuple[str, str, list[float]]]]:
    """Metric -> its lines, each (run, split, values); a split is "" where the name has none."""
    panels: dict[str, list[tuple[str, str, list[float]]]] = {}
    for run, history in histories.items():
        for name, values in history.items():
            metric, split = _metric_and_split(name)
            clean = [float("nan") if v is None or not math.isfinite(v) else float(v) for v in values]
            panels.setdefault(metric, []).append((run, split, clean))
    return panels


def _metric_and_split(name: str) -> tuple[str, str]:
    for separator in ("/", "_"):
        split, found, metric = name.partition(separator)
        if found and metric and split in LINES:
            return metric, split
    return name, ""


def _has_lone_points(values: Sequence[float]) -> bool:
    """Whether a value stands between gaps, where a line alone would not show it."""
    padded = [math.nan, *values, math.nan]
    return any(
        math.isnan(before) and not math.isnan(here) and math.isnan(after)
        for before, here, after in zip(padded, padded[1:], padded[2:], strict=False)
    )
