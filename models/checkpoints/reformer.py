"""Reformer's published weights, with Hugging Face's names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base import Model
from ..reformer import ReformerConfig
from .mapping import Rule, fill
from .reading import read_tensors

_LAYER = r"(?:reformer\.)?encoder\.layers\.(\d+)\."
_RULES = [
    Rule(r"(?:reformer\.)?embeddings\.word_embeddings\.weight", "embedding.weight"),
    Rule(
        r"(?:reformer\.)?embeddings\.position_embeddings\.weights\.(\d+)",
        r"positions.weights.\1",
        lambda table: table.reshape(-1, table.shape[-1]),
    ),
    Rule(
        r"(?:reformer\.)?embeddings\.position_embeddings\.embedding\.weight",
        "positions.weight",
    ),
    Rule(_LAYER + r"attention\.layer_norm\.(weight|bias)", r"blocks.blocks.\1.first.norm.\2"),
    Rule(
        _LAYER + r"attention\.self_attention\.(query_key|query|key|value)\.weight",
        r"blocks.blocks.\1.first.layer.\2.weight",
    ),
    Rule(_LAYER + r"attention\.self_attention\.mask_value_\w+|.*\.self_mask_value_\w+", None),
    Rule(_LAYER + r"attention\.output\.dense\.weight", r"blocks.blocks.\1.first.layer.out.weight"),
    Rule(_LAYER + r"feed_forward\.layer_norm\.(weight|bias)", r"blocks.blocks.\1.second.norm.\2"),
    Rule(_LAYER + r"feed_forward\.dense\.dense\.(weight|bias)", r"blocks.blocks.\1.second.layer.up.\2"),
    Rule(_LAYER + r"feed_forward\.output\.dense\.(weight|bias)", r"blocks.blocks.\1.second.layer.down.\2"),
    Rule(r"(?:reformer\.)?encoder\.layer_norm\.(weight|bias)", r"norm.\1"),
    Rule(r"lm_head\.decoder\.weight", "head.weight"),
    Rule(r"lm_head\.bias", "head.bias"),
    Rule(r"lm_head\.decoder\.bias", None),  # in some files, a second name for it
]
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}


def load(family: type[Model], path: str | Path, **overrides: Any) -> Model:
    """A `Reformer` with the weights of a folder that Hugging Face's libraries have written.

    Hash rounds are theirs in all but the draws: they reseed the global stream for each call.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder holds another model, or a name or shape is left over.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the folder {path} holds no config.json")
    config = config_of(json.loads((path / "config.json").read_text()))
    fields = {name: overrides.pop(name) for name in list(overrides) if hasattr(config, name)}
    model = family(ReformerConfig(**vars(config) | fields), **overrides)
    load_state(model, read_tensors(path))
    return model


def load_state(model: Model, state: Mapping[str, Tensor]) -> None:
    """Fills a `Reformer`.

    Raises:
        ValueError: a name is left over on either side, or a shape differs.
    """
    seeds = [name for name in model.state_dict() if name.endswith("hash_seed")]
    fill(model, state, _RULES, optional=seeds)


def config_of(theirs: Mapping[str, Any]) -> ReformerConfig:
    """Ours, from the fields of Hugging Face's config.json.

    Raises:
        ValueError: it is of another kind of model, or the two kinds of attention differ in what ours shares.
    """
    if theirs.get("model_type", "reformer") != "reformer":
        raise ValueError(f"model_type must be 'reformer', got {theirs['model_type']!r}")
    for lsh, local in (
        ("lsh_attn_chunk_length", "local_attn_chunk_length"),
        ("lsh_num_chunks_after", "local_num_chunks_after"),
    ):
        if theirs[lsh] != theirs[local] and {"lsh", "local"} <= set(theirs["attn_layers"]):
            raise ValueError(f"{lsh} and {local} must be one number, got {theirs[lsh]} and {theirs[local]}")
    kind = "lsh" if "lsh" in theirs["attn_layers"] else "local"
    if theirs["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {theirs['hidden_act']!r}")
    buckets, axial = theirs["num_buckets"], theirs["axial_pos_embds"]
    return ReformerConfig(
        vocab_size=theirs["vocab_size"],
        dim=theirs["hidden_size"],
        depth=len(theirs["attn_layers"]),
        layers=tuple(theirs["attn_layers"]),
        num_heads=theirs["num_attention_heads"],
        head_dim=theirs["attention_head_size"],
        hidden_dim=theirs["feed_forward_size"],
        axial_shape=tuple(theirs["axial_pos_shape"]) if axial else None,
        axial_dims=tuple(theirs["axial_pos_embds_dim"]) if axial else None,
        max_length=theirs["max_position_embeddings"],
        chunk_size=theirs[f"{kind}_attn_chunk_length"],
        num_hashes=theirs["num_hashes"],
        num_buckets=tuple(buckets) if isinstance(buckets, list) else buckets,
        look_ahead=theirs[f"{kind}_num_chunks_after"],
        circular=True,
        is_causal=theirs["is_decoder"],
        chunk_feed_forward=theirs.get("chunk_size_feed_forward", 0),
        activation=_ACTIVATIONS[theirs["hidden_act"]],
        dropout=theirs["hidden_dropout_prob"],
        attention_dropout=theirs["lsh_attention_probs_dropout_prob"],
        norm_eps=theirs["layer_norm_eps"],
    )
