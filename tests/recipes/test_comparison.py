"""A recipe with arms, baselines and claims, and one that measures: what is run, kept, resumed and shown."""

import json
from dataclasses import replace

import pytest
from lamina.models import create_model
from lamina.recipes import Arm, Claim, Comparison, Metric, Recipe, SeedResult, get_recipe
from lamina.recipes import recipe as recipes
from lamina.recipes.report import claims, others, read_runs, save_results, write_replications
from lamina.recipes.training import Classification

DIGITS = get_recipe("lstm_digits")
COMPARED = replace(
    DIGITS,
    name="compared",
    settings=replace(DIGITS.settings, epochs=1, threads=1),
    model_options={"hidden_dim": 5},
    metric=replace(DIGITS.metric, bar=1.0),
    arms={
        "slow": Arm(settings={"learning_rate": 1e-9}),
        "gru": Arm(
            model={"cell": "gru", "hidden_dim": 3}, task=lambda model, settings: Told(model, settings)
        ),
    },
    baselines={"chance": lambda data: 100 / len({int(label) for _, label in data.parts["train"]})},
    claims=(
        Claim(
            name="learning helps",
            value=lambda found: found.mean("accuracy") - found.mean("accuracy", "slow"),
            bar=-100.0,
            source="any",
            unit="%",
        ),
        Claim(
            name="too much",
            value=lambda found: found.mean("accuracy") - found.baselines["chance"],
            bar=1000.0,
            source="none",
            paper=3.0,
            paper_source="Table 9",
        ),
    ),
    seeds=(1, 2),
)


class Told(Classification):
    def evidence(self):
        return {"cell": self.model.config.cell}


@pytest.fixture
def listed(monkeypatch):
    def add(recipe: Recipe) -> Recipe:
        monkeypatch.setitem(recipes._recipes, recipe.name, recipe)
        return recipe

    return add


def read(out):
    (runs,) = read_runs(out).values()
    return runs[0]


def test_every_arm_runs_the_same_seeds_and_all_is_kept(lamina, listed, tmp_path):
    listed(COMPARED)
    answer = lamina("reproduce", "compared", "--accelerator", "cpu", "--out", tmp_path / "report")
    assert answer.status == 1  # the second claim is missed
    assert "seed 2, gru" in answer.out
    assert "too much" in answer.out
    result = read(tmp_path / "report")
    assert result["complete"]
    assert not result["met"]
    assert list(result["arms"]) == ["slow", "gru"]
    for seeds in result["results"], *result["arms"].values():
        assert [seed["seed"] for seed in seeds] == [1, 2]
    assert {seed["evidence"]["cell"] for seed in result["arms"]["gru"]} == {"gru"}
    assert result["baselines"] == {"chance": 10.0}
    assert [claim["met"] for claim in result["claims"]] == [True, False]
    mean = sum(seed["value"] for seed in result["results"]) / 2
    assert result["claims"][1]["value"] == pytest.approx(mean - 10)
    assert result["of_arms"]["slow"]["settings"] == {"learning_rate": 1e-9}
    assert result["of_arms"]["gru"]["model"]["config"]["cell"] == "gru"
    own = create_model(DIGITS.model, hidden_dim=5).num_parameters()
    assert result["model"]["parameters"] == result["of_arms"]["slow"]["model"]["parameters"] == own
    minutes = [seed["minutes"] for s in (result["results"], *result["arms"].values()) for seed in s]
    assert result["minutes"] == pytest.approx(sum(minutes))

    html = (tmp_path / "report" / "index.html").read_text()
    for text in "This run missed what was claimed besides", "too much", "Table 9", "chance", "10.00 %":
        assert text in html
    (path,) = save_results(tmp_path / "report", tmp_path / "kept")
    kept = json.loads(path.read_text())
    assert kept["arms"]["gru"][0].keys() == {"seed", "value", "minutes", "metrics"}
    page = write_replications(tmp_path / "page.md", tmp_path / "kept").read_text()
    assert "| `compared` |" in page
    assert "| too much | ≥ 1000.00 |" in page
    assert "| chance | 10.00 % | baseline |" in page


def test_an_interrupted_comparison_goes_on_with_the_arm_it_was_at(lamina, listed, tmp_path, monkeypatch):
    from lamina.recipes import run

    listed(COMPARED)
    command = "reproduce", "compared", "--accelerator", "cpu", "--out"
    lamina(*command, tmp_path / "whole")
    trained = []
    train = run.train_seed

    def cut_off(recipe, model, settings, data, seed, folder, **options):
        trained.append((model.config.cell, seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(recipe, model, settings, data, seed, folder, **options)

    monkeypatch.setattr(run, "train_seed", cut_off)
    assert lamina(*command, tmp_path / "cut").status == 130
    assert lamina(*command, tmp_path / "cut").status == 1
    assert trained == [*[("lstm", 1), ("lstm", 2)] * 2, ("lstm", 2), ("gru", 1), ("gru", 2)]
    whole, cut = read(tmp_path / "whole"), read(tmp_path / "cut")
    for name in "", "slow", "gru":
        one, other = ((r["arms"][name] if name else r["results"]) for r in (whole, cut))
        assert [seed["metrics"] for seed in one] == [seed["metrics"] for seed in other]


def test_an_arm_that_fits_nothing_is_told_before_anything_is_trained(lamina, listed, tmp_path):
    listed(replace(COMPARED, arms={"deep": Arm(model={"cell": "none"})}))
    answer = lamina("reproduce", "compared", "--accelerator", "cpu", "--out", tmp_path)
    assert "arm 'deep'" in answer.line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": lambda settings, seed: {}}, "either data to train on or measure"),
        ({"data": None}, "either data to train on or measure"),
        ({"data": None, "measure": lambda settings, seed: {}}, "has no arms or baselines"),
        ({"arms": {"../x": Arm()}}, "an arm is named by letters"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(COMPARED, **changes)


def test_a_recipe_may_measure(lamina, listed, tmp_path):
    def measure(settings, seed):
        import torch

        drawn = float(torch.rand(()))
        return {"metrics": {"test/ratio": settings.batch_size + seed}, "evidence": {"drawn": drawn}}

    listed(
        Recipe(
            name="measured",
            title="t",
            paper="p",
            model="lstm_digits",
            settings=DIGITS.settings,
            metric=Metric(name="a ratio", key="ratio", bar=8.0, source="s"),
            measure=measure,
            seeds=(1, 3),
        )
    )
    command = "reproduce", "measured", "--accelerator", "cpu", "--set", "batch_size=7", "--out"
    assert lamina(*command, tmp_path / "a").status == 0
    assert lamina(*command, tmp_path / "b").status == 0
    result, again = read(tmp_path / "a"), read(tmp_path / "b")
    assert result["value"] == 9.0
    drawn = [seed["evidence"]["drawn"] for seed in result["results"]]
    assert drawn == [seed["evidence"]["drawn"] for seed in again["results"]]  # each seed draws its own
    assert drawn[0] != drawn[1]


def test_what_a_measurement_found_is_kept(lamina, listed, tmp_path):
    listed(
        Recipe(
            name="measured",
            title="t",
            paper="p",
            model="lstm_digits",
            settings=DIGITS.settings,
            metric=Metric(name="a ratio", key="ratio", bar=8.0, source="s"),
            measure=lambda settings, seed: {"metrics": {"test/ratio": 9}, "evidence": {"table": [1, 2]}},
            seeds=(1,),
        )
    )
    lamina("reproduce", "measured", "--accelerator", "cpu", "--out", tmp_path)
    (path,) = save_results(tmp_path, tmp_path / "kept")
    assert json.loads(path.read_text())["results"][0]["evidence"] == {"table": [1, 2]}


def seed_result(seed, value):
    return SeedResult(
        seed=seed, value=value, metrics={"test/m": value}, history={}, evidence={"n": seed}, minutes=1.0
    )


def test_a_comparison_reads_the_arms():
    found = Comparison(
        seeds=(seed_result(1, 2.0), seed_result(2, 5.0)), arms={"other": (seed_result(1, 7.0),)}
    )
    assert found.mean("m") == 3.5
    assert found.values("m", "other") == [7.0]
    assert found.evidence() == [{"n": 1}, {"n": 2}]
    with pytest.raises(KeyError):
        found.values("m", "none")


def test_results_of_before_there_were_arms_are_shown():
    metric = {"name": "m", "bar": 1.0, "source": "s", "key": "m"}
    assert others({"metric": metric}) == []
    assert claims({"metric": metric}) == []
