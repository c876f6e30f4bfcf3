"""What a recipe declares, and the list of all recipes. Listing is quick: no torch and no Lightning here."""

import fnmatch
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError, nearest
from .settings import Settings

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from matplotlib.figure import Figure
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A number that must come out, with the bar that was fixed before the run.

    Args:
        name: in words, for the report.
        bar: what the number must reach.
        source: where the bar comes from.
        unit: behind the number.
        higher_is_better: False for errors and losses.
        paper: the paper's own number under its own conditions, where there is one to set beside ours.
        paper_source: the paper's table and conditions.
    """

    name: str
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
class Metric(Bar):
    """The number that decides: the mean over the seeds of what the task logs as "test/<key>".

    Args:
        key: of the logged value.
        **others: those of `Bar`.
    """

    key: str


@dataclass(frozen=True, kw_only=True)
class Claim(Bar):
    """What else must hold, such as a distance between two trainings.

    Args:
        value: the number, from all that the run has found.
        **others: those of `Bar`.
    """

    value: "Callable[[Comparison], float]"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Another training that the recipe's own is compared with: same seeds, same data, and what it changes.

    Args:
        settings: fields of the settings.
        model: options of `create_model`, beside the recipe's `model_options`.
        model_name: another model than the recipe's.
        task: another task than the recipe's.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    model_name: str | None = None
    task: "Callable[[nn.Module, Any], LightningModule] | None" = None


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
class Comparison:
    """All that a run has found, for claims and pictures. The arm "" is the recipe's own training.

    Args:
        seeds: the recipe's own results.
        arms: those of each arm, in the order of the seeds.
        baselines: values of the metric that took no training of ours.
    """

    seeds: tuple[SeedResult, ...]
    arms: Mapping[str, tuple[SeedResult, ...]] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)

    def of(self, arm: str = "") -> tuple[SeedResult, ...]:
        return self.arms[arm] if arm else self.seeds

    def values(self, key: str, arm: str = "") -> list[float]:
        """What was logged as "test/<key>", one number a seed."""
        return [result.metrics[f"test/{key}"] for result in self.of(arm)]

    def mean(self, key: str, arm: str = "") -> float:
        return statistics.fmean(self.values(key, arm))

    def evidence(self, arm: str = "") -> list[dict[str, Any]]:
        return [result.evidence for result in self.of(arm)]


@dataclass(frozen=True, kw_only=True)
class Outcome(Comparison):
    """What a recipe's pictures are drawn from.

    Args:
        model: of the recipe's own first seed; None where a recipe measures and trains nothing.
        data: as the training had it; None in the same case.
        **others: those of `Comparison`.
    """

    model: "nn.Module"
    data: "LightningDataModule"


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
        arms: name -> another training that this one is compared with.
        baselines: name -> function of the data that gives the metric's value without a training of ours.
        claims: what must hold besides the metric's bar.
        measure: in place of `data` and `task`, for a recipe that trains nothing: called with the settings and
            a seed, it gives {"metrics": {"test/<key>": number}, "evidence": JSON}.
        figures: caption -> function that draws it.
        seeds: run where none are asked for.
        data_format: what `--data` takes; empty where the recipe takes none.
        bar_with_data: whether the bar is for the data of `--data`, which a committed result is then of; what
            a recipe has embedded only shows that it runs.
        notes: how this run differs from the paper's.

    Raises:
        ValueError: it both trains and measures, or neither; or the name of an arm is not one of a folder.
    """

    name: str
    title: str
    paper: str
    model: str
    settings: Settings
    metric: Metric
    data: "Callable[[Any, Path | None], LightningDataModule] | None" = None
    task: "Callable[[nn.Module, Any], LightningModule]" = classification
    arms: Mapping[str, Arm] = field(default_factory=dict)
    baselines: "Mapping[str, Callable[[Any], float]]" = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    measure: Callable[[Any, int], dict[str, Any]] | None = None
    figures: "Mapping[str, Callable[[Outcome], Figure]]" = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1, 2, 3)
    data_format: str = ""
    bar_with_data: bool = False
    notes: str = ""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.measure is None):
            raise ValueError(f"recipe {self.name!r} must have either data to train on or measure, not both")
        if self.measure is not None and (self.arms or self.baselines):
            raise ValueError(f"recipe {self.name!r} measures, so that it has no arms or baselines")
        for arm in self.arms:
            if not re.fullmatch(r"[\w][\w .=-]*", arm):
                raise ValueError(f"an arm is named by letters, digits and -, got {arm!r}")

    def arm(self, name: str) -> "Recipe":
        """The recipe of an arm; of "" the recipe itself."""
        if not name:
            return self
        arm = self.arms[name]
        return replace(
            self,
            model=arm.model_name or self.model,
            model_options={**self.model_options, **arm.model},
            task=arm.task or self.task,
            arms={},
            baselines={},
            claims=(),
        )


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
