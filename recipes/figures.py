"""The pictures that many recipes share. Drawing is `lamina.viz`'s; here is only which data goes in."""

from typing import TYPE_CHECKING

from .recipe import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curves(outcome: Outcome) -> "Figure":
    """What was logged in training and validation over the epochs, all seeds together."""
    from ..viz import plot_learning_curves

    return plot_learning_curves({f"seed {result.seed}": result.history for result in outcome.seeds})


def confusion_matrix(outcome: Outcome) -> "Figure":
    """Which class was taken for which in the test, summed over the seeds."""
    import torch

    from ..viz import plot_confusion_matrix

    matrices = torch.tensor([result.evidence["confusion"] for result in outcome.seeds])
    return plot_confusion_matrix(matrices.sum(0))
