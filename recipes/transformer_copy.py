"""A small Transformer copies sequences: the first thing that a right implementation learns, in minutes.

A wrong mask, a shifted target, a cache that forgets, or a schedule that never warms up: each shows here.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .figures import learning_curves
from .recipe import Metric, Outcome, Recipe, register
from .settings import SequenceSettings, Settings

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from matplotlib.figure import Figure
    from torch import nn


def data(settings: SequenceSettings, folder: Path | None) -> "LightningDataModule":
    from .copy_data import CopyData

    return CopyData(settings.batch_size)


def task(model: "nn.Module", settings: Settings) -> "LightningModule":
    from .sequence_to_sequence import SequenceToSequence

    assert isinstance(settings, SequenceSettings)
    return SequenceToSequence(model, settings)


def attention_to_the_source(outcome: Outcome) -> "Figure":
    """The last block's cross-attention for one sequence, the mean of its heads: what is copied from where."""
    import torch

    from ..viz import capture_attention, plot_attention

    outcome.data.setup("test")
    source, target = next(iter(outcome.data.test_dataloader()))
    with torch.no_grad(), capture_attention(outcome.model) as record:
        outcome.model(source[:1], target[:1, :-1])
    length = int((source[0] != 0).sum())
    last = max(name for name in record if name.endswith("cross_attention"))
    weights = record[last][-1][0].mean(0)[:length, :length]
    symbols = [str(t) for t in source[0, :length].tolist()]
    return plot_attention(weights, query_labels=symbols, key_labels=symbols)


TRANSFORMER_COPY = register(
    Recipe(
        name="transformer_copy",
        title="A small Transformer copies sequences of 10 to 20 symbols",
        paper="Vaswani et al. Attention Is All You Need. NIPS 2017.",
        model="transformer_copy",
        model_options={"dropout": 0.0},
        data=data,
        task=task,
        settings=SequenceSettings(
            epochs=20,
            batch_size=64,
            learning_rate=1.5e-3,
            warmup_steps=400,
            label_smoothing=0.1,
            average_last=5,
            threads=1,
        ),
        metric=Metric(
            name="sequences copied without a mistake",
            key="exact_match",
            unit="%",
            bar=100.0,
            source="ours, set before the first run",
        ),
        figures={"Learning curves": learning_curves, "What is copied from where": attention_to_the_source},
        notes="The paper has no such task; its schedule, optimiser and label smoothing are used, with a "
        "third of its peak rate, at which so short a run settles. Nothing is dropped: every sequence is new.",
    )
)
