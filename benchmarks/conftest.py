"""`benchmark_op`: times one implementation of an operation, after it has proved equal to another.

    pytest benchmarks                     everything that this machine can run
    pytest benchmarks --quick             fewer rounds, for a look
    pytest benchmarks --save-results      also writes benchmarks/results/<what>-<device>-torch<version>.json,
                                          or into the folder that is given as --save-results=FOLDER

Within one run the ratios are worth comparing; between machines nothing is.
"""

import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from lamina.recipes.machine import machine as where
from lamina.recipes.measuring import peak_bytes, seconds
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = Path(__file__).parent / "results"
# As in tests/conftest.py: transformers would take the root's `kernels` for a package of another make.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != RESULTS.resolve().parent.parent]
PEERS = (
    "torch",
    "triton",
    "transformers",
    "reformer-pytorch",
    "local-attention",
    "linformer",
    "axial-positional-embedding",
    "vector-quantize-pytorch",
    "numpy",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lamina")
    group.addoption("--quick", action="store_true", help="fewer rounds of each benchmark")
    group.addoption(
        "--save-results", nargs="?", const=str(RESULTS), metavar="FOLDER", help="write JSON files"
    )


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    options.benchmark_warmup = "on"
    options.benchmark_warmup_iterations = 2 if options.quick else 5
    options.benchmark_min_rounds = 5 if options.quick else 20
    options.benchmark_max_time = "0.2" if options.quick else "1.0"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(machine())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One file a benchmark file, written beside and renamed: a stopped run spoils no earlier result."""
    config = session.config
    if not config.option.save_results:
        return
    rows: dict[str, list[dict[str, Any]]] = {}
    for bench in config._benchmarksession.benchmarks:  # type: ignore[attr-defined]
        if bench.stats is None or not bench.stats.data:
            continue
        what = Path(bench.fullname.split("::")[0]).stem.removeprefix("bench_")
        row = {"name": bench.name, "group": bench.group, "median_ms": 1e3 * bench.stats.median}
        extra = {name: value for name, value in bench.extra_info.items() if name != "machine"}  # once a file
        row |= {"min_ms": 1e3 * bench.stats.min, "rounds": bench.stats.rounds, **extra}
        rows.setdefault(what, []).append(row)
    folder = Path(config.option.save_results)
    folder.mkdir(parents=True, exist_ok=True)
    for what, results in rows.items():
        device = machine()["device"].replace(" ", "-")
        path = folder / f"{what}-{device}-torch{torch.__version__.split('+')[0]}.json"
        beside = path.with_suffix(".part")
        saved = {"machine": machine(), "date": str(datetime.now(UTC).date()), "results": results}
        beside.write_text(json.dumps(saved, indent=1) + "\n")
        beside.replace(path)


def machine() -> dict[str, Any]:
    """The device and the versions that a number belongs to."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return found | {"device": properties.name, "memory_gb": round(properties.total_memory / 2**30)}
    return found | {"device": f"cpu-{torch.get_num_threads()}-threads", "cpu": where("cpu")["cpu"]}


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """What this machine reaches at best: FLOP/s of a large product, by dtype, bytes/s of a large copy."""
    n = 8192 if DEVICE == "cuda" else 1024
    a, b = torch.randn(n, n, device=DEVICE), torch.randn(n, n, device=DEVICE)
    source = torch.randn(2**26 if DEVICE == "cuda" else 2**24, device=DEVICE)
    target = torch.empty_like(source)
    product = min(seconds(lambda: torch.mm(a, b)) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    found = {"flops": 2 * n**3 / product, "bytes": 2 * 4 * source.numel() / copy}
    if DEVICE == "cuda":  # a CPU is not asked for bfloat16
        a, b = a.bfloat16(), b.bfloat16()
        found["flops of bfloat16"] = 2 * n**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(5))
    return found


@pytest.fixture
def benchmark_op(
    benchmark: Any, ceilings: dict[str, float], request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Times `operation(*inputs)`, forward or forward and backward, on the GPU where there is one.

    Args of the fixture's function:
        operation: takes the inputs, gives one tensor.
        inputs: tensors; they are moved to the device, and take gradients where `backward` is set.
        backward: whether the gradient of every input and of every one of `parameters` is computed too.
        parameters: of a module behind `operation`.
        reference: what must give the same output (and gradients) before anything is timed. The two are also
            timed by turns: on a machine with neighbours only such a ratio can be trusted.
        reference_parameters: of a module behind `reference`.
        flops, bytes_moved: of one call, for the rate that is reached and its part of the machine's ceiling.
    """

    def run(
        operation: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        *,
        backward: bool,
        parameters: Sequence[Tensor] = (),
        reference: Callable[..., Tensor] | None = None,
        reference_parameters: Sequence[Tensor] = (),
        flops: float | None = None,
        bytes_moved: float | None = None,
    ) -> None:
        placed = [t.detach().to(DEVICE).requires_grad_(backward and t.is_floating_point()) for t in inputs]
        wanted = [t for t in (*placed, *parameters) if t.requires_grad]
        with torch.no_grad():
            cotangent = torch.randn_like(operation(*placed))

        def outcome(of: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
            out = of(*placed)
            return [out, *(torch.autograd.grad(out, leaves, cotangent, allow_unused=True) if leaves else ())]

        def once(of: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
            if backward:
                outcome(of, leaves)
            else:
                with torch.no_grad():
                    of(*placed)

        def wait(of: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
            once(of, leaves)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        def call() -> None:
            wait(operation, wanted)

        inputs_only = [t for t in placed if t.requires_grad]
        if reference is not None:
            check_equal(outcome(operation, inputs_only), outcome(reference, inputs_only))
        call()
        one = seconds(call)
        rounds = 5 if request.config.option.quick else max(5, min(20, round(2 / one)))  # fewer of a slow call
        if reference is not None:
            leaves = [*inputs_only, *reference_parameters]
            ratio = by_turns(call, lambda: wait(reference, leaves), rounds)
            benchmark.extra_info["times_as_fast_as_reference"] = float(f"{ratio:.4g}")
        benchmark.extra_info["machine"] = machine()
        benchmark.extra_info["peak_mb"] = round(peak_bytes(call) / 2**20, 2)
        if one < 0.1:
            benchmark(call)
        else:
            benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        median = benchmark.stats.stats.median
        if DEVICE == "cuda":
            from triton.testing import do_bench

            # Its events stand around the call: waited for within them, they would time the launches too.
            median = do_bench(lambda: once(operation, wanted), return_mode="median") / 1e3
            benchmark.extra_info["event_ms"] = 1e3 * median
        for what, amount in ("flops", flops), ("bytes", bytes_moved):
            if amount is not None:
                ceiling = ceilings.get(
                    f"{what} of {str(placed[0].dtype).removeprefix('torch.')}", ceilings[what]
                )
                benchmark.extra_info[f"{what}_per_s"] = amount / median
                benchmark.extra_info[f"of_{what}_ceiling"] = round(amount / median / ceiling, 4)

    return run


def check_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Outputs and gradients agree to the precision of their dtype, relative to their size."""
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None and e.numel():
            error = (a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-12)
            assert error < 100 * torch.finfo(e.dtype).eps, f"not equal: relative error {error:.3g}"


def by_turns(call: Callable[[], None], other: Callable[[], None], rounds: int) -> float:
    """How many times as fast as `other` a call is: the median ratio of pairs timed one after the other."""
    repeat = max(1, round(2e-3 / max(min(seconds(call) for _ in range(3)), 1e-6)))  # 2 ms at the least

    def repeated(of: Callable[[], None]) -> float:
        return seconds(lambda: [of() for _ in range(repeat)])

    repeated(other)
    return statistics.median(repeated(other) / repeated(call) for _ in range(rounds))
