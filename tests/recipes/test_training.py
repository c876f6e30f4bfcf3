"""The usual task, the schedule, and a recipe that brings its own."""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from lamina.models import create_model
from lamina.recipes import RecipeError, SeedResult, Settings, get_recipe
from lamina.recipes import recipe as recipes
from lamina.recipes.training import (
    Classification,
    Hardware,
    accuracy,
    new_model,
    quiet,
    threads,
    warmup_then_cosine,
)


def test_the_schedule_rises_and_falls():
    factors = [warmup_then_cosine(step, 4, 24) for step in range(25)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[14] == pytest.approx(0.5)
    assert factors[24] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert warmup_then_cosine(0, 0, 10) == 1.0
    assert warmup_then_cosine(99, 0, 10) == pytest.approx(0.0)
    assert warmup_then_cosine(3, 3, 3) == pytest.approx(1.0)


def test_accuracy_is_the_share_on_the_diagonal():
    assert accuracy(torch.tensor([[3, 1], [0, 4]])) == 87.5


@pytest.fixture
def task():
    settings = Settings(
        epochs=5, learning_rate=0.25, weight_decay=0.125, warmup_epochs=1, label_smoothing=0.5
    )
    task = Classification(create_model("lstm_digits", hidden_dim=3), settings)
    task.log = lambda *args, **options: None
    return task


def test_the_optimiser_decays_matrices_only_and_trains_everything(task):
    task._trainer = type("Trainer", (), {"estimated_stepping_batches": 50})()
    configured = task.configure_optimizers()
    optimizer = configured["optimizer"]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter in task.parameters():
        assert decays.pop(id(parameter)) == (0.125 if parameter.ndim > 1 else 0.0)
    assert not decays
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        configured["lr_scheduler"]["scheduler"].step()
    assert configured["lr_scheduler"]["interval"] == "step"
    assert rates[10] == pytest.approx(0.25)
    assert rates[0] == pytest.approx(0.25 / 11)
    assert rates[11] < rates[10]


def test_the_loss_is_smoothed_in_training(task):
    task.eval()
    images, labels = torch.randn(7, 8, 8), torch.randint(10, (7,))
    log_p = task(images).log_softmax(-1)
    expected = -(0.5 * log_p[torch.arange(7), labels] + 0.5 * log_p.mean(-1)).mean()
    torch.testing.assert_close(task.training_step((images, labels), 0), expected)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with threads(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with threads(0):
        assert torch.get_num_threads() == before


def test_quiet_silences_lightning_alone():
    with warnings.catch_warnings(record=True) as heard, quiet():
        warnings.warn("ours", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["ours"]


def test_the_device_is_found():
    assert Hardware(accelerator="cpu").check() == "cpu"


def test_a_recipe_may_bring_its_own_task_and_metric(lamina, tmp_path, monkeypatch):
    """As a regression, a GAN or a detector will: another loss, another optimiser, lower is better."""

    class Regression(Classification):
        def training_step(self, batch, batch_idx):
            images, labels = batch
            return (self(images)[:, 0] - labels).abs().mean()

        def test_step(self, batch, batch_idx):
            images, labels = batch
            self.log("test/error", (self(images)[:, 0] - labels).abs().mean())

        def on_test_epoch_end(self):
            pass

        def evidence(self):
            return {"note": "nothing"}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.settings.learning_rate)

    recipe = get_recipe("lstm_digits")
    metric = replace(recipe.metric, name="error", key="error", unit="", bar=5.0, higher_is_better=False)
    own = replace(recipe, name="own", task=Regression, metric=metric, figures={}, seeds=(1,))
    monkeypatch.setitem(recipes._recipes, "own", own)
    words = ["reproduce", "own", "--set", "epochs=3", "--set", "learning_rate=0.1", "--out", tmp_path]
    answer = lamina(*words, "--accelerator", "cpu")
    assert (answer.status, answer.err) == (0, "")
    assert "bar ≤ 5.00: reached" in answer.out
    assert (tmp_path / "index.html").exists()


def test_a_seed_result_is_json(finished):
    import json

    (path,) = finished.glob("*/*/seed-1/result.json")
    result = SeedResult(**json.loads(path.read_text()))
    assert math.isfinite(result.value)
    assert result.history.keys() == {"train/loss", "val/loss", "val/accuracy"}
    assert 0 < result.minutes < 2  # minutes, not seconds


def test_a_recipe_that_is_wrong_itself_is_not_blamed_on_the_user():
    recipe = replace(get_recipe("lstm_digits"), model_options={"nope": 1})
    with pytest.raises(ValueError, match="nope"):
        new_model(recipe, {}, 1)
    with pytest.raises(RecipeError, match="nope"):
        new_model(get_recipe("lstm_digits"), {"nope": 1}, 1)


def test_a_model_is_made_with_the_recipes_options_and_then_the_users():
    recipe = replace(get_recipe("lstm_digits"), model_options={"hidden_dim": 5, "num_layers": 2})
    config = new_model(recipe, {"hidden_dim": 3}, 1).config
    assert (config.hidden_dim, config.num_layers) == (3, 2)


def test_the_seed_decides_the_first_weights():
    recipe = get_recipe("lstm_digits")
    one, same, other = (new_model(recipe, {}, seed).head.weight for seed in (1, 1, 2))
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.slow
def test_the_recipes_reach_their_bars(lamina, tmp_path):
    answer = lamina("reproduce", "vit_digits", "lstm_digits", "--accelerator", "cpu", "--out", tmp_path)
    assert (answer.status, answer.err) == (0, "")
