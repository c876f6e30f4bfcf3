"""The benchmarks' own fixture: nothing is timed that is not equal, and what is timed is written down."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
spec = importlib.util.spec_from_file_location("benchmarks_conftest", FOLDER / "conftest.py")
assert spec is not None
assert spec.loader is not None
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)

BENCH = """
import torch

def bench_product(benchmark, benchmark_op):
    benchmark.group = "products"
    benchmark_op(torch.mm, [torch.randn(7, 5), torch.randn(5, 3)], backward=True, reference={reference},
                 flops=6 * 7 * 5 * 3)
"""


def run(folder: Path, reference: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text((FOLDER / "conftest.py").read_text())
    (folder / "bench_product.py").write_text(BENCH.format(reference=reference))
    (folder / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n")
    command = [sys.executable, "-m", "pytest", "-q", "--quick", *options, str(folder)]
    # In a worker of pytest-xdist pytest-benchmark times nothing; what a worker starts is none.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_writes_what_it_measured_with_device_and_versions(tmp_path):
    done = run(tmp_path, "lambda a, b: a @ b", f"--save-results={tmp_path / 'results'}")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "results").iterdir()
    version = torch.__version__.split("+")[0]
    assert file.name.startswith("product-")
    assert file.name.endswith(f"-torch{version}.json")
    written = json.loads(file.read_text())
    assert written["machine"]["versions"]["torch"] == torch.__version__
    (row,) = written["results"]
    assert "machine" not in row
    assert row["group"] == "products"
    assert 0 < row["min_ms"] <= row["median_ms"]
    assert row["flops_per_s"] == pytest.approx(6 * 7 * 5 * 3 / (row["median_ms"] / 1e3))
    assert 0 < row["of_flops_ceiling"] < 1
    assert row["peak_mb"] >= 0
    assert row["times_as_fast_as_reference"] > 0


def test_times_nothing_that_is_not_equal(tmp_path):
    done = run(tmp_path, "lambda a, b: a @ b * 1.01", f"--save-results={tmp_path / 'results'}")
    assert done.returncode == 1
    assert "not equal: relative error" in done.stdout
    assert not list((tmp_path / "results").iterdir())


def test_equality_is_relative_to_the_precision():
    exact = torch.randn(7, 5)
    conftest.check_equal([exact * (1 + 1e-6)], [exact])
    with pytest.raises(AssertionError, match="not equal"):
        conftest.check_equal([exact * (1 + 1e-3)], [exact])
    conftest.check_equal([exact.bfloat16() * 1.02], [exact.bfloat16()])
    with pytest.raises(AssertionError):
        conftest.check_equal([None], [exact])


def test_by_turns_is_how_many_times_as_fast():
    x = torch.randn(300, 300)

    def once() -> None:
        x @ x

    def thrice() -> None:
        x @ x
        x @ x
        x @ x

    assert conftest.by_turns(once, thrice, rounds=9) > 1 > conftest.by_turns(thrice, once, rounds=9)


def test_peak_memory_is_what_a_call_holds_at_once():
    x = torch.randn(256, 256)

    def call() -> None:
        ((x + 1) + 1) + 1  # two temporaries of 256 KiB live together

    assert conftest.peak_bytes(call) == pytest.approx(2 * x.numel() * 4, rel=0.01)
