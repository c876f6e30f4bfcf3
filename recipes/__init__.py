"""Recipes: one paper's experiment a file, trained by `lamina reproduce NAME`.

Importing this imports no recipe's tools: Lightning, matplotlib and scikit-learn come when something runs.
"""

from .errors import RecipeError
from .lstm_digits import LSTM_DIGITS
from .recipe import Metric, Outcome, Recipe, SeedResult, classification, get_recipe, list_recipes, register
from .settings import ImageSettings, SequenceSettings, Settings, TranslationSettings, override
from .transformer_copy import TRANSFORMER_COPY
from .transformer_translation import TRANSFORMER_TRANSLATION
from .vit_digits import VIT_DIGITS

__all__ = [
    "LSTM_DIGITS",
    "TRANSFORMER_COPY",
    "TRANSFORMER_TRANSLATION",
    "VIT_DIGITS",
    "ImageSettings",
    "Metric",
    "Outcome",
    "Recipe",
    "RecipeError",
    "SeedResult",
    "SequenceSettings",
    "Settings",
    "TranslationSettings",
    "classification",
    "get_recipe",
    "list_recipes",
    "override",
    "register",
]
