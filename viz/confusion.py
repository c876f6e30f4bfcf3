"""The confusion matrix: which class is taken for which."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .figure import COLOURS, add_colour_bar, as_floats, check_labels, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_WITH_NUMBERS = 40


def plot_confusion_matrix(
    matrix: Tensor, *, labels: Sequence[str] | None = None, path: str | os.PathLike[str] | None = None
) -> "Figure":
    """Draws how often each true class (row) was predicted as each class (column).

    A cell shows its count; its colour is the share of its row, so that a rare class shows as clearly as a
    frequent one. A class without samples is drawn as zero. Over 40 classes the numbers are left out.

    Args:
        matrix: (K, K) counts, rows the truth, columns the prediction.
        labels: K names; the numbers from zero where they are not given.
        path: where to write the picture too.

    Returns:
        The figure; its first axes hold the matrix, its title the accuracy.

    Raises:
        ValueError: `matrix` is not square or holds a negative count, or the number of labels is not K.

    Example:
        >>> from lamina.viz import plot_confusion_matrix
        >>> figure = plot_confusion_matrix(torch.tensor([[8, 2], [1, 9]]), labels=["cat", "dog"])
        >>> figure.axes[0].get_title()
        '85.0 % of 20 right'
    """
    counts = as_floats("matrix", matrix, ("K", "K"))
    K = len(counts)
    if counts.shape[1] != K:
        raise ValueError(f"matrix must be square (K, K), got shape {tuple(counts.shape)}")
    if not (counts >= 0).all():
        raise ValueError(f"matrix must hold counts of zero or more, got {counts.min().item():g}")
    check_labels("labels", labels, K)

    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(max(0.42 * K, 2.4), 9.0)
    figure = new_figure(side + 1.9, side + 1.0, squares=True)
    axes = figure.add_subplot()
    shown = axes.imshow(shares.numpy(), cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
    names = [str(k) for k in range(K)] if labels is None else list(labels)
    if K <= LARGEST_WITH_NUMBERS:
        upright = max(map(len, names)) <= 3
        axes.set_xticks(range(K), names, rotation=0 if upright else 90)
        axes.set_yticks(range(K), names)
        size = 9 if K <= 12 else 6
        for i in range(K):
            for j in range(K):
                count, share = counts[i, j].item(), shares[i, j].item()
                # Black on the bright end of the colour map, white on the dark; zeros stay in the background.
                ink = "black" if share > 0.6 else "white"
                alpha = 1.0 if count else 0.35
                axes.text(
                    j, i, f"{count:.10g}", ha="center", va="center", color=ink, alpha=alpha, fontsize=size
                )
    axes.tick_params(labelsize=8, length=2)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("true", fontsize=9)
    total = counts.sum().item()
    right = counts.diagonal().sum().item() / total if total else 0.0
    axes.set_title(f"{100 * right:.1f} % of {total:.10g} right", fontsize=10)
    add_colour_bar(figure, shown, [axes], "share of the true class")
    return finish(figure, path)
