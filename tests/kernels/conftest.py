"""A quicker interpreter, and `for_sm90`: what the compiler makes of kernels for a Hopper GPU without one."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

COMPILE = Path(__file__).parent / "sm90" / "compile.py"
SHARED = 232_448  # bytes that a block may have

Compiler = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session", autouse=True)
def _patched_once_a_launch() -> Iterator[None]:
    """Triton's interpreter exchanges the functions of its language at every call within a kernel, which is a
    third of its time: here it does at the first one of a launch."""
    interpreter: Any = find_spec("triton") and import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):  # no Triton, or another version
        yield
        return
    exchange, execute, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    @cache
    def modules(function: Callable[..., Any]) -> frozenset[int]:
        """Those that are exchanged for a function: the language as it is called in its file."""
        there = interpreter.tl, interpreter.tl.core
        return frozenset(
            id(value) for value in function.__globals__.values() if any(value is module for module in there)
        )

    def exchange_once(function: Callable[..., Any]) -> Any:
        if modules(function) <= done:
            return interpreter._LangPatchScope()
        done.update(modules(function))
        return exchange(function)

    def launch(*arguments: Any, **options: Any) -> None:
        done.clear()
        execute(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", exchange_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield


@pytest.fixture(scope="session")
def _compiler() -> Iterator[Compiler]:
    """One process for all tests: what it takes to start is as long as to compile some kernels."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, COMPILE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):

        def run(*words: str) -> list[dict[str, Any]]:
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
            answer = json.loads(line) if line else errors.read()
            assert isinstance(answer, list), answer[-2000:]
            return answer

        yield run


@pytest.fixture
def for_sm90(_compiler: Compiler) -> Compiler:
    """Runs cases of `sm90/FILE` and gives a dictionary for every kernel that was launched (sm90/compile.py).

    Each fits into shared memory, and spills no more than `spilled` bytes of registers.
    """

    def run(file: str, *cases: str, spilled: int = 0) -> list[dict[str, Any]]:
        compiled = _compiler(file, *cases)
        assert {kernel["case"] for kernel in compiled} == set(cases)
        for kernel in compiled:
            assert kernel["shared"] <= SHARED, kernel
            assert kernel["spilled"] <= spilled, kernel
        return compiled

    return run
