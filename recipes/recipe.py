"""What a recipe declares, and the list of all recipes. Listing is quick: no torch and no Lightning here."""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError, nearest
from .settings import Settings

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from matplotlib.figure import Figure
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The number that decides, with the bar that was fixed before the run.

    Args:
        name: in words, for the report.
        key: the task logs the value as "test/<key>".
        bar: what the mean over the seeds must reach.
        source: where the bar comes from.
        unit: behind the number.
        higher_is_better: False for errors and losses.
        paper: the paper's own number under its own conditions, where there is one to set beside ours.
        paper_source: the paper's table and conditions.
    """

    name: str
    key: str
    bar: float
    source: str
    unit: str = ""
    higher_is_better: bool = True
    paper: float | None = None
    paper_source: str = ""

    def met(self, value: float) -> bool:
        """Whether the value reaches the bar; NaN never does."""
        return value >= self.bar if self.higher_is_better else value <= self.bar

    def show(self, value: float) -> str:
        return f"{value:.2f} {self.unit}".rstrip()

    def show_bar(self) -> str:
        return f"{'≥' if self.higher_is_better else '≤'} {self.show(self.bar)}"


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """What one finished seed leaves: everything is JSON.

    Args:
        seed: of initialisation, order of the data, and all draws in training.
        value: the recipe's metric on the test data.
        metrics: all that the task logged in its test.
        history: name of a logged value -> one number an epoch.
        evidence: what the task collected in its test for the pictures, such as the confusion matrix.
        minutes: spent in training, over all sittings.
    """

    seed: int
    value: float
    metrics: dict[str, float]
    history: dict[str, list[float]]
    evidence: dict[str, Any]
    minutes: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a recipe's pictures are drawn from: the first seed's model, the data, and each seed's results."""

    model: "nn.Module"
    data: "LightningDataModule"
    seeds: tuple[SeedResult, ...]


def classification(model: "nn.Module", settings: Settings) -> "LightningModule":
    """The task of most recipes. It lives in its own file because it needs Lightning."""
    from .training import Classification

    return Classification(model, settings)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One paper's experiment: what is trained, on what, how, and which number must come out.

    Args:
        name: on the command line.
        title: one line.
        paper: the citation.
        model: a name that `create_model` knows.
        model_options: what it is created with besides; `--set model.<name>` comes after.
        data: called with the settings and the folder given by `--data`, or None.
        settings: the defaults; each can be changed by `--set`.
        metric: the number and its bar.
        task: makes the LightningModule (losses, steps, metrics, optimiser) around the model. Its test logs
            "test/<metric.key>"; a method `evidence()` may hand JSON to the pictures.
        figures: caption -> function that draws it.
        seeds: run where none are asked for.
        data_format: what `--data` takes; empty where the recipe takes none.
        bar_with_data: whether the bar is for the data of `--data`, which a committed result is then of; what
            a recipe has embedded only shows that it runs.
        notes: how this run differs from the paper's.
    """

    name: str
    title: str
    paper: str
    model: str
    data: "Callable[[Any, Path | None], LightningDataModule]"
    settings: Settings
    metric: Metric
    task: "Callable[[nn.Module, Settings], LightningModule]" = classification
    figures: "Mapping[str, Callable[[Outcome], Figure]]" = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1, 2, 3)
    data_format: str = ""
    bar_with_data: bool = False
    notes: str = ""


_recipes: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Puts a recipe on the list, and hands it back.

    Raises:
        ValueError: the name is taken.
    """
    if recipe.name in _recipes:
        raise ValueError(f"name must be new, a recipe {recipe.name!r} exists already")
    _recipes[recipe.name] = recipe
    return recipe


def list_recipes(pattern: str = "*") -> list[str]:
    """The names that match, sorted.

    Example:
        >>> from lamina.recipes import list_recipes
        >>> list_recipes("vit*")
        ['vit_digits']
    """
    return sorted(fnmatch.filter(_recipes, pattern))


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        RecipeError: there is none; the message names the nearest.
    """
    if name not in _recipes:
        raise RecipeError(f"no recipe {name!r}; {nearest(name, _recipes, 'recipes')}")
    return _recipes[name]
