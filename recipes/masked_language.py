"""BERT's pre-training by masked tokens, and the language model that reads from the left alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from .bert_adam import bert_adam
from .errors import RecipeError
from .masking import IGNORED, Masked
from .settings import TextSettings
from .text_data import MASK, PADDING, SPECIAL, UNKNOWN, UNTOLD, TextData
from .text_models import TextModel, check_texts, encode, read_tokenizer, special_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..models import BertForPreTraining

SHOWN = 8
SMOOTHING = 5.0


class MaskedLanguage(LightningModule):
    """Cross entropy of masked tokens, by BERT's masks, optimiser and schedule.

    A batch is ids (B, L) of `TextData`. Training draws new masks for each batch; validation and test draw the
    same ones always, for every seed and every model. Losses are in nats a masked token.

    Args:
        model: (ids, places=) -> logits (B, P, V), or `PreTrainingLogits`; its `config` has `vocab_size` and
            `max_length`.
        settings: of the recipe.

    Reference:
        Devlin, Chang, Lee, Toutanova. BERT. NAACL 2019. Section 3.1 and appendix A.
    """

    def __init__(self, model: nn.Module, settings: TextSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def setup(self, stage: str) -> None:
        config: Any = self.model.config
        learned = self.data.tokenizer.get_vocab_size()
        for name, needed, known in (
            ("vocab_size", learned, config.vocab_size),
            ("length", self.data.length, config.max_length),
        ):
            if needed > known:
                option = "vocab_size" if name == "vocab_size" else "max_length"
                raise RecipeError(
                    f"{name} must be at most the model's {known}, got {needed}: --set model.{option}={needed}"
                )

    def logits(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
        """Scores of what each token is, at the places or at all of them."""
        out = self.model(ids, places=places)
        logits: Tensor = getattr(out, "tokens", out)
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        masked = self.data.hide(batch)
        asked = int((masked.labels != IGNORED).sum())
        loss = self.loss(self.logits(masked.ids, masked.places), masked.labels) / max(asked, 1)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=max(asked, 1))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluate("val", batch, batch_idx)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        masked, logits = self.evaluate("test", batch, batch_idx)
        if batch_idx == 0:
            self.shown = [self._show(masked, logits, row) for row in range(min(SHOWN, len(batch)))]

    def evaluate(self, part: str, batch: Tensor, batch_idx: int) -> tuple[Masked, Tensor]:
        """Logs the loss and the accuracy of the part's own masks."""
        masked = self.data.hide_fixed(batch, batch_idx)
        logits = self.told(batch, masked)
        asked = max(int((masked.labels != IGNORED).sum()), 1)
        right = (logits.argmax(-1) == masked.labels).sum()
        self.log(f"{part}/loss", self.loss(logits, masked.labels) / asked, batch_size=asked)
        self.log(f"{part}/accuracy", 100 * right / asked, batch_size=asked)
        return masked, logits

    def told(self, ids: Tensor, masked: Masked) -> Tensor:
        """What the model tells of the masked tokens, (B, P, V)."""
        return self.logits(masked.ids, masked.places)

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over the tokens asked for."""
        return F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def evidence(self) -> dict[str, Any]:
        return {"filled": self.shown}

    def configure_optimizers(self) -> Any:
        return bert_adam(self, self.settings)

    @property
    def data(self) -> TextData:
        data: TextData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def _show(self, masked: Masked, logits: Tensor, row: int) -> dict[str, Any]:
        """A block with its masks, what was there, and what the model says."""
        word = self.data.tokenizer.id_to_token
        asked = masked.labels[row] != IGNORED
        return {
            "text": self.data.tokenizer.decode(masked.ids[row].tolist(), skip_special_tokens=False),
            "was": [word(n) for n in masked.labels[row][asked].tolist()],
            "ours": [word(n) for n in logits[row].argmax(-1)[asked].tolist()],
        }


class LeftToRightLanguage(MaskedLanguage):
    """A language model, trained to tell each token from those before it, and asked for the masked ones alone.

    It reads the text without masks; its model's attention must be causal. Its losses in validation and test
    are those of the very tokens that `MaskedLanguage` is asked for.
    """

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        labels = batch[:, 1:].masked_fill((batch[:, 1:] == PADDING) | (batch[:, 1:] == UNKNOWN), IGNORED)
        asked = int((labels != IGNORED).sum())
        loss = self.loss(self.logits(batch)[:, :-1], labels) / max(asked, 1)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=max(asked, 1))
        return loss

    def told(self, ids: Tensor, masked: Masked) -> Tensor:
        return self.logits(ids, (masked.places - 1).clamp(min=0))  # no first token is ever masked


def unigram(data: TextData) -> float:
    """The test's loss of who knows how often each token is in the training part, and nothing else."""
    shares, losses = _shares(data), []
    for n, ids in enumerate(data.test_dataloader()):
        labels = data.hide_fixed(ids, n).labels
        losses.append(-shares.log()[labels[labels != IGNORED]])
    return float(torch.cat(losses).mean())


def neighbours(data: TextData) -> float:
    """The test's loss of who has counted pairs of neighbours in the training part, and nothing else.

    .. math:: p(w \\mid l, r) \\propto p(w \\mid l) \\, p(w \\mid r) / p(w)

    holds where the two neighbours are independent given w. Beside each neighbour `SMOOTHING` more pairs are
    taken to be there, of tokens as frequent as they are anywhere; so a masked neighbour tells nothing.
    """
    shares, train = _shares(data), data.parts["train"]
    pairs = torch.zeros(len(shares), len(shares))
    pairs.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), torch.ones(()), accumulate=True)

    def beside(counts: Tensor) -> Tensor:
        return (counts + SMOOTHING * shares) / (counts.sum(1, keepdim=True) + SMOOTHING)

    losses = []
    for n, ids in enumerate(data.test_dataloader()):
        masked = data.hide_fixed(ids, n)
        row, asked = (masked.labels != IGNORED).nonzero(as_tuple=True)
        places, labels = masked.places[row, asked], masked.labels[row, asked]
        seen = F.pad(masked.ids, (0, 1), value=PADDING)
        left, right = seen[row, places - 1], seen[row, places + 1]
        p = torch.where(shares > 0, beside(pairs[left]) * beside(pairs.T[right]) / shares, 0)
        losses.append((p.sum(1) / p[torch.arange(len(p)), labels]).log())
    return float(torch.cat(losses).mean())


def _shares(data: TextData) -> Tensor:
    """Of each token in the training part; each is counted once more, as some may be in the test alone."""
    known = data.tokenizer.get_vocab_size()
    counts = torch.bincount(data.parts["train"].flatten(), minlength=known).double() + 1
    counts[list(UNTOLD)] = 0
    return counts / counts.sum()


class Guess(NamedTuple):
    """What may stand in a mask's place.

    Args:
        piece: a word, or "##" and the rest of one.
        probability: of it.

    Example:
        >>> from lamina.recipes.masked_language import Guess
        >>> Guess("baker", 0.75).piece
        'baker'
    """

    piece: str
    probability: float


class MaskFiller(TextModel):
    """A pre-trained BERT with its vocabulary: texts with [MASK] in, the likeliest pieces out.

    Args:
        model: in evaluation mode.
        tokenizer: its vocabulary.

    Raises:
        ValueError: the tokenizer has not the special tokens, or more pieces than the model.

    Example:
        >>> from lamina.models import create_model
        >>> from lamina.recipes.masked_language import MaskFiller
        >>> from lamina.recipes.text_data import learn_word_pieces
        >>> pieces = learn_word_pieces(["the baker brings bread"], 60)
        >>> fill = MaskFiller(create_model("bert_tiny_pretraining", vocab_size=60).eval(), pieces)
        >>> [[len(guesses) for guesses in masks] for masks in fill(["the [MASK] [MASK]", "[MASK]"], top=3)]
        [[3, 3], [3]]
    """

    def __init__(self, model: "BertForPreTraining", tokenizer: "Tokenizer") -> None:
        super().__init__(model, tokenizer)
        self.mask_id = special_id(tokenizer, SPECIAL[MASK])

    @classmethod
    def from_folder(cls, folder: str | Path) -> "MaskFiller":
        """From the folder `model` of a finished run.

        Raises:
            RecipeError: it holds no model, or no vocabulary.
        """
        from ..models import BertForPreTraining

        tokenizer = read_tokenizer(folder)
        return cls(BertForPreTraining.from_pretrained(folder).eval(), tokenizer)

    @torch.no_grad()
    def __call__(
        self, texts: Sequence[str], *, top: int = 5, batch_size: int = 64
    ) -> list[list[list[Guess]]]:
        """For each text and each of its masks the likeliest pieces, the best first.

        Raises:
            ValueError: a text has no mask, or is longer than the model can read.
        """
        check_texts(texts)
        ids = encode(self.tokenizer, texts)
        for n, text in enumerate(ids):
            if self.mask_id not in text:
                raise ValueError(f"texts must each have a {SPECIAL[MASK]}, got {texts[n]!r}")
            if len(text) > self.max_length:
                raise ValueError(
                    f"texts must have at most {self.max_length - 2} pieces, got {len(text) - 2} in "
                    f"{texts[n]!r}"
                )
        found: list[list[list[Guess]]] = [[] for _ in ids]
        for rows, batch in self.batches(ids, batch_size):
            at = batch == self.mask_id
            # Each row's masks first; behind them, in a row that has fewer than another, any other tokens.
            places = at.int().argsort(dim=1, descending=True, stable=True)[:, : int(at.sum(1).max())]
            best = self.model(batch, places=places).tokens.float().softmax(-1).topk(top)
            for n, count, p, piece in zip(
                rows, at.sum(1).tolist(), best.values.tolist(), best.indices.tolist(), strict=True
            ):
                found[n] = [
                    [Guess(str(self.tokenizer.id_to_token(i)), q) for i, q in zip(*pair, strict=True)]
                    for pair in zip(piece[:count], p[:count], strict=True)
                ]
        return found
