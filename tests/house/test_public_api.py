"""What each folder offers is written down here: a name that comes, goes or changes is seen in review.

That the lists are sorted is ruff's RUF022: constants, then classes, then functions.
"""

import dataclasses
import importlib
import inspect
import re

import pytest
from house.tree import FOLDERS
from torch import nn

PUBLIC = {
    "kernels": [
        "Explanation",
        "additive_scores",
        "dot_product_attention",
        "explain",
        "operations",
        "use_backend",
    ],
    "layers": [
        "AdditiveAttention",
        "DropPath",
        "FeedForward",
        "GRUCell",
        "KeyValueCache",
        "LSTMCell",
        "LayerNorm2d",
        "LearnedPositions",
        "LearnedPositions2d",
        "MultiHeadAttention",
        "PatchEmbedding",
        "PixelNorm",
        "RNNCell",
        "Recurrent",
        "RecurrentCell",
        "RotaryPositions",
        "ScaleNorm",
        "SinusoidalPositions",
        "SinusoidalPositions2d",
        "StandardizedConv2d",
        "causal_mask",
        "mask_from_lengths",
        "mask_from_padding",
        "masked_softmax",
    ],
    "blocks": [
        "Bottleneck",
        "Decoder",
        "DecoderBlock",
        "DecoderBlockCache",
        "Encoder",
        "EncoderBlock",
        "ResNet",
    ],
    "models": [
        "Model",
        "RecurrentClassifier",
        "RecurrentClassifierConfig",
        "ViT",
        "ViTConfig",
        "create_model",
        "list_models",
        "model_config",
    ],
    "recipes": [
        "LSTM_DIGITS",
        "VIT_DIGITS",
        "ImageSettings",
        "Metric",
        "Outcome",
        "Recipe",
        "RecipeError",
        "SeedResult",
        "Settings",
        "classification",
        "get_recipe",
        "list_recipes",
        "override",
        "register",
    ],
    "viz": [
        "AttentionRecord",
        "ModuleRow",
        "attention_rollout",
        "capture_attention",
        "count_flops",
        "module_tree",
        "plot_attention",
        "plot_attention_over_images",
        "plot_confusion_matrix",
        "plot_learning_curves",
    ],
}
PARTS = [(folder, name) for folder in FOLDERS for name in PUBLIC[folder]]
MODULES = [
    (folder, name)
    for folder, name in PARTS
    if inspect.isclass(part := getattr(importlib.import_module(f"lamina.{folder}"), name, None))
    and issubclass(part, nn.Module)
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_names_are_frozen(folder):
    assert importlib.import_module(f"lamina.{folder}").__all__ == PUBLIC[folder]


@pytest.mark.parametrize(("folder", "name"), PARTS)
def test_each_public_name_has_a_docstring_of_its_own(folder, name):
    part = getattr(importlib.import_module(f"lamina.{folder}"), name)
    own = vars(part).get("__doc__") if inspect.isclass(part) else part.__doc__
    made_up = dataclasses.is_dataclass(part) and (own or "").startswith(f"{name}(")
    assert own, "no docstring"
    assert not made_up, "a dataclass's signature is no docstring"


@pytest.mark.parametrize(("folder", "name"), MODULES)
def test_each_module_says_its_shapes_and_its_source(folder, name):
    text = getattr(importlib.import_module(f"lamina.{folder}"), name).__doc__
    assert re.search(r"^ *Shape:$", text, re.M), "no Shape: section"
    assert re.search(r"^ *(Reference|Source)s?:$", text, re.M), "no Reference: or Source: section"
