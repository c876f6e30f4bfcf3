"""The table of kernels says what the result files say, and nothing without one."""

import json

import pytest
from lamina import kernels
from lamina.recipes import RecipeError
from lamina.recipes.kernel_table import BEGIN, END, LINES, PAGE, Ratio, write_kernel_table
from lamina.recipes.speed import RESULTS

ROWS = [
    {"name": "b[lamina-7]", "group": "g", "median_ms": 2.0, "times_as_fast_as_reference": 3.0},
    {"name": "b[cdist-7]", "group": "g", "median_ms": 5.0, "times_as_fast_as_reference": 0.25},
    {"name": "b[cdist-7]", "group": "other", "median_ms": 50.0, "times_as_fast_as_reference": 0.1},
]


@pytest.mark.parametrize(("by", "expected"), [("ours", 3.0), ("peer", 4.0), ("medians", 2.5)])
def test_a_ratio_is_how_many_times_as_fast_ours_is(by, expected):
    assert Ratio("beside it", "g", "lamina", "cdist", by).of(ROWS) == expected
    assert Ratio("beside it", "g", "lamina", "another", by).of(ROWS) is None


def test_what_has_no_file_is_not_measured_and_the_rest_of_the_page_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nstale\n{END}\nbelow\n")
    text = write_kernel_table(page, tmp_path).read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "stale" not in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(LINES)
    assert all(row.endswith("not measured yet | not measured yet |") for row in rows)


def test_a_file_of_a_gpu_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(BEGIN + END)
    (tmp_path / "recurrent-NVIDIA-H100-torch2.13.0.json").write_text(json.dumps({}))
    rows = write_kernel_table(page, tmp_path).read_text().splitlines()
    assert {row.split("`")[1] for row in rows if "see Benchmarks" in row} == {
        "lstm_sequence",
        "attentive_gru",
    }


def test_a_page_without_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(RecipeError, match="must have the two marks"):
        write_kernel_table(page, tmp_path)
    assert page.read_text() == "no marks"


def test_every_operation_with_a_kernel_has_a_line():
    fused = {path.stem for path in (PAGE.parents[1] / "kernels" / "fused").glob("[a-z]*.py")}
    assert {line.operation for line in LINES} == (fused & set(kernels.__all__)) | {"packed_attention"}


def test_the_page_is_up_to_date_and_every_ratio_has_its_entries(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    assert write_kernel_table(page, RESULTS).read_text() == PAGE.read_text(), "lamina report --docs writes it"
    for line in LINES:
        (path,) = RESULTS.glob(f"{line.file}-cpu-*.json")
        rows = json.loads(path.read_text())["results"]
        for ratio in line.ratios:
            assert ratio.of(rows) is not None, ratio
