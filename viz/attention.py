"""Attention as pictures: the matrix of an alignment, and what an image model looks at."""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figure import COLOURS, add_colour_bar, as_floats, check_labels, finish, new_figure, without_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS_A_ROW = 4
IMAGES_A_ROW = 6
LIGHT = 0.4  # how much white a white pixel mixes into the colour of its patch


def plot_attention(
    weights: Tensor,
    *,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draws which key each query attends to: a row per query, a column per key.

    Args:
        weights: (Lq, Lk), or (H, Lq, Lk) for a panel per head. All panels share one colour scale from zero.
        query_labels: Lq words beside the rows.
        key_labels: Lk words above the columns.
        path: where to write the picture too.

    Returns:
        The figure; its first axes are the panels, in the order of the heads.

    Raises:
        ValueError: `weights` has another shape, or the number of labels is not that of the queries or keys.

    Example:
        >>> from lamina.viz import plot_attention
        >>> figure = plot_attention(torch.rand(3, 5).softmax(-1), query_labels=["le", "chat", "dort"])
        >>> len(figure.axes[0].images)
        1
    """
    heads = as_floats("weights", weights, ("Lq", "Lk"), ("H", "Lq", "Lk"))
    heads = heads if heads.ndim == 3 else heads[None]
    H, Lq, Lk = heads.shape
    check_labels("query_labels", query_labels, Lq)
    check_labels("key_labels", key_labels, Lk)

    columns = min(H, HEADS_A_ROW)
    rows = math.ceil(H / columns)
    # A cell of a labelled matrix holds a line of text; many panels are made smaller, to see them at once.
    cell = 0.28 if query_labels or key_labels else 0.12
    largest, smallest = (7.0, 2.4) if H == 1 else (3.5, 1.8)
    width = min(max(cell * Lk, smallest), largest)
    height = min(max(cell * Lq, smallest), largest)
    figure = new_figure(columns * (width + 0.35) + 1.0, rows * (height + 0.6) + 0.4)
    panels = [figure.add_subplot(rows, columns, head + 1) for head in range(H)]
    top = max(heads.nan_to_num().max().item(), 1e-9)
    for head, axes in enumerate(panels):
        shown = axes.imshow(
            heads[head].numpy(), cmap=COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
        )
        if H > 1:
            axes.set_title(f"head {head}", fontsize=9)
        axes.tick_params(labelsize=8, length=2)
        _label(axes, query_labels, key_labels)
        axes.set_ylabel("query" if head % columns == 0 else "", fontsize=9)
        axes.set_xlabel("key" if head + columns >= H else "", fontsize=9)
    add_colour_bar(figure, shown, panels, "attention weight")
    return finish(figure, path)


def plot_attention_over_images(
    images: Tensor,
    attention: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draws each image, and under it the same image with the attention that its patches get.

    Args:
        images: (B, C, H, W) with one or three channels, or (B, H, W). Each is stretched to its own range,
            so that normalised images show too.
        attention: (B, rows, columns), or (B, N) with `grid`. One colour scale from zero for all images. A
            patch is drawn as one flat cell: nothing is interpolated that the model did not compute.
        grid: rows and columns of the patches where `attention` is flat.
        titles: B lines above the images.
        path: where to write the picture too.

    Returns:
        The figure; its axes alternate between an image and its overlay.

    Raises:
        ValueError: a shape is another, or `grid` does not make up N patches.

    Example:
        >>> from lamina.viz import plot_attention_over_images
        >>> attention = torch.rand(2, 16).softmax(-1)
        >>> figure = plot_attention_over_images(torch.rand(2, 1, 8, 8), attention, grid=(4, 4))
        >>> len(figure.axes)  # two pairs and the colour bar
        5
    """
    pixels = as_floats("images", images, ("B", "C", "H", "W"), ("B", "H", "W"))
    pixels = pixels if pixels.ndim == 4 else pixels[:, None]
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"images must have one or three channels, got {pixels.shape[1]}")
    B, _, height, width = pixels.shape
    maps = _patch_maps(attention, grid)
    if len(maps) != B:
        raise ValueError(f"attention must have one map per image, got {len(maps)} for {B} images")
    check_labels("titles", titles, B)

    low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    pixels = ((pixels - low) / (high - low).clamp(min=1e-12)).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    top = max(maps.nan_to_num().max().item(), 1e-9)
    strips = math.ceil(B / IMAGES_A_ROW)
    columns = math.ceil(B / strips)  # as many in each strip as can be: ten are five and five
    side = 1.5
    tall = side * min(height / width, 3)
    figure = new_figure(columns * side + 0.9, strips * (2 * tall + 0.3), squares=True)
    panels = []
    for index in range(B):
        strip, column = divmod(index, columns)
        first = 2 * strip * columns + column + 1
        above = figure.add_subplot(2 * strips, columns, first)
        below = figure.add_subplot(2 * strips, columns, first + columns)
        above.imshow(pixels[index].numpy(), interpolation="nearest")
        # The hue is the attention's alone, the image only lightens it: dark pixels show the colour bar's own.
        shown = below.imshow(
            maps[index].numpy(),
            cmap=COLOURS,
            vmin=0,
            vmax=top,
            interpolation="nearest",
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
        veil = torch.ones(height, width, 4)
        veil[..., 3] = LIGHT * pixels[index].mean(-1)
        below.imshow(veil.numpy(), interpolation="nearest")
        if titles is not None:
            above.set_title(titles[index], fontsize=8, pad=3)
        without_ticks(above)
        without_ticks(below)
        panels += [above, below]
    add_colour_bar(figure, shown, panels, "attention weight")
    return finish(figure, path)


def _label(axes: "Axes", query_labels: Sequence[str] | None, key_labels: Sequence[str] | None) -> None:
    from matplotlib.ticker import MaxNLocator

    if query_labels is None:
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    else:
        axes.set_yticks(range(len(query_labels)), query_labels)
    if key_labels is None:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    else:  # above, as the translation paper prints its alignments
        axes.xaxis.tick_top()
        axes.set_xticks(range(len(key_labels)), key_labels, rotation=90)


def _patch_maps(attention: Tensor, grid: tuple[int, int] | None) -> Tensor:
    maps = as_floats("attention", attention, ("B", "rows", "columns"), ("B", "N"))
    if maps.ndim == 3:
        if grid is not None and tuple(grid) != tuple(maps.shape[1:]):
            raise ValueError(f"grid must be that of attention, got {grid} for shape {tuple(maps.shape)}")
        return maps
    if grid is None:
        raise ValueError(f"grid must be given for a flat attention (B, N), got shape {tuple(maps.shape)}")
    if math.prod(grid) != maps.shape[1]:
        raise ValueError(
            f"grid must make up the N patches of attention, got {grid} for N={maps.shape[1]} "
            "(a class token is no patch: leave it out)"
        )
    return torch.unflatten(maps, 1, tuple(grid))
