"""`for_sm90`: what the compiler makes of kernels for a Hopper GPU, on a machine without one."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

COMPILE = Path(__file__).parent / "sm90" / "compile.py"
SHARED = 232_448  # bytes that a block may have

Compiler = Callable[..., list[dict[str, Any]]]


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
