"""A small Transformer translates English into German: Multi30k, or numbers in words where there is no folder.

The paper's data, WMT 2014, has 4.5 million pairs; Multi30k has 29,000 short ones, descriptions of
photographs. The architecture, the schedule, label smoothing, the averaged checkpoints and the search are the
paper's; sizes and dropout suit the little data, and two cores.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .figures import learning_curves
from .recipe import Metric, Outcome, Recipe, register
from .settings import Settings, TranslationSettings

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from matplotlib.figure import Figure
    from torch import nn

    from .translation_data import TranslationData


def data(settings: TranslationSettings, folder: Path | None) -> "LightningDataModule":
    from .translation_data import TranslationData

    return TranslationData(folder, tokens=settings.tokens, vocab_size=settings.vocab_size)


def task(model: "nn.Module", settings: Settings) -> "LightningModule":
    from .translation import Translation

    assert isinstance(settings, TranslationSettings)
    return Translation(model, settings)


def attention_to_the_source(outcome: Outcome) -> "Figure":
    """The last block's cross-attention for the test's first sentence, the mean of its heads."""
    from .translation import Translator

    data: TranslationData = outcome.data  # type: ignore[assignment]
    data.setup("test")
    source = data.parts["test"][0][0][:-1]
    translator = Translator(outcome.model, data.tokenizer)  # type: ignore[arg-type]
    return translator.picture(str(data.tokenizer.decode(source)))


SETTINGS = TranslationSettings(
    epochs=16,
    learning_rate=1.4e-3,
    warmup_steps=800,
    label_smoothing=0.1,
    average_last=5,
    num_beams=4,
    tokens=2048,
    vocab_size=8000,
)

TRANSFORMER_TRANSLATION = register(
    Recipe(
        name="transformer_translation",
        title="A small Transformer translates English into German",
        paper="Vaswani et al. Attention Is All You Need. NIPS 2017.",
        model="transformer_small",
        data=data,
        task=task,
        settings=SETTINGS,
        metric=Metric(
            name="BLEU on Multi30k's test of 2016",
            key="bleu",
            bar=34.0,
            source="ours, set before the first run: good repositories reach 36 greedily",
            paper=27.3,
            paper_source="WMT 2014 English-German, base model, table 2: other data",
        ),
        figures={"Learning curves": learning_curves, "What is written from where": attention_to_the_source},
        seeds=(1,),
        data_format="Multi30k: {train,val,test_2016_flickr}.{en,de}, one sentence a line, plain or gzipped",
        bar_with_data=True,
        notes="Without --data the pairs are numbers in words, made by rule: a check that all runs, whose "
        "BLEU says nothing of Multi30k's.",
    )
)

TRANSFORMER_TRANSLATION_GPU = register(
    replace(
        TRANSFORMER_TRANSLATION,
        name="transformer_translation_gpu",
        title="The paper's base Transformer translates English into German, on a GPU",
        model="transformer_base",
        model_options={"vocab_size": SETTINGS.vocab_size, "dropout": 0.3},
        settings=replace(SETTINGS, epochs=40, learning_rate=7e-4, warmup_steps=1000, tokens=8192),
        metric=replace(TRANSFORMER_TRANSLATION.metric, bar=36.0),
        seeds=(1, 2, 3),
        notes="The peak of the learning rate is the paper's; dropout is that of its big model, as there is "
        "little data. No setting has been tried. Without --data the pairs are made by rule, of numbers.",
    )
)
