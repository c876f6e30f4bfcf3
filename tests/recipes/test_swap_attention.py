"""One model with four attentions, in small, and what a step of training costs."""

import json
from dataclasses import replace

import pytest
import torch
from lamina.models import create_model
from lamina.recipes import Comparison, SeedResult, get_recipe
from lamina.recipes import recipe as recipes
from lamina.recipes import step_costs as costs
from lamina.recipes.step_costs import StepCosts
from lamina.recipes.swap_attention import OTHERS

TINY = ["batches=3", "epochs=2", "batch_size=3", "length=16", "vocab_size=150"]
TINY += ["model.dim=12", "model.num_heads=2", "model.hidden_dim=7"]


def test_every_arm_is_the_same_model_but_for_its_attention():
    recipe = get_recipe("swap_attention")
    kinds, others = {}, []
    for name in ("", *recipe.arms):
        arm = recipe.arm(name)
        model = create_model(arm.model, **arm.model_options, device="meta")
        (kind,) = {type(block.attention).__name__ for block in model.bert.encoder.blocks}
        kinds[name] = kind
        others.append({n: p.shape for n, p in model.named_parameters() if ".attention." not in n})
    assert others == others[:1] * 4
    assert kinds == {"": "MultiHeadAttention"} | {name: layer["name"] for name, layer in OTHERS.items()}
    assert set(kinds.values()) == {"MultiHeadAttention", "LSHAttention", "LocalAttention", "LowRankAttention"}


def test_the_claim_is_of_the_worst():
    def seeds(loss):
        metrics = {"test/loss": loss}
        return (SeedResult(seed=1, value=loss, metrics=metrics, history={}, evidence={}, minutes=0),)

    found = Comparison(
        seeds=seeds(3.0),
        arms={name: seeds(4.0 + n) for n, name in enumerate(OTHERS)},
        baselines={"unigram": 8.0},
    )
    (claim,) = get_recipe("swap_attention").claims
    assert claim.value(found) == pytest.approx(100 * (1 - 6 / 8))
    assert claim.bar == 20
    assert claim.met(claim.value(found))


class Clock:
    def __init__(self, *times):
        self.times = list(times)

    def __call__(self):
        return self.times.pop(0)


def test_a_step_is_timed_and_its_memory_is_what_it_adds(monkeypatch):
    monkeypatch.setattr(costs, "clock", Clock(0, 1, 3.5, 4, 4.007, 5))
    step, logged, kept = StepCosts(), {}, []
    for index, size in enumerate((3 * 2**18, 1, 1)):
        step.on_train_batch_start(None, None, None, index)
        kept.append(torch.zeros(size))
        step.on_train_batch_end(None, None, None, None, index)
    step.on_train_batch_start(None, None, None, 0)  # the next epoch's first
    torch.zeros(2**19).sum()
    step.on_train_batch_end(None, None, None, None, 0)
    module = type("Module", (), {"log": lambda self, name, value: logged.update({name: value})})()
    step.on_test_epoch_end(None, module)
    assert logged["test/ms_per_step"] == pytest.approx((2500 + 7) / 2)  # the measured steps are not timed
    assert logged["test/peak_mb"] == pytest.approx(2, rel=1e-3)
    other = StepCosts()
    other.load_state_dict(step.state_dict())
    assert (other.milliseconds, other.peak_mb) == (step.milliseconds, step.peak_mb)


def test_an_error_within_a_measured_step_ends_the_measurement():
    step = StepCosts()
    step.on_train_batch_start(None, None, None, 0)
    step.on_exception(None, None, RuntimeError())
    step.on_train_batch_start(None, None, None, 0)  # a profiler that still ran would refuse another
    step.on_train_batch_end(None, None, None, None, 0)
    assert step.peak_mb >= 0


def test_a_report(tmp_path, lamina, short_text):
    words = [word for change in TINY for word in ("--set", change)]
    words += ["--data", short_text, "--accelerator", "cpu", "--out", tmp_path / "report"]
    answer = lamina("reproduce", "swap_attention", *words)
    (run,) = (tmp_path / "report" / "swap_attention").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["complete"], answer.err
    assert list(result["arms"]) == list(OTHERS)
    for seeds in result["results"], *result["arms"].values():
        metrics = seeds[0]["metrics"]
        assert metrics["test/ms_per_step"] > 0
        assert 0.01 < metrics["test/peak_mb"] < 20
    for picture in "side_by_side", "curves_by_attention":
        assert (run / f"{picture}.png").stat().st_size > 0


def test_costs_survive_a_resume(tmp_path, lamina, short_text, monkeypatch):
    alone = replace(get_recipe("swap_attention"), arms={}, claims=(), figures={})
    monkeypatch.setitem(recipes._recipes, "swap_attention", alone)
    words = [word for change in TINY for word in ("--set", change)]
    words += ["--data", short_text, "--accelerator", "cpu", "--out", tmp_path / "report"]
    command = "reproduce", "swap_attention", *words
    assert lamina(*command, "--max-minutes", "0").status == 3
    (run,) = (tmp_path / "report" / "swap_attention").iterdir()
    first = torch.load(run / "seed-1" / "last.ckpt", weights_only=True)["callbacks"]["StepCosts"]
    assert len(first["milliseconds"]) == 2  # of three steps the first is measured
    lamina(*command)
    last = torch.load(run / "seed-1" / "last.ckpt", weights_only=True)["callbacks"]["StepCosts"]
    assert last["milliseconds"][:2] == first["milliseconds"]
    assert len(last["milliseconds"]) == 4
