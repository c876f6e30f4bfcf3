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
        "DistanceBias",
        "Explanation",
        "TableBias",
        "additive_attention",
        "additive_scores",
        "attentive_gru",
        "code_sums",
        "deformable_sampling",
        "dot_product_attention",
        "explain",
        "extract_glimpses",
        "local_attention",
        "low_rank_attention",
        "lsh_attention",
        "lsh_buckets",
        "lstm_sequence",
        "nearest_code",
        "operations",
        "packed_attention",
        "use_backend",
    ],
    "layers": [
        "AdditiveAttention",
        "AxialAttention",
        "AxialPositions",
        "ChunkedFeedForward",
        "ClassToken",
        "DeformableAttention",
        "DifferentiableAugmentation",
        "DropPath",
        "FeedForward",
        "FrozenBatchNorm2d",
        "GRUCell",
        "GaussianAttention",
        "GlimpseNetwork",
        "GlimpseSensor",
        "KeyValueCache",
        "LSHAttention",
        "LSTMCell",
        "LabelSmoothingLoss",
        "LayerNorm2d",
        "LearnedPositions",
        "LearnedPositions2d",
        "LengthProjection",
        "LocalAttention",
        "LowRankAttention",
        "Maxout",
        "MemoryHop",
        "MultiHeadAttention",
        "Packing",
        "PatchEmbedding",
        "PixelNorm",
        "PixelShuffleUpsample",
        "Quantized",
        "RNNCell",
        "Recurrent",
        "RecurrentCell",
        "RelativePositionBias",
        "RelativePositionBias2d",
        "Reversible",
        "ReversibleBlock",
        "RotaryPositions",
        "ScaleNorm",
        "SentenceEncoding",
        "SinusoidalPositions",
        "SinusoidalPositions2d",
        "SpectralConv2d",
        "SpectralLinear",
        "SqueezeExcitation",
        "StandardizedConv2d",
        "TemporalEncoding",
        "TokenEmbedding",
        "TokenNorm",
        "VectorQuantizer",
        "WindowAttention",
        "causal_mask",
        "freeze_batch_norms",
        "mask_from_lengths",
        "mask_from_padding",
        "masked_softmax",
        "memory_hops",
        "orthogonality_penalty",
        "pack",
        "temporal_noise_ages",
        "unpack",
        "window_mask",
    ],
    "blocks": [
        "Bottleneck",
        "Decoder",
        "DecoderBlock",
        "DecoderBlockCache",
        "Decoding",
        "Encoder",
        "EncoderBlock",
        "Generated",
        "MaskedTokenHead",
        "ResNet",
        "beam_search",
        "greedy_search",
    ],
    "models": [
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
    ],
    "recipes": [
        "BERT_MLM",
        "BERT_SST2",
        "LINFORMER_MLM",
        "LINFORMER_SPEED",
        "LINFORMER_SPEED_GPU",
        "LSTM_DIGITS",
        "REFORMER_DUPLICATION",
        "REFORMER_DUPLICATION_GPU",
        "REFORMER_MEMORY",
        "REFORMER_MEMORY_GPU",
        "SWAP_ATTENTION",
        "TRANSFORMER_COPY",
        "TRANSFORMER_TRANSLATION",
        "TRANSFORMER_TRANSLATION_GPU",
        "VIT_DIGITS",
        "Arm",
        "Bar",
        "Claim",
        "Comparison",
        "FineTuningSettings",
        "ImageSettings",
        "Metric",
        "Outcome",
        "Recipe",
        "RecipeError",
        "SeedResult",
        "SequenceSettings",
        "Settings",
        "TextSettings",
        "TranslationSettings",
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
        "attention_spectrum",
        "capture_attention",
        "count_flops",
        "module_tree",
        "plot_attention",
        "plot_attention_over_images",
        "plot_bars",
        "plot_confusion_matrix",
        "plot_learning_curves",
        "plot_lines",
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
