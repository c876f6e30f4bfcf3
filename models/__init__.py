"""Papers, assembled from blocks: one file each, made by name with `create_model`."""

from .base import Model
from .recurrent_classifier import RecurrentClassifier, RecurrentClassifierConfig
from .registry import create_model, list_models, model_config
from .vit import ViT, ViTConfig

__all__ = [
    "Model",
    "RecurrentClassifier",
    "RecurrentClassifierConfig",
    "ViT",
    "ViTConfig",
    "create_model",
    "list_models",
    "model_config",
]
