"""Pairs of sentences, from files of one sentence a line or made by rule, as batches of word pieces."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .errors import RecipeError
from .number_words import number_pairs
from .text_files import find_file, read_lines

PADDING, START, END, UNKNOWN = range(4)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
MULTI30K = {"train": "train", "val": "val", "test": "test_2016_flickr"}
Pair = tuple[list[int], list[int]]


class TranslationData(LightningDataModule):
    """English and German sentences as ids of one byte-pair vocabulary, learned from the training part alone.

    With a folder these are Multi30k's files: {train,val,test_2016_flickr}.{en,de}, one sentence a line, plain
    or gzipped. Without one they are numbers in words (`number_words`). A batch of training has sentences of
    about one length, as many as come to `tokens` with their padding.

    Args:
        folder: of the files, or None.
        tokens: source and target tokens of a batch, padding counted, whichever are more.
        vocab_size: pieces of the vocabulary at most; four stand for padding, start, end and unknown.

    Shape:
        - a batch: source (B, S) with an end token, target (B, T) from start to end; padding behind both

    Raises:
        RecipeError: a file is missing or malformed.

    Reference:
        Elliott, Frank, Sima'an, Specia. Multi30K: Multilingual English-German Image Descriptions. 2016.
        Sennrich, Haddow, Birch. Neural Machine Translation of Rare Words with Subword Units. ACL 2016.

    Example:
        >>> from lamina.recipes.translation_data import TranslationData
        >>> data = TranslationData(tokens=200, vocab_size=200)
        >>> data.setup("test")
        >>> source, target = next(iter(data.test_dataloader()))
        >>> data.text(target[0]) == data.references[0]
        True
    """

    def __init__(self, folder: Path | None = None, *, tokens: int = 4096, vocab_size: int = 8000) -> None:
        super().__init__()
        self.folder, self.tokens, self.vocab_size = folder, tokens, vocab_size
        self.parts: dict[str, list[Pair]] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        texts = number_pairs() if self.folder is None else read_pairs(self.folder)
        english, german = texts["train"]
        self.tokenizer = learn_pieces([*english, *german], self.vocab_size)
        self.references = texts["test"][1]
        for part, (sources, targets) in texts.items():
            ids = [[e.ids for e in self.tokenizer.encode_batch(side)] for side in (sources, targets)]
            self.parts[part] = [([*s, END], [START, *t, END]) for s, t in zip(*ids, strict=True)]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """In the order of `references`."""
        return DataLoader(self.parts["test"], batch_size=100, collate_fn=padded)  # type: ignore[arg-type]

    def text(self, ids: Tensor) -> str:
        """What ids stand for, without special tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json beside the model."""
        self.setup("fit")
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        pairs = self.parts[part]
        batches = LengthBatches([max(map(len, pair)) for pair in pairs], self.tokens, shuffle=shuffle)
        return DataLoader(pairs, batch_sampler=batches, collate_fn=padded)  # type: ignore[arg-type]


class LengthBatches(Sampler[list[int]]):
    """Batches of samples of about one length, of at most `tokens` with their padding (or one sample).

    No batch has more than `most` samples, where that is given.
    With `shuffle` samples of one length change places each time, and the batches their order: always as many
    batches of the same lengths. All draws are from the global generator.
    """

    def __init__(
        self, lengths: Sequence[int], tokens: int, *, most: int | None = None, shuffle: bool
    ) -> None:
        self.lengths, self.tokens, self.shuffle = lengths, tokens, shuffle
        self.most = len(lengths) if most is None else most
        self.number = len(self._batches(range(len(lengths))))

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[list[int]]:
        if not self.shuffle:
            yield from self._batches(range(len(self.lengths)))
            return
        batches = self._batches(torch.randperm(len(self.lengths)).tolist())
        for n in torch.randperm(len(batches)).tolist():
            yield batches[n]

    def _batches(self, order: Iterable[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        for n in sorted(order, key=self.lengths.__getitem__):  # so that the last one is the longest
            wanted = len(batches[-1]) + 1 if batches else 1
            if not batches or wanted > self.most or self.lengths[n] * wanted > self.tokens:
                batches.append([])
            batches[-1].append(n)
        return batches


def padded(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Sources and targets as matrices."""
    source, target = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(pair[side]) for pair in pairs], batch_first=True, padding_value=PADDING
        )
        for side in (0, 1)
    )
    return source, target


def read_pairs(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Part -> its sentences in English and German.

    Raises:
        RecipeError: a file is missing, empty, or not as long as its other language.
    """
    parts = {}
    for part, name in MULTI30K.items():
        paths = [find_file(folder, f"{name}.{language}") for language in ("en", "de")]
        english, german = map(read_lines, paths)
        if not english or len(english) != len(german):
            raise RecipeError(
                f"{paths[0].name} and {paths[1].name} must have one sentence a line, as many in both, "
                f"got {len(english)} and {len(german)} lines"
            )
        parts[part] = english, german
    return parts


def learn_pieces(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-pair vocabulary that gives a text back as it was, blanks and all."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
