"""Compiles Triton kernels as calls would, for a GPU that is not there.

    echo '["dot_product_attention.py", "bfloat16-64-plain"]' | python compile.py

A line that it reads is a file beside this one, which has `CASES`, functions by name that call operations of
`lamina.kernels.fused`, and the names of some of them. The line that it then writes is a list with an entry
for every kernel that these launch, or the text of an error.

It is a process of its own, because Triton decides at its import whether it interprets. The driver is a
stand-in that names the target, and every launch ends with the compiler: nothing runs, so tensors may be on a
CPU, and what an operation gives is memory as it was found.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LAUNCH = JITFunction.run


class Sm90:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def registers(compiled: CompiledKernel) -> tuple[int, int]:
    """How many a thread has, and how many bytes it keeps in memory instead."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    had, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    return had, stack


def repeated(ttgir: str) -> int:
    """Of the products on tensor cores: how many warps make the same part of one, at the most."""
    layout = r"^(#\w+) = #ttg\.nvidia_mma<.*warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[16, (\d+)"
    layouts = {
        name: (16 * int(down), int(columns) * int(across))
        for name, down, across, columns in re.findall(layout, ttgir, re.M)
    }
    products = re.findall(r"(?:tt\.dot|warp_group_dot) .*-> tensor<(\d+)x(\d+)x\w+, (#\w+)>", ttgir)
    most = 1
    for rows, columns, name in products:
        if name in layouts:
            tall, wide = layouts[name]
            most = max(most, max(1, tall // int(rows)) * max(1, wide // int(columns)))
    return most


@cache
def facts(kernel: CompiledKernel) -> dict[str, Any]:
    ptx, (had, stack) = kernel.asm["ptx"], registers(kernel)
    return {
        "hash": kernel.hash,
        "registers": had,
        "spilled": stack,
        "shared": kernel.metadata.shared,
        "tensor_cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "repeated": repeated(kernel.asm["ttgir"]),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "vector_atomics": len(re.findall(r"\b(?:atom|red)\.[\w.:]*\.v[248]\.", ptx)),
    }


def compiled(file: str, *names: str) -> list[dict[str, Any]]:
    found = []

    def compile_only(kernel: JITFunction, *arguments, grid, warmup, **options) -> None:
        of_kernel = facts(LAUNCH(kernel, *arguments, grid=grid, warmup=True, **options))
        found.append({"case": name, "kernel": kernel.__name__, **of_kernel})

    JITFunction.run = compile_only
    for name in names:
        cases(file)[name]()
    return found


@cache
def cases(file: str) -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parent / file))["CASES"]


if __name__ == "__main__":
    driver.set_active(Sm90())
    for line in sys.stdin:
        try:
            answer = compiled(*json.loads(line))
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)
