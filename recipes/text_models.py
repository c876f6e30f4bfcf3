"""What a trained encoder of texts needs in use: its vocabulary, batches, pictures of its attention."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import RecipeError
from .text_data import PADDING, SPECIAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tokenizers import Tokenizer

_CLS, _SEP = SPECIAL[2], SPECIAL[3]


class TextModel:
    """A model of ids (B, L) with the vocabulary that it was trained on.

    Args:
        model: in evaluation mode; its `config` has `max_length`, and padding is 0.
        tokenizer: with [CLS] and [SEP], as this package learns them and as BERT's published ones are.

    Raises:
        ValueError: the tokenizer has no [CLS] or [SEP], or more pieces than the model.
    """

    def __init__(self, model: nn.Module, tokenizer: "Tokenizer") -> None:
        for token in (_CLS, _SEP):
            special_id(tokenizer, token)
        known: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
        if tokenizer.get_vocab_size() > known:
            raise ValueError(
                f"tokenizer must have at most the model's {known} pieces, got {tokenizer.get_vocab_size()}"
            )
        self.model, self.tokenizer = model, tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int:
        length: int = self.model.config.max_length  # type: ignore[union-attr,assignment]
        return length

    def batches(self, ids: Sequence[list[int]], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Which of the texts, and their ids, padded; texts of about one length go together."""
        order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = nn.utils.rnn.pad_sequence(
                [torch.tensor(ids[n]) for n in rows], batch_first=True, padding_value=PADDING
            )
            yield rows, batch.to(self.device)

    @torch.no_grad()
    def attention(self, text: str) -> tuple[Tensor, list[str]]:
        """Which pieces each piece attends to in the last block.

        Returns:
            The weights, the mean of the heads, (L, L), and the pieces.
        """
        from ..viz import capture_attention

        (ids,) = encode(self.tokenizer, [text], self.max_length)
        with capture_attention(self.model) as record:
            self.model(torch.tensor([ids], device=self.device))
        return record.last()[-1][0].mean(0), [str(self.tokenizer.id_to_token(n)) for n in ids]

    def picture(self, text: str, *, path: str | Path | None = None) -> "Figure":
        """`attention`, drawn."""
        from ..viz import plot_attention

        weights, pieces = self.attention(text)
        return plot_attention(weights, query_labels=pieces, key_labels=pieces, path=path)


def special_id(tokenizer: "Tokenizer", token: str) -> int:
    """The id of a token that the vocabulary must have.

    Raises:
        ValueError: it has not.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"tokenizer must have {token}, got a vocabulary without it")
    return int(found)


def encode(tokenizer: "Tokenizer", texts: Sequence[str], length: int | None = None) -> list[list[int]]:
    """The ids of each text between [CLS] and [SEP]; what makes them more than `length` is cut off."""
    cls, sep = special_id(tokenizer, _CLS), special_id(tokenizer, _SEP)
    room = None if length is None else length - 2
    found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [[cls, *encoding.ids[:room], sep] for encoding in found]


def read_tokenizer(folder: str | Path) -> "Tokenizer":
    """From the tokenizer.json of a folder, without the padding and cutting that it may prescribe.

    Raises:
        RecipeError: there is none.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise RecipeError(
            f"the folder {folder} must hold a model and {path.name}: a run's folder `model` does"
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_texts(texts: Sequence[str]) -> None:
    """Raises ValueError for one string in place of a list of them."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string")
