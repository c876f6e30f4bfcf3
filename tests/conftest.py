"""What every test gets: seeded randomness, unwritten memory made visible, and the comparison of a kernel with
its definition."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported; a GPU run sets it to 0

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from lamina.kernels import backend, use_backend
from lamina.kernels.backend import Backend
from torch import Tensor

settings.register_profile(
    "lamina",
    deadline=None,
    max_examples=25,
    derandomize=os.environ.get("CI") == "true",  # CI replays one fixed set; elsewhere each run explores
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("lamina")


# `python -m pytest` puts the root on the path, where `kernels` would be the package that transformers looks
# for: it would import ours a second time, under that name, and register every operation again.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

KERNELS_DEVICE = "cuda" if os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and KERNELS_DEVICE == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and TRITON_INTERPRET=0"))
    if KERNELS_DEVICE == "cuda":  # tests that choose no device are for a CPU, where Triton is interpreted
        of_kernels = [item for item in items if item.path.is_relative_to(ROOT / "tests" / "kernels")]
        for_cpu = {item for item in of_kernels if "kernels_device" not in getattr(item, "fixturenames", ())}
        config.hook.pytest_deselected(items=list(for_cpu))
        items[:] = [item for item in items if item not in for_cpu]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a path says once, it says once a test: which tests have run before makes no difference."""
    monkeypatch.setattr(backend, "_told", set())


@pytest.fixture
def kernels_device() -> Iterator[str]:
    """Where Triton kernels run: what the test draws is there."""
    with torch.device(KERNELS_DEVICE):
        yield KERNELS_DEVICE


@pytest.fixture
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin hold NaN, so that a cell which a kernel forgets to write shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args, **kwargs) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return empty

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def compare(unwritten_memory_is_nan: None) -> Callable[..., None]:
    """Asserts that a path of an operation errs at most twice as much as its definition in the same dtype.

    Both are measured against the definition in float64: the output, and the gradient of every input that
    takes one, for a random cotangent. `terms` is the size of what cancels in a gradient, as all of it does in
    that of a softmax over one key: there the definition may be right by luck.
    """

    def run(
        operation: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        backend: Backend = "triton",
        *,
        terms: float = 0.0,
        **options,
    ) -> None:
        exact_inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        with use_backend("reference"):
            plain, exact = operation(*inputs, **options), operation(*exact_inputs, **options)
        with use_backend(backend):
            fast = operation(*inputs, **options)
        assert fast.dtype == plain.dtype
        assert fast.shape == exact.shape
        cotangent = torch.randn_like(exact)
        outcomes = []
        for output, of in (exact, exact_inputs), (plain, inputs), (fast, inputs):
            wanted = [t for t in of if t.requires_grad]
            outcomes.append([output, *torch.autograd.grad(output, wanted, cotangent.to(output.dtype))])
        names = ["output", *(f"gradient of input {i}" for i, t in enumerate(inputs) if t.requires_grad)]
        for name, truth, p, f in zip(names, *outcomes, strict=True):
            if truth.numel() == 0:
                continue
            floor = 4 * torch.finfo(p.dtype).eps * truth.abs().max().clamp(min=terms)
            allowed = 2 * (p.double() - truth).abs().max() + floor
            error = (f.double() - truth).abs().max()
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    return run
