"""The list of recipes, and the metric with its bar."""

import subprocess
import sys

import pytest
from lamina.models import list_models
from lamina.recipes import Metric, Recipe, RecipeError, get_recipe, list_recipes, register
from lamina.recipes.discovery import recipe_modules


def test_the_list():
    assert list_recipes() == sorted(list_recipes())
    assert len(list_recipes()) >= len(recipe_modules())  # a file may register several
    assert list_recipes("*_digits") == ["lstm_digits", "vit_digits"]
    assert list_recipes("vit*") == ["vit_digits"]


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_declares_all_that_the_report_shows(name):
    recipe = get_recipe(name)
    assert recipe.name == name
    assert recipe.model in list_models()
    assert len(recipe.seeds) >= 3 or recipe.bar_with_data  # where a seed takes minutes, not an hour
    for declared in (recipe.title, recipe.paper, recipe.metric.source, recipe.figures):
        assert declared
    assert recipe.measure or recipe.data_format or recipe.data(recipe.settings, None)


def test_the_bars_are_those_of_the_issue():
    assert (get_recipe("vit_digits").metric.bar, get_recipe("lstm_digits").metric.bar) == (97.0, 96.0)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="no recipe 'vit_digit'; did you mean vit_digits"):
        get_recipe("vit_digit")


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="a recipe 'vit_digits' exists already"):
        register(get_recipe("vit_digits"))


@pytest.mark.parametrize(("higher", "value", "met"), [
    (True, 97.0, True),
    (True, 96.99, False),
    (True, float("nan"), False),
    (False, 97.0, True),
    (False, 97.01, False),
    (False, float("nan"), False),
])  # fmt: skip
def test_a_bar_is_met_by_what_reaches_it(higher, value, met):
    metric = Metric(name="m", key="m", bar=97.0, source="here", higher_is_better=higher)
    assert metric.met(value) is met


def test_a_metric_is_shown_with_unit_and_side():
    metric = Metric(name="error", key="e", bar=3, unit="mm", source="here", higher_is_better=False)
    assert metric.show(2.555) == "2.56 mm" or metric.show(2.555) == "2.55 mm"
    assert metric.show_bar() == "≤ 3.00 mm"


def test_listing_needs_neither_torch_nor_lightning():
    code = (
        "import sys, lamina.recipes as r; r.list_recipes(); "
        "heavy = {'torch', 'numpy', 'lightning', 'matplotlib', 'sklearn', 'rich', 'typer', 'jinja2'}; "
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_recipe_is_one_object():
    recipe = Recipe(
        name="tiny",
        title="t",
        paper="p",
        model="m",
        data=lambda settings, folder: None,
        settings=get_recipe("vit_digits").settings,
        metric=get_recipe("vit_digits").metric,
    )
    assert recipe.seeds == (1, 2, 3)
    assert "tiny" not in list_recipes()  # only `register` lists it
