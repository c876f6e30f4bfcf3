"""Which implementation of an operation runs: its definition, the fastest PyTorch, or the Triton kernel.

An operation tells for each path why it cannot (or should not) take a call: its refusals. The first
path that is not refused runs, in the order Triton, PyTorch, definition. The definition is never
refused, so a call always finds a path; `explain` tells which, and why not the others.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

Backend = Literal["reference", "torch", "triton"]
Refusals = dict[Backend, str]

_ORDER: tuple[Backend, ...] = ("triton", "torch", "reference")
_HAS_TRITON = find_spec("triton") is not None
_forced: Backend | None = (
    None  # a plain global: torch.compile reads and guards it, a ContextVar breaks its graph
)
_refusals_of: dict[Callable[..., Any], Callable[..., Refusals]] = {}
_told: set[tuple[str, str]] = set()

Operation = TypeVar("Operation", bound=Callable[..., Any])


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Within the block every operation runs on `backend`, whatever the device. One setting for all threads.

    An operation whose `backend` path cannot take a call says so once, as a warning, and runs the next path.

    Args:
        backend: "reference" (the definition), "torch" (PyTorch's fastest), or "triton" (the fused kernel).

    Raises:
        ValueError: there is no backend of that name.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> Backend | None:
    """The backend that `use_backend` has set, or None outside of it."""
    return _forced


def operation(refusals: Callable[..., Refusals]) -> Callable[[Operation], Operation]:
    """Declares a public operation. `refusals` takes its arguments and tells why each refused path is."""

    def declare(function: Operation) -> Operation:
        _refusals_of[function] = refusals
        return function

    return declare


def operations() -> dict[str, Callable[..., Any]]:
    """Every declared operation by its name."""
    return {function.__name__: function for function in _refusals_of}


def choose(name: str, refusals: Mapping[Backend, str]) -> Backend:
    """The path that a call of operation `name` takes, given why some refuse it."""
    if _forced is not None and _forced in refusals:
        _tell_once(name, _forced, refusals[_forced])
    return _first(refusals)


def triton_refusal(*tensors: Tensor) -> str | None:
    """Why Triton kernels cannot run on these tensors at all, or None where they can."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if forward_derivatives(*tensors):
        return "forward-mode derivatives are taken, which a registered kernel would silently answer with zero"
    if functional_derivatives():
        return "torch.func takes a derivative, which it cannot of a registered kernel"
    # Forced, a kernel also runs on a CPU: in Triton's interpreter, where TRITON_INTERPRET=1 is set.
    if _forced != "triton" and not all(t.is_cuda for t in tensors):
        return (
            f"the tensors are on {', '.join(sorted({t.device.type for t in tensors}))}, not on a CUDA device"
        )
    return None


def forward_derivatives(*tensors: Tensor) -> bool:
    """Whether a forward-mode derivative is being taken of any of these tensors."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def functional_derivatives() -> bool:
    """Whether `torch.func` is taking a derivative backwards, as its `grad` does."""
    if torch.compiler.is_compiling():
        return False
    return any(level.key() == TransformType.Grad for level in retrieve_all_functorch_interpreters())


def transformed() -> int:
    """Under how many transforms of `torch.func` this runs."""
    return len(retrieve_all_functorch_interpreters())


def _first(refusals: Mapping[Backend, str]) -> Backend:
    if _forced is not None and _forced not in refusals:
        return _forced
    for backend in _ORDER:
        if backend not in refusals:
            return backend
    return "reference"


def _tell_once(name: str, backend: Backend, reason: str) -> None:
    if torch.compiler.is_compiling() or (name, reason) in _told:
        return
    _told.add((name, reason))
    warnings.warn(f"{name} does not run on {backend!r}: {reason}", stacklevel=4)


@dataclass(frozen=True)
class Explanation:
    """The path that one call takes, and why it does not take the others. Its text is made to be read."""

    operation: str
    chosen: Backend
    refusals: Refusals

    def __str__(self) -> str:
        lines = [f"{self.operation} runs on {self.chosen!r}"]
        for backend in _ORDER:
            if backend == self.chosen:
                reason = "taken" if backend != _forced else "taken: use_backend asks for it"
            else:
                reason = self.refusals.get(backend, f"not asked: {self.chosen!r} comes first")
            lines.append(f"  {backend:<9}  {reason}")
        return "\n".join(lines)


def explain(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which path a call of `operation` with these arguments would take, and why. Runs nothing.

    Args:
        operation: a public operation of `lamina.kernels`.
        *args, **kwargs: what it would be called with.

    Returns:
        An `Explanation` with `chosen`, `refusals` by backend, and a text for `print`.

    Raises:
        ValueError: `operation` is not one of `lamina.kernels`.
    """
    if operation not in _refusals_of:
        raise ValueError(
            f"operation must be one of {', '.join(sorted(operations()))}, "
            f"got {getattr(operation, '__name__', operation)!r}"
        )
    refusals = _refusals_of[operation](*args, **kwargs)
    name = getattr(operation, "__name__", str(operation))
    return Explanation(name, _first(refusals), refusals)
