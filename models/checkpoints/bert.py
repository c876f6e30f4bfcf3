"""BERT's published weights: Hugging Face's names, old and new, and those of the authors' TensorFlow code."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base import Model
from ..bert import Bert, BertClassifier, BertClassifierConfig, BertConfig
from .mapping import Rule, fill
from .reading import read_tensors

_BLOCK = {
    r"attention\.self\.(query|key|value)": r"attention.\2",
    r"attention\.output\.dense": "attention.out",
    r"attention\.output\.LayerNorm": "attention_norm",
    r"intermediate\.dense": "feed_forward.up",
    r"output\.dense": "feed_forward.down",
    r"output\.LayerNorm": "feed_forward_norm",
}
_REST = {
    r"embeddings\.word_embeddings": "embedding",
    r"embeddings\.position_embeddings": "positions",
    r"embeddings\.token_type_embeddings": "segments",
    r"embeddings\.LayerNorm": "norm",
    r"pooler\.dense": "pooler",
}
_HEADS = {
    r"cls\.predictions\.transform\.dense": "head.transform",
    r"cls\.predictions\.transform\.LayerNorm": "head.norm",
    r"cls\.seq_relationship": "is_next",
    r"classifier": "classifier",
}

# In the authors' TensorFlow files, after slashes have become dots.
_TENSORFLOW = [
    (r"\.layer_(\d+)\.", r".layer.\1."),
    (r"^cls\.predictions\.output_bias$", "cls.predictions.bias"),
    (r"^(cls\.seq_relationship|classifier)\.output_weights$", r"\1.weight"),
    (r"^(cls\.seq_relationship|classifier)\.output_bias$", r"\1.bias"),
    (r"^output_weights$", "classifier.weight"),  # of a fine-tuned model
    (r"^output_bias$", "classifier.bias"),
    (r"(_embeddings)$", r"\1.weight"),
]

_SLOTS = re.compile(r"adam_[mv]$|^global_step$")  # what only training needs

_CONFIG = {
    "vocab_size": "vocab_size",
    "pad_token_id": "padding_id",
    "max_position_embeddings": "max_length",
    "type_vocab_size": "num_segments",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "layer_norm_eps": "norm_eps",
    "is_decoder": "is_causal",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def load(family: type[Model], path: str | Path, **overrides: Any) -> Model:
    """A model of `family` with the weights of a folder that Hugging Face's libraries have written.

    Args:
        family: `Bert`, `BertForPreTraining` or `BertClassifier`.
        path: the folder, with config.json (or the authors' bert_config.json) and the weights.
        **overrides: fields of the configuration; `attention=` for one thing, `num_classes` for another.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder holds another model, or a name or shape is left over. Heads that the file lacks
            keep their random start: the pooler, the second task's, the classifier's.
    """
    path = Path(path)
    found = [path / name for name in ("config.json", "bert_config.json") if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"the folder {path} holds no config.json")
    config = config_of(json.loads(found[0].read_text()))
    if family is BertClassifier:
        config = BertClassifierConfig(**vars(config))
    fields = {name: overrides.pop(name) for name in list(overrides) if hasattr(config, name)}
    model = family(type(config)(**vars(config) | fields), **overrides)
    load_state(model, read_tensors(path))
    return model


def config_of(theirs: Mapping[str, Any]) -> BertConfig:
    """Ours, from the fields of Hugging Face's config.json or the authors' bert_config.json.

    Raises:
        ValueError: it is of another kind of model.
    """
    if theirs.get("model_type", "bert") != "bert":
        raise ValueError(f"model_type must be 'bert', got {theirs['model_type']!r}")
    if theirs.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"position_embedding_type must be 'absolute', got {theirs['position_embedding_type']!r}"
        )
    # The authors' file has no epsilon; its "gelu" is their code's, the tangent's approximation.
    authors = "layer_norm_eps" not in theirs
    activation = theirs.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    ours = {our: theirs[their] for their, our in _CONFIG.items() if their in theirs}
    of_authors = "gelu_tanh" if authors and activation == "gelu" else _ACTIVATIONS[activation]
    return BertConfig(**ours, activation=of_authors)


def load_state(model: Model, state: Mapping[str, Tensor]) -> None:
    """Fills a `Bert`, `BertForPreTraining` or `BertClassifier`; the names may be of any of the formats.

    Raises:
        ValueError: a name is left over on either side, or a shape differs.
    """
    heads = {"head", "is_next", "classifier"}
    own = {name.split(".")[0] for name in model.state_dict()}
    prefix = "" if isinstance(model, Bert) else "bert."
    fill(
        model,
        dict(_as_hugging_face(name, tensor) for name, tensor in state.items() if not _SLOTS.search(name)),
        _rules(prefix),
        optional=(f"{prefix}pooler", "is_next", "classifier"),
        superfluous=tuple(heads - own),
    )


def _rules(prefix: str) -> list[Rule]:
    leaf = r"\.(?P<leaf>weight|bias)"
    bert = r"(?:bert\.)?"
    return [
        Rule(rf"{bert}embeddings\.position_ids", None),
        Rule(r"cls\.predictions\.decoder\..*", None),  # the embedding, and a second name for the bias
        *(
            Rule(
                rf"{bert}encoder\.layer\.(\d+)\.{theirs}{leaf}", rf"{prefix}encoder.blocks.\1.{ours}.\g<leaf>"
            )
            for theirs, ours in _BLOCK.items()
        ),
        *(Rule(rf"{bert}{theirs}{leaf}", rf"{prefix}{ours}.\g<leaf>") for theirs, ours in _REST.items()),
        *(Rule(rf"{theirs}{leaf}", rf"{ours}.\g<leaf>") for theirs, ours in _HEADS.items()),
        Rule(r"cls\.predictions\.bias", "head.bias"),
    ]


def _as_hugging_face(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """As today's files have it."""
    if name.endswith("/kernel"):
        tensor = tensor.T
    name = re.sub(r"(^|[./])(kernel|gamma)$", r"\1weight", name)
    name = re.sub(r"(^|[./])beta$", r"\1bias", name).replace("/", ".")
    for theirs, ours in _TENSORFLOW:
        name = re.sub(theirs, ours, name)
    return name, tensor
