"""Lines over a quantity: one panel a measure, one colour a name."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from .figure import COLOURS, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panels = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]

PANELS_A_ROW = 2


def plot_lines(
    panels: Panels,
    *,
    x: str,
    y: str = "",
    log: Literal["", "x", "y", "xy"] = "",
    references: Panels | None = None,
    reference: str = "reference",
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draws measures over a quantity, such as time over the length, beside what they are compared with.

    A name has one colour in all panels. A reference is drawn dotted, in the colour of its name; only those of
    panels and names that are there.

    Args:
        panels: title -> name -> points (x, y).
        x: what the horizontal axes are.
        y: what the vertical axes are.
        log: which axes are logarithmic, to the base two along x.
        references: title -> name -> points to compare with.
        reference: what they are, for the legend.
        path: where to write the picture too.

    Returns:
        The figure; its axes are the panels, in their order.

    Raises:
        ValueError: there is no panel, or a panel without a point.

    Example:
        >>> from lamina.viz import plot_lines
        >>> figure = plot_lines({"time": {"k = 128": [(512, 1.4), (1024, 1.9)]}}, x="length", log="x")
        >>> [axes.get_title() for axes in figure.axes]
        ['time']
    """
    if not panels or not all(any(map(len, lines.values())) for lines in panels.values()):
        raise ValueError(f"panels must hold at least one panel, and each a point, got {dict(panels)!r}")
    columns = min(len(panels), PANELS_A_ROW)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(4.2 * columns, 4.8), 3.1 * rows + 0.5)

    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    # The bright end of the colour map is left out: yellow lines do not show on white.
    colour = {n: colormaps[COLOURS](0.08 + 0.74 * i / max(len(names) - 1, 1)) for i, n in enumerate(names)}
    compared = False
    for index, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for name, points in lines.items():
            marker = "o" if len(points) <= 16 else None
            axes.plot(*zip(*points, strict=True), color=colour[name], marker=marker, markersize=3.5)
            if beside := (references or {}).get(title, {}).get(name):
                compared = True
                axes.plot(*zip(*beside, strict=True), color=colour[name], linestyle=":", linewidth=1.4)
        if "x" in log:
            axes.set_xscale("log", base=2)
            places = sorted({point[0] for points in lines.values() for point in points})
            axes.set_xticks(places if len(places) <= 10 else places[:: math.ceil(len(places) / 10)])
            axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        if "y" in log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    keys = [Line2D([], [], color=colour[name], label=name, linewidth=2) for name in names]
    if compared:
        keys.append(Line2D([], [], color="0.3", linestyle=":", label=reference))
    figure.legend(
        handles=keys, loc="outside lower center", ncols=min(len(keys), 6), frameon=False, fontsize=8
    )
    return finish(figure, path)
