"""A small BERT learns a text by its masked tokens, beside two that read from the left alone.

The paper trains on 3.3 billion words for days; here it is the 29,000 captions of Multi30k, for minutes. What
can be shown there is the paper's claim itself: that a token is told better from both sides of it. The two
models to compare with have the same blocks under a causal mask. One has the same training, so that only what
it may see differs; the other is the paper's left-to-right model, a language model that learns from every
token, and in the test is asked for those that the others are asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .recipe import Arm, Claim, Comparison, Metric, Outcome, Recipe, register
from .settings import TextSettings

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from matplotlib.figure import Figure
    from torch import nn

    from .text_data import TextData

SAME_MASKS, LANGUAGE_MODEL = "left to right", "left-to-right language model"
VOCAB_SIZE, LENGTH = 1000, 32
TEXT = (  # what `data` takes
    "text: {train,valid,test} in the names of *.txt or *.txt.gz, such as the Penn Treebank's ptb.train.txt, "
    "or files to be cut into parts, or Multi30k's *.en"
)


def data(settings: TextSettings, folder: Path | None) -> "LightningDataModule":
    from .text_data import TextData

    return TextData(
        folder,
        length=settings.length,
        batch_size=settings.batch_size,
        vocab_size=settings.vocab_size,
        batches=settings.batches,
        mask_rate=settings.mask_rate,
    )


def task(model: "nn.Module", settings: TextSettings) -> "LightningModule":
    from .masked_language import MaskedLanguage

    return MaskedLanguage(model, settings)


def language_model(model: "nn.Module", settings: TextSettings) -> "LightningModule":
    from .masked_language import LeftToRightLanguage

    return LeftToRightLanguage(model, settings)


def unigram(data: "TextData") -> float:
    from .masked_language import unigram

    return unigram(data)


def neighbours(data: "TextData") -> float:
    from .masked_language import neighbours

    return neighbours(data)


def below_the_unigram(found: Comparison) -> float:
    return 100 * (1 - found.mean("loss") / found.baselines["unigram"])


def below_left_to_right(found: Comparison) -> float:
    return found.mean("loss", SAME_MASKS) - found.mean("loss")


def curves_by_arm(outcome: Outcome) -> "Figure":
    """Validation's loss over the epochs, the first seed of each training."""
    from ..viz import plot_learning_curves

    runs = {"both sides": outcome.seeds[0]} | {name: found[0] for name, found in outcome.arms.items()}
    kept = ("val/loss", "val/accuracy")
    return plot_learning_curves({name: {k: run.history[k] for k in kept} for name, run in runs.items()})


def attention_of_a_line(outcome: Outcome) -> "Figure":
    """The last block's attention for the beginning of the test, the mean of its heads."""
    from .masked_language import MaskFiller

    data: TextData = outcome.data  # type: ignore[assignment]
    data.setup("test")
    filler = MaskFiller(outcome.model, data.tokenizer)  # type: ignore[arg-type]
    return filler.picture(data.text(data.parts["test"][0][:24]))


BERT_MLM = register(
    Recipe(
        name="bert_mlm",
        title="A small BERT tells masked tokens from both sides",
        paper="Devlin et al. BERT: Pre-training of Deep Bidirectional Transformers for Language "
        "Understanding. NAACL 2019.",
        model="bert_tiny_pretraining",
        model_options={
            "vocab_size": VOCAB_SIZE,
            "max_length": LENGTH,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        data=data,
        task=task,
        settings=TextSettings(
            epochs=10,
            learning_rate=1e-3,
            batch_size=32,
            weight_decay=0.01,
            warmup_epochs=1,
            gradient_clip=1.0,
            threads=1,
            length=LENGTH,
            vocab_size=VOCAB_SIZE,
            batches=1000,
        ),
        metric=Metric(
            name="cross entropy of masked tokens",
            key="loss",
            unit="nats",
            bar=3.32,
            higher_is_better=False,
            source="60 % of the unigram's on the same tokens, set before the first run",
        ),
        arms={
            SAME_MASKS: Arm(model={"is_causal": True}),
            LANGUAGE_MODEL: Arm(model={"is_causal": True}, task=language_model),
        },
        baselines={"unigram": unigram, "the two neighbours": neighbours},
        claims=(
            Claim(
                name="cross entropy below the unigram's",
                unit="%",
                bar=40.0,
                source="set before the first run",
                value=below_the_unigram,
            ),
            Claim(
                name="cross entropy below that of reading from the left, with the same masks",
                unit="nats",
                bar=0.0,
                source="set before the first run: the direction of the paper's table 5",
                value=below_left_to_right,
            ),
        ),
        figures={
            "Learning curves by training": curves_by_arm,
            "Attention of a line": attention_of_a_line,
        },
        seeds=(1,),
        data_format=TEXT,
        bar_with_data=True,
        notes="The smallest of the published sizes, on Multi30k's English captions in blocks of 32 pieces, "
        "without dropout and without the second task, as there are no pairs of texts. All three trainings "
        "take as many steps over as many tokens; the language model learns from each of them, the others "
        "from 15 %. Without --data the text is made by rule.",
    )
)
