"""The Linformer's two experiments in small: what is measured, what the claims ask, and a run of each."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from lamina.models import create_model
from lamina.recipes import Arm, Comparison, SeedResult, get_recipe
from lamina.recipes import recipe as recipes
from lamina.recipes.linformer_speed import (
    MEMORY_SAVED,
    RANKS,
    TIME_SAVED,
    LengthSettings,
    cells,
    measure,
    paper,
)
from lamina.recipes.text_data import TextData
from lamina.viz import attention_spectrum, capture_attention

SMALL = LengthSettings(lengths=(16, 64), ranks=(8, 16, 32), depth=1, dim=64, tokens=32, rounds=3)


def found(**metrics: float) -> Comparison:
    seed = SeedResult(
        seed=1,
        value=0.0,
        metrics={f"test/{k}": v for k, v in metrics.items()},
        history={},
        evidence={},
        minutes=0,
    )
    return Comparison(seeds=(seed,))


def by_name(recipe: str) -> dict:
    return {claim.name: claim for claim in get_recipe(recipe).claims}


@pytest.fixture(scope="module")
def measured():
    return measure(SMALL, 1)


def test_the_papers_table_is_whole():
    """A rank up to half of the length has both numbers, a larger one none; all fall with the rank."""
    for table in TIME_SAVED, MEMORY_SAVED:
        assert list(table) == [2**n for n in range(9, 17)]
        for length, row in table.items():
            there = [value for value in row if value is not None]
            assert len(there) == sum(2 * rank <= length for rank in RANKS)
            assert None not in row[: len(there)]
            assert all(a >= b for a, b in pairwise(there))
    assert paper(TIME_SAVED, 4096, 128) == 3.4
    assert paper(MEMORY_SAVED, 65536, 2048) == 18
    assert paper(TIME_SAVED, 512, 512) is paper(TIME_SAVED, 64, 128) is None


def test_each_cell_is_measured_against_both_kinds_of_attention(measured):
    table = [(16, 8), (64, 8), (64, 16), (64, 32)]
    assert list(cells(SMALL)) == table
    rows = measured["evidence"]["cells"]
    assert {(row["length"], row["rank"], row["full"]) for row in rows} == {
        (*cell, full) for cell in table for full in ("written out", "fused")
    }
    assert len(rows) == 8
    for row in rows:
        assert row["batch"] == {16: 2, 64: 1}[row["length"]]
        key = f"_{row['length']}_{row['rank']}"
        kind = "" if row["full"] == "written out" else "fused_"
        for name in "time_saved", "memory_saved":
            assert measured["metrics"][f"test/{kind}{name}{key}"] == row[name] > 0
        assert row["memory_saved"] == pytest.approx(row["full_mb"] / row["linformer_mb"])


def test_scores_that_are_written_out_are_what_the_memory_is_saved_of():
    """At n = 1024 the n² scores outweigh all else, and hardly show where attention is fused."""
    saved = measure(LengthSettings(lengths=(1024,), ranks=(32,), depth=1, dim=64, rounds=1), 1)["metrics"]
    assert saved["test/memory_saved_1024_32"] > 3
    assert saved["test/fused_memory_saved_1024_32"] < 1.5


def test_operations_are_counted_as_by_the_formula(measured):
    assert measured["metrics"]["test/flops_off"] == 0
    flops = {(row["length"], row["rank"]): row for row in measured["evidence"]["flops"]}
    assert list(flops) == list(cells(SMALL))
    # By hand, at n = 64 and k = 8: products of n x C with C x C, of n x n with n x C, and so on.
    n, k, c = 64, 8, 64
    projections, scores, feed_forward = 2 * n * c * c, 2 * n * n * c, 2 * n * c * 4 * c
    assert flops[64, 8]["full_counted"] == 4 * projections + 2 * scores + 2 * feed_forward
    mixed = 2 * k * n * c + 2 * k * n + 2 * (2 * k * c * c)
    assert flops[64, 8]["linformer_counted"] == (
        2 * projections + mixed + 2 * (2 * n * k * c) + 2 * feed_forward
    )


def test_the_bars_are_those_of_the_issue():
    recipe = get_recipe("linformer_speed")
    assert (recipe.metric.key, recipe.metric.bar, recipe.metric.paper) == ("time_saved_4096_128", 2.5, 3.4)
    claims = by_name("linformer_speed")
    one, two = (claims[f"time saved at n = {n}, k = 128"] for n in (1024, 2048))
    assert (one.bar, one.paper, two.bar, two.paper) == (1.2, 1.7, 1.8, 2.6)
    saved = found(time_saved_1024_128=1.5, time_saved_2048_128=1.7, time_saved_4096_128=1.6)
    assert (one.met(one.value(saved)), two.met(two.value(saved))) == (True, False)
    (rises,) = (claim for name, claim in claims.items() if "rises" in name)
    assert rises.value(saved) == pytest.approx(1.6 / 1.7)
    assert not rises.met(rises.value(saved))
    gpu = get_recipe("linformer_speed_gpu")
    assert (gpu.metric.key, gpu.metric.bar) == ("rank_correlation", 0.95)
    assert [claim.bar for claim in gpu.claims] == [2.0, 0.0]
    assert list(cells(gpu.settings)) == [
        (n, k) for n, row in TIME_SAVED.items() for k, saved in zip(RANKS, row, strict=True) if saved
    ]


def test_a_table_is_set_beside_the_papers():
    from lamina.recipes.linformer_speed import _beside_the_paper

    def row(n, k, saved, full="written out"):
        return {"length": n, "rank": k, "time_saved": saved, "full": full}

    beside = _beside_the_paper(
        [row(512, 128, 3.0), row(1024, 128, 1.7), row(2048, 128, 5.2), row(2048, 128, 99.0, "fused")]
    )
    assert beside["test/largest_factor"] == pytest.approx(2)
    assert beside["test/rank_correlation"] == pytest.approx(
        0.5, rel=1e-5
    )  # in float32; ranks 2 1 3 beside 1 2 3
    assert _beside_the_paper([row(512, 128, 3.0)]) == {}
    stats = pytest.importorskip("scipy.stats")
    table = [
        (n, k, saved) for n, line in TIME_SAVED.items() for k, saved in zip(RANKS, line, strict=True) if saved
    ]
    ours = torch.rand(len(table)).mul(5).round().add(1).tolist()  # with ties, as the paper's
    beside = _beside_the_paper([row(n, k, x) for (n, k, _), x in zip(table, ours, strict=True)])
    expected = stats.spearmanr(ours, [saved for *_, saved in table]).statistic
    assert beside["test/rank_correlation"] == pytest.approx(expected)


def test_what_does_not_fit_is_left_out(monkeypatch):
    from lamina.recipes import measuring

    peaks = measuring.peak_bytes
    calls = []

    def full(call):
        calls.append(call)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return peaks(call)

    monkeypatch.setattr(measuring, "peak_bytes", full)
    rows = measure(LengthSettings(lengths=(32,), ranks=(8,), depth=1, dim=64, rounds=1), 1)["evidence"][
        "cells"
    ]
    assert [row["full"] for row in rows] == ["fused"]


def test_a_report_of_the_speed(tmp_path, lamina):
    changes = ["lengths=(1024, 2048, 4096)", "ranks=(128,)", "depth=1", "dim=64", "rounds=1"]
    words = [word for change in changes for word in ("--set", change)]
    answer = lamina("reproduce", "linformer_speed", *words, "--seed", "1", "--out", tmp_path)
    (run,) = (tmp_path / "linformer_speed").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["complete"], answer.err
    assert len(result["claims"]) == 5
    assert (run / "saved_over_the_length.png").stat().st_size > 0


TINY = ["batches=3", "epochs=2", "batch_size=3", "length=16", "vocab_size=150"]
TINY += ["model.dim=12", "model.num_heads=3", "model.hidden_dim=7", "model.max_length=16"]


def test_a_report_of_the_ranks(tmp_path, lamina, short_text, monkeypatch):
    recipe = get_recipe("linformer_mlm")
    small = replace(
        recipe,
        model_options=recipe.model_options | {"rank": 8},
        arms={"k=4": Arm(model={"rank": 2}), "full attention": recipe.arms["full attention"]},
    )
    monkeypatch.setitem(recipes._recipes, "linformer_mlm", small)
    words = [word for change in TINY for word in ("--set", change)]
    words += ["--data", short_text, "--accelerator", "cpu", "--out", tmp_path / "report"]
    answer = lamina("reproduce", "linformer_mlm", *words)
    (run,) = (tmp_path / "report" / "linformer_mlm").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["complete"], answer.err
    for picture in "curves_by_rank", "loss_over_the_rank", "spectrum_of_full_attention":
        assert (run / f"{picture}.png").stat().st_size > 0
    own, two, full = (
        result[a][0] if a == "results" else result["arms"][a][0] for a in ("results", "k=4", "full attention")
    )
    losses = [seed["metrics"]["test/loss"] for seed in (own, two, full)]
    claims = {claim["name"]: claim["value"] for claim in result["claims"]}
    assert claims["cross entropy at k = 16 above that of full attention"] == pytest.approx(
        losses[0] - losses[2]
    )
    assert claims["cross entropy that is gained from k = 4 to k = 16"] == pytest.approx(losses[1] - losses[0])
    shares = torch.tensor(full["evidence"]["spectrum"])
    assert shares.shape == (2, 3, 16)  # layers, heads, singular values
    quarter = shares[:, :, 3].mean().item()
    assert full["metrics"]["test/top_quarter"] == pytest.approx(quarter, abs=1e-3)
    assert (
        claims["share of the largest n / 4 singular values of full attention's matrices"]
        == (full["metrics"]["test/top_quarter"])
    )
    # The low-rank arm's matrices have no more than its rank of them.
    assert torch.tensor(two["evidence"]["spectrum"])[..., 1].min() > 0.999

    # The same from outside: the model that was kept, and the same masks of the test's first batch.
    model = type(create_model("linformer_small")).from_pretrained(run / "model").eval()
    data = TextData(short_text, length=16, batch_size=3, vocab_size=150)
    data.setup("test")
    masked = data.hide_fixed(next(iter(data.test_dataloader())), 0)
    with torch.no_grad(), capture_attention(model) as record:
        model(masked.ids, places=masked.places)
    for layer, weights in zip(torch.tensor(own["evidence"]["spectrum"]), record.last(), strict=True):
        torch.testing.assert_close(layer, attention_spectrum(weights), atol=1e-4, rtol=0)
