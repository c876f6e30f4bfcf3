"""Recipes: one paper's experiment a file, trained by `lamina reproduce NAME`.

A file is found by itself, and its recipe is `get_recipe(name)`. Importing this imports no recipe's tools:
Lightning, matplotlib and scikit-learn come when something runs.
"""

from importlib import import_module

from .bert_mlm import BERT_MLM
from .bert_sst2 import BERT_SST2
from .discovery import recipe_modules
from .errors import RecipeError
from .linformer_mlm import LINFORMER_MLM
from .linformer_speed import LINFORMER_SPEED, LINFORMER_SPEED_GPU
from .lstm_digits import LSTM_DIGITS
from .recipe import (
    Arm,
    Bar,
    Claim,
    Comparison,
    Metric,
    Outcome,
    Recipe,
    SeedResult,
    classification,
    get_recipe,
    list_recipes,
    register,
)
from .reformer_duplication import REFORMER_DUPLICATION, REFORMER_DUPLICATION_GPU
from .reformer_memory import REFORMER_MEMORY, REFORMER_MEMORY_GPU
from .settings import (
    FineTuningSettings,
    ImageSettings,
    SequenceSettings,
    Settings,
    TextSettings,
    TranslationSettings,
    override,
)
from .swap_attention import SWAP_ATTENTION
from .transformer_copy import TRANSFORMER_COPY
from .transformer_translation import TRANSFORMER_TRANSLATION, TRANSFORMER_TRANSLATION_GPU
from .vit_digits import VIT_DIGITS

__all__ = [
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
]

for _module in recipe_modules():
    import_module(f".{_module}", __name__)
