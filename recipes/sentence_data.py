"""Labelled sentences, from files of SST-2 or made by rule, as batches of word pieces."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from .errors import RecipeError
from .film_words import reviews
from .text_data import PADDING, learn_word_pieces
from .text_files import find_file, read_lines
from .text_models import encode
from .translation_data import LengthBatches

LABELS = ("negative", "positive")
PARTS = ("train", "dev", "test")
Sample = tuple[list[int], int]


class SentenceData(LightningDataModule):
    """Sentences with one of two labels, in batches of about one length.

    With a folder these are sst2_{train,dev,test}.tsv, plain or gzipped: a sentence, a tab, and 1 where it is
    positive, else 0. Without one they are made by rule (`film_words`).

    Args:
        folder: of the files, or None.
        tokenizer: with [CLS] and [SEP], and 0 for padding; learned from the training part where not given.
        length: pieces of a sentence at most, [CLS] and [SEP] counted; what is behind is cut off.
        batch_size: sentences a step.

    Shape:
        - a batch: ids (B, L), padded behind, and labels (B)

    Raises:
        RecipeError: a file is missing or malformed.

    Reference:
        Socher et al. Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank. EMNLP
        2013.

    Example:
        >>> from lamina.recipes.sentence_data import SentenceData
        >>> data = SentenceData(batch_size=5)
        >>> data.setup("test")
        >>> ids, labels = next(iter(data.test_dataloader()))
        >>> ids.shape[0], labels.shape
        (5, torch.Size([5]))
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        length: int = 64,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.folder, self.given, self.length, self.batch_size = folder, tokenizer, length, batch_size
        self.parts: dict[str, list[Sample]] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        self.texts = reviews() if self.folder is None else read_labelled(self.folder)
        self.tokenizer = self.given or learn_word_pieces(self.texts["train"][0], 1000)
        for part, (sentences, labels) in self.texts.items():
            ids = encode(self.tokenizer, sentences, self.length)
            self.parts[part] = list(zip(ids, labels, strict=True))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("dev")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("test")

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and labels.json beside the model."""
        self.setup("fit")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "labels.json").write_text(json.dumps(LABELS))

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        samples = self.parts[part]
        batches = LengthBatches(
            [len(ids) for ids, _ in samples],
            self.batch_size * self.length,
            most=self.batch_size,
            shuffle=shuffle,
        )
        return DataLoader(samples, batch_sampler=batches, collate_fn=padded)  # type: ignore[arg-type]


def padded(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Ids as a matrix, and the labels."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids, _ in samples], batch_first=True, padding_value=PADDING
    )
    return ids, torch.tensor([label for _, label in samples])


def read_labelled(folder: Path) -> dict[str, tuple[list[str], list[int]]]:
    """Part -> its sentences and their labels.

    Raises:
        RecipeError: a file is missing or empty, or a line has not a sentence, a tab, and 0 or 1.
    """
    parts = {}
    for part in PARTS:
        path = find_file(folder, f"sst2_{part}.tsv")
        sentences, labels = [], []
        for number, line in enumerate(read_lines(path), 1):
            sentence, tab, label = line.rpartition("\t")
            if not (sentence.strip() and tab and label in ("0", "1")):
                raise RecipeError(
                    f"{path.name} must have a sentence, a tab, and 0 or 1 in each line, got {line!r} in "
                    f"line {number}"
                )
            sentences.append(sentence.strip())
            labels.append(int(label))
        if not sentences:
            raise RecipeError(f"{path.name} must have a sentence, it is empty")
        parts[part] = sentences, labels
    return parts


def bag_of_words(data: SentenceData) -> float:
    """Percent of the test that a logistic regression on counts of words gets right."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # Words are what blanks separate: so they stand in the files, and "!" is one.
    model = make_pipeline(CountVectorizer(token_pattern=r"\S+"), LogisticRegression(max_iter=1000))
    model.fit(*data.texts["train"])
    return 100 * float(model.score(*data.texts["test"]))
