"""Plain text, from files or made by rule, as blocks of word pieces."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from .errors import RecipeError
from .market_words import sentences
from .masking import Masked, MaskTokens
from .text_files import ENDINGS, find_file, read_lines

PADDING, UNKNOWN, CLS, SEP, MASK = range(5)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
UNTOLD = (PADDING, UNKNOWN, CLS, SEP)  # nobody is asked what these were
PARTS = {"train": "train", "val": "val", "valid": "val", "dev": "val", "test": "test"}
MULTI30K = {"train": "train.en", "val": "val.en", "test": "test_2016_flickr.en"}
SHARES = {"train": 0.9, "val": 0.05, "test": 0.05}


class TextData(LightningDataModule):
    """A text as blocks of word pieces, whose vocabulary is learned from the training part alone.

    Each line ends with [SEP], the lines follow one another, and each block is [CLS] and the next `length` - 1
    pieces of that; the last is padded. Empty lines are left out, and case and accents too.

    The folder's files are those that `read_texts` finds. Without a folder the text is made by rule
    (`market_words`). A word that the files give as <unk>, as the Penn Treebank's do, is [UNK].

    Args:
        folder: of the files, or None.
        length: pieces of a block, [CLS] counted.
        batch_size: blocks a step.
        vocab_size: pieces of the vocabulary at most, of which five are special: `PADDING`, `UNKNOWN`, `CLS`,
            `SEP` and `MASK` are the first ones' ids.
        batches: steps an epoch, of blocks drawn anew; 0 for all the text.
        mask_rate: share of the pieces that `hide` and `hide_fixed` ask for.

    Shape:
        - a batch: (B, length) of integers

    Raises:
        RecipeError: a file is missing or malformed, or a part has less text than a block.

    Reference:
        Devlin, Chang, Lee, Toutanova. BERT. NAACL 2019. Section 3 (WordPiece, [CLS], [SEP]).

    Example:
        >>> from lamina.recipes.text_data import TextData
        >>> data = TextData(length=12, batch_size=5, vocab_size=200)
        >>> data.setup("fit")
        >>> ids = next(iter(data.test_dataloader()))
        >>> ids.shape, data.text(ids[0])
        (torch.Size([5, 12]), 'in autumn some busy doctor')
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        length: int = 128,
        batch_size: int = 64,
        vocab_size: int = 8000,
        batches: int = 0,
        mask_rate: float = 0.15,
    ) -> None:
        super().__init__()
        self.folder, self.length, self.batch_size = folder, length, batch_size
        self.vocab_size, self.batches, self.mask_rate = vocab_size, batches, mask_rate
        self.parts: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        texts = sentences() if self.folder is None else read_texts(self.folder)
        self.tokenizer = learn_word_pieces(texts["train"], self.vocab_size)
        if (learned := self.tokenizer.get_vocab_size()) > self.vocab_size:
            raise RecipeError(
                f"vocab_size must be at least {learned}, the single characters alone, got {self.vocab_size}"
            )
        for part, lines in texts.items():
            blocks = as_blocks(self.tokenizer, lines, self.length)
            if len(blocks) == 0 or PADDING in blocks[0]:
                raise RecipeError(
                    f"the {part} part must have text for one block of {self.length} pieces, "
                    f"got {len(lines)} lines"
                )
            self.parts[part] = blocks

    def train_dataloader(self) -> DataLoader[Tensor]:
        blocks = self.parts["train"]
        number = self.batches * self.batch_size or len(blocks)
        sampler = RandomSampler(blocks, num_samples=number)
        return DataLoader(blocks, batch_size=self.batch_size, sampler=sampler)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.parts["val"], batch_size=self.batch_size)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.parts["test"], batch_size=self.batch_size)  # type: ignore[arg-type]

    def hide(self, ids: Tensor, generator: torch.Generator | None = None) -> Masked:
        """The batch with masks in the paper's shares, drawn anew."""
        known = self.tokenizer.get_vocab_size()
        mask = MaskTokens(known, MASK, special_ids=UNTOLD, rate=self.mask_rate, generator=generator)
        return mask(ids)

    def hide_fixed(self, ids: Tensor, batch_idx: int) -> Masked:
        """The same masks always for the same batch, on every device: those of validation and test."""
        masked = self.hide(ids.cpu(), torch.Generator().manual_seed(batch_idx))
        return Masked(*(part.to(ids.device) for part in masked))

    def text(self, ids: Tensor) -> str:
        """What ids stand for, without special tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json beside the model."""
        self.setup("fit")
        self.tokenizer.save(str(folder / "tokenizer.json"))


def read_texts(folder: Path) -> dict[str, list[str]]:
    """Part ("train", "val", "test") -> its lines.

    Multi30k's English files, where {train,val,test_2016_flickr}.en are there. Else of all *.txt and *.txt.gz
    those whose names have one of the words train, val (or valid, dev) and test, such as ptb.train.txt.gz; the
    others are left out then. Where no name has one, each file is cut in order: its first 90 % of characters
    are for training, 5 % for validation, 5 % for the test, each up to the end of a line.

    Raises:
        RecipeError: there is no such file, or a part is missing, or a file is no UTF-8 text.
    """
    if any((folder / (MULTI30K["train"] + ending)).is_file() for ending in ENDINGS):
        return {part: _lines(find_file(folder, name)) for part, name in MULTI30K.items()}
    files = sorted(path for path in folder.glob("*.txt*") if path.name.endswith((".txt", ".txt.gz")))
    if not files:
        raise RecipeError(f"the data folder {folder} must hold text, as *.txt or *.txt.gz; there is none")
    texts: dict[str, list[str]] = {part: [] for part in SHARES}
    named = [(part, path) for path in files if (part := _part_of(path)) is not None]
    for part, path in named:
        texts[part] += _lines(path)
    if missing := [part for part in texts if named and part not in dict(named)]:
        raise RecipeError(
            f"the data folder {folder} must hold a file for each of train, val and test, or for none; "
            f"there is none for {' and '.join(missing)}"
        )
    for path in files if not named else []:
        for part, lines in _cut(_lines(path)).items():
            texts[part] += lines
    return texts


def learn_word_pieces(lines: Sequence[str], vocab_size: int) -> Tokenizer:
    """A WordPiece vocabulary without case and accents; pieces that go on in a word begin with ##."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    clean = [normalizer.normalize_str(line.replace(SPECIAL[UNKNOWN], " ")) for line in lines]
    words = {word for line in clean for word, _ in splitter.pre_tokenize_str(line)}
    # The trainer meets these in an order of its own in every process, on which ties depend: given, they stay.
    inner = sorted({f"##{character}" for word in words for character in word[1:]})
    learner = Tokenizer(models.WordPiece(unk_token=SPECIAL[UNKNOWN]))
    learner.pre_tokenizer = splitter
    learner.train_from_iterator(
        clean,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=[*SPECIAL, *inner], show_progress=False
        ),
    )
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def as_blocks(tokenizer: Tokenizer, lines: Sequence[str], length: int) -> Tensor:
    """(N, length): [CLS] and the lines' pieces, each line with a [SEP] at its end; the last row padded."""
    pieces = [n for encoding in tokenizer.encode_batch(list(lines)) for n in (*encoding.ids, SEP)]
    rows = -(-len(pieces) // (length - 1))
    pieces += [PADDING] * (rows * (length - 1) - len(pieces))
    text = torch.tensor(pieces, dtype=torch.long).view(rows, length - 1)
    return torch.cat((torch.full((rows, 1), CLS), text), 1)


def _lines(path: Path) -> list[str]:
    return [line.replace("<unk>", SPECIAL[UNKNOWN]) for line in read_lines(path) if line]


def _part_of(path: Path) -> str | None:
    """By the first word of its name that says one."""
    return next((PARTS[word] for word in re.split("[^a-z]+", path.name.lower()) if word in PARTS), None)


def _cut(lines: list[str]) -> dict[str, list[str]]:
    ends, total = [], 0
    for line in lines:
        total += len(line)
        ends.append(total)
    parts: dict[str, list[str]] = {part: [] for part in SHARES}
    first, second = SHARES["train"] * total, (SHARES["train"] + SHARES["val"]) * total
    for line, end in zip(lines, ends, strict=True):
        parts["train" if end <= first else "val" if end <= second else "test"].append(line)
    return parts
