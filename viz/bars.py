"""Bars: several measures of the same few things, one panel a measure."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .figure import COLOURS, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_bars(
    panels: Mapping[str, Mapping[str, float]],
    *,
    references: Mapping[str, Mapping[str, float]] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draws a bar for each thing, one panel a measure, with its number beside it.

    A name has one colour in all panels. A bar begins at zero, so that lengths compare as the numbers do.

    Args:
        panels: title -> name -> number.
        references: title -> name -> number that is drawn across the bars, such as a baseline.
        path: where to write the picture too.

    Returns:
        The figure; its axes are the panels, in their order.

    Raises:
        ValueError: there is no panel, or a panel without a number.

    Example:
        >>> from lamina.viz import plot_bars
        >>> figure = plot_bars({"loss": {"full": 4.1, "local": 4.2}}, references={"loss": {"unigram": 6.0}})
        >>> [axes.get_title() for axes in figure.axes]
        ['loss']
    """
    if not panels or not all(panels.values()):
        raise ValueError(f"panels must hold at least one panel, and each a number, got {dict(panels)!r}")
    most = max(map(len, panels.values()))
    figure = new_figure(max(3.6 * len(panels), 4.0), 0.42 * most + 1.2)

    from matplotlib import colormaps

    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    colour = {n: colormaps[COLOURS](0.2 + 0.6 * i / max(len(names) - 1, 1)) for i, n in enumerate(names)}
    for index, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        axes.set_title(title, fontsize=10)
        bars = axes.barh(list(values), list(values.values()), color=[colour[name] for name in values])
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axes.margins(x=0.18)
        axes.invert_yaxis()
        axes.tick_params(labelsize=8, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        for name, value in (references or {}).get(title, {}).items():
            axes.axvline(value, color="0.3", linestyle=":", linewidth=1.2)
            axes.annotate(
                name,
                (value, 1),
                xycoords=("data", "axes fraction"),
                ha="right",
                va="top",
                fontsize=7,
                rotation=90,
            )
    return finish(figure, path)
