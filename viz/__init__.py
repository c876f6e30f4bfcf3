"""Pictures and inspection: attention maps, learning curves, confusion matrices, a model's modules.

matplotlib is imported where something is drawn, not before.
"""

from .attention import plot_attention, plot_attention_over_images
from .bars import plot_bars
from .capture import AttentionRecord, attention_rollout, capture_attention
from .confusion import plot_confusion_matrix
from .curves import plot_learning_curves
from .lines import plot_lines
from .modules import ModuleRow, count_flops, module_tree
from .spectrum import attention_spectrum

__all__ = [
    "AttentionRecord",
    "ModuleRow",
    "attention_rollout",
    "attention_spectrum",
    "capture_attention",
    "count_flops",
    "module_tree",
    "plot_attention",
    "plot_attention_over_images",
    "plot_bars",
    "plot_confusion_matrix",
    "plot_learning_curves",
    "plot_lines",
]
