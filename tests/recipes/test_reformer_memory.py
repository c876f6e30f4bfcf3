"""What is measured of memory and time, in small, and what the claims ask of it."""

import pytest
from lamina.recipes import Comparison, SeedResult, get_recipe
from lamina.recipes.reformer_memory import MemorySettings, measure

SMALL = MemorySettings(depths=(2, 8), length=128, lengths=(64, 256), tokens=256, hashes=(2,), rounds=1)


@pytest.fixture(scope="module")
def measured():
    return measure(SMALL, 1)


def test_activations_grow_with_the_depth_only_where_they_are_kept(measured):
    metrics = measured["metrics"]
    assert metrics["test/reversible_ratio"] <= 1.2
    assert metrics["test/kept_ratio"] > 2
    assert metrics["test/activations_reversible_8"] < metrics["test/activations_kept_8"]


def test_a_step_with_its_own_parameters_holds_their_gradients_too(measured):
    """A block's parameters are less than its gradients on their way, and no more than twice as much."""
    metrics = measured["metrics"]
    block = 4 * (4 * 256 + 3 * 256**2 + 2 * 256 * 1024 + 256 + 1024) / 2**20
    grown = metrics["test/step_reversible_8"] - metrics["test/step_reversible_2"]
    assert 0.5 * 6 * block < grown < 2 * 6 * block


def test_every_length_is_timed_with_every_kind(measured):
    rows = measured["evidence"]["times"]
    assert [(row["length"], row["hashes"], row["batch"]) for row in rows] == [
        (64, 2, 4),
        (64, 0, 4),
        (256, 2, 1),
        (256, 0, 1),
    ]
    for row in rows:
        name = f"lsh_{row['hashes']}" if row["hashes"] else "full"
        assert measured["metrics"][f"test/us_a_token_{name}_{row['length']}"] == row["us_a_token"] > 0


def found(*growths: tuple[float, float]) -> Comparison:
    """A seed each: how LSH-2 and full attention grow."""

    def result(hashed, full):
        times = [
            {"length": length, "hashes": hashes, "us_a_token": 10 * (growth if length == 512 else 1)}
            for hashes, growth in ((2, hashed), (0, full))
            for length in (512, 64)
        ]
        metrics = {"test/kept_ratio": 3.5}
        return SeedResult(
            seed=1, value=0.0, metrics=metrics, history={}, evidence={"times": times}, minutes=0
        )

    return Comparison(seeds=tuple(result(*growth) for growth in growths))


def test_claims_are_of_the_growth():
    claims = get_recipe("reformer_memory").claims
    values = [claim.value(found((1.4, 5.0), (1.2, 4.0), (9.0, 6.0))) for claim in claims]
    assert values == pytest.approx([3.5, 1.4, 5.0])
    assert [claim.met(value) for claim, value in zip(claims, values, strict=True)] == [True] * 3
    assert [claim.bar for claim in claims] == [2.0, 1.5, 2.0]
    assert not claims[1].met(claims[1].value(found((1.6, 5.0))))
    assert not claims[2].met(claims[2].value(found((1.4, 1.9))))
    assert get_recipe("reformer_memory").metric.bar == 1.2


def test_what_is_not_measured_is_not_claimed():
    claim = get_recipe("reformer_memory_gpu").claims[-2]
    assert "LSH-8" in claim.name
    assert not claim.met(claim.value(found((1.0, 5.0))))


def test_a_report_is_written_of_what_is_measured(tmp_path, lamina):
    changes = ["depths=(1, 2)", "length=64", "lengths=(64, 256)", "tokens=256", "hashes=(2,)", "rounds=1"]
    words = [word for change in changes for word in ("--set", change)]
    lamina("reproduce", "reformer_memory", *words, "--seed", "1", "--out", tmp_path)
    (run,) = (tmp_path / "reformer_memory").iterdir()
    for picture in "memory_over_the_depth", "time_over_the_length":
        assert (run / f"{picture}.png").stat().st_size > 0
