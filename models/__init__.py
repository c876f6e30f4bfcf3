"""Papers, assembled from blocks: one file each, made by name with `create_model`."""

from .base import Model
from .bert import (
    Bert,
    BertClassifier,
    BertClassifierConfig,
    BertConfig,
    BertForPreTraining,
    PreTrainingLogits,
)
from .linformer import Linformer, LinformerConfig
from .recurrent_classifier import RecurrentClassifier, RecurrentClassifierConfig
from .reformer import Reformer, ReformerConfig
from .registry import create_model, list_models, model_config
from .transformer import Transformer, TransformerConfig
from .vit import ViT, ViTConfig

__all__ = [
    "Bert",
    "BertClassifier",
    "BertClassifierConfig",
    "BertConfig",
    "BertForPreTraining",
    "Linformer",
    "LinformerConfig",
    "Model",
    "PreTrainingLogits",
    "RecurrentClassifier",
    "RecurrentClassifierConfig",
    "Reformer",
    "ReformerConfig",
    "Transformer",
    "TransformerConfig",
    "ViT",
    "ViTConfig",
    "create_model",
    "list_models",
    "model_config",
]
