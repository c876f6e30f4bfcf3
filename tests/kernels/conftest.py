"""`for_sm90`: what the compiler makes of kernels for a Hopper GPU, on a machine without one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "sm90"
SHARED = 232_448  # bytes that a block may have


@pytest.fixture
def for_sm90() -> Callable[..., list[dict[str, Any]]]:
    """Runs cases of `sm90/FILE` and gives a dictionary for every kernel that was launched (sm90/compile.py).

    Each fits into shared memory, and spills no more than `spilled` bytes of registers.
    """

    def run(file: str, *cases: str, spilled: int = 0) -> list[dict[str, Any]]:
        environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
        command = [sys.executable, FOLDER / "compile.py", FOLDER / file, *cases]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        compiled = [json.loads(line) for line in done.stdout.splitlines()]
        assert {kernel["case"] for kernel in compiled} == set(cases)
        for kernel in compiled:
            assert kernel["shared"] <= SHARED, kernel
            assert kernel["spilled"] <= spilled, kernel
        return compiled

    return run
