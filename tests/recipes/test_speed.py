"""The page of speeds says what the result files say."""

import json

import pytest
from lamina.recipes import RecipeError
from lamina.recipes.speed import write_speed

SAVED = {
    "machine": {"device": "cpu-2-threads", "cpu": "a processor", "versions": {"torch": "2.13.0"}},
    "results": [
        {"name": "bench_x[slow-7]", "group": "x 7", "median_ms": 3.0, "peak_mb": 1.5},
        {
            "name": "bench_x[fast-7]",
            "group": "x 7",
            "median_ms": 2.0,
            "peak_mb": 0.5,
            "times_as_fast_as_reference": 1.4,
        },
        {"name": "bench_y", "group": "y", "median_ms": 0.123456},
    ],
}


def test_each_entry_stands_beside_the_fastest_of_its_group(tmp_path):
    (tmp_path / "x-cpu-torch2.13.0.json").write_text(json.dumps(SAVED))
    text = write_speed(tmp_path / "page.md", tmp_path).read_text()
    assert "## x\n" in text
    assert "On a processor cpu-2-threads; torch 2.13.0." in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "Group" not in line]
    assert rows == [
        "| x 7 | fast-7 | 2 | 1.00 × | 1.4 | 0.5 |",
        "|  | slow-7 | 3 | 1.50 × |  | 1.5 |",
        "| y | bench_y | 0.123 | 1.00 × |  |  |",
    ]


def test_without_results_nothing_is_claimed(tmp_path):
    text = write_speed(tmp_path / "page.md", tmp_path / "nothing").read_text()
    assert "not measured yet" in text
    assert "## " not in text.replace("# Benchmarks", "", 1)


def test_outside_of_a_clone_it_says_so(tmp_path):
    with pytest.raises(RecipeError, match="docs are in a clone"):
        write_speed(tmp_path / "no" / "page.md", tmp_path)
