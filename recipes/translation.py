"""Translation: the task that scores texts, and a trained model that translates them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import RecipeError
from .sequence_to_sequence import SequenceToSequence
from .translation_data import END, PADDING, START, TranslationData

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tokenizers import Tokenizer

    from ..models import Transformer

SHOWN = 8


class Translation(SequenceToSequence):
    """`SequenceToSequence`, whose test gives BLEU beside the exact matches, and some translations to read.

    BLEU is sacreBLEU's, of whole texts with their case against one reference (tokenizer 13a).
    """

    def on_test_start(self) -> None:
        self.texts: list[str] = []

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        written = self.write(batch[0])
        self.texts += [self.data.text(row) for row in written]

    def on_test_epoch_end(self) -> None:
        from sacrebleu import corpus_bleu

        references = self.data.references
        self.log("test/bleu", corpus_bleu(self.texts, [references]).score)
        same = sum(text == reference for text, reference in zip(self.texts, references, strict=True))
        self.log("test/exact_match", 100 * same / len(references))

    def evidence(self) -> dict[str, Any]:
        pairs = zip(self.texts, self.data.references, strict=True)
        return {"translations": [{"ours": ours, "reference": theirs} for ours, theirs in pairs][:SHOWN]}

    def setup(self, stage: str) -> None:
        known: int = self.model.config.vocab_size  # type: ignore[union-attr,assignment]
        learned = self.data.tokenizer.get_vocab_size()
        if learned > known:
            raise RecipeError(
                f"vocab_size must be at most the model's {known}, got {learned}: "
                f"--set model.vocab_size={learned}"
            )

    @property
    def data(self) -> TranslationData:
        data: TranslationData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data


class Translator:
    """A trained Transformer with its vocabulary: texts in, texts out.

    Args:
        model: in evaluation mode.
        tokenizer: of both languages, with the ids of `translation_data`.

    Example:
        >>> from lamina.models import create_model
        >>> from lamina.recipes.translation import Translator
        >>> from lamina.recipes.translation_data import learn_pieces
        >>> pieces = learn_pieces(["one two", "eins zwei"], 50)
        >>> translate = Translator(create_model("transformer_copy", vocab_size=50).eval(), pieces)
        >>> len(translate(["one", "two two"], max_length=3))
        2
    """

    def __init__(self, model: "Transformer", tokenizer: "Tokenizer") -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Translator":
        """From the folder `model` of a finished run.

        Raises:
            RecipeError: it holds no model, or no vocabulary.
        """
        from tokenizers import Tokenizer

        from ..models import Transformer

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise RecipeError(
                f"the folder {folder} must hold a model and {path.name}: a run's folder `model` does"
            )
        return cls(Transformer.from_pretrained(folder).eval(), Tokenizer.from_file(str(path)))

    def __call__(
        self,
        texts: Sequence[str],
        *,
        num_beams: int = 4,
        length_penalty: float = 0.6,
        max_length: int | None = None,
        batch_size: int = 64,
    ) -> list[str]:
        """The translation of each text, by beam search; texts of about one length go together."""
        if isinstance(texts, str):
            raise ValueError("texts must be a list of strings, got one string")
        ids = [self._source(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
        found = [""] * len(ids)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            source = nn.utils.rnn.pad_sequence(
                [torch.tensor(ids[n]) for n in rows], batch_first=True, padding_value=PADDING
            ).to(self.device)
            best = self.model.generate(
                source, num_beams=num_beams, length_penalty=length_penalty, max_length=max_length
            ).best
            for n, row in zip(rows, best.tolist(), strict=True):
                found[n] = str(self.tokenizer.decode(row, skip_special_tokens=True))
        return found

    @torch.no_grad()
    def alignment(self, text: str, translation: str | None = None) -> tuple[Tensor, list[str], list[str]]:
        """Which pieces of the source each piece of the target was written from.

        Args:
            text: the source.
            translation: of it; our own where it is not given.

        Returns:
            The last block's cross-attention, the mean of its heads, (T, S), and the pieces of target and
            source.
        """
        from ..viz import capture_attention

        translation = self([text])[0] if translation is None else translation
        source, target = self._source(text), [START, *self.tokenizer.encode(translation).ids, END]
        with capture_attention(self.model) as record:
            self.model(*(torch.tensor([ids], device=self.device) for ids in (source, target[:-1])))
        last = [calls[-1] for name, calls in record.items() if name.endswith("cross_attention")][-1]
        pieces = [[str(self.tokenizer.id_to_token(n)) for n in ids] for ids in (target[1:], source)]
        return last[0].mean(0), pieces[0], pieces[1]

    def picture(
        self, text: str, translation: str | None = None, *, path: str | Path | None = None
    ) -> "Figure":
        """`alignment`, drawn."""
        from ..viz import plot_attention

        weights, target, source = self.alignment(text, translation)
        return plot_attention(weights, query_labels=target, key_labels=source, path=path)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _source(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text).ids, END]
