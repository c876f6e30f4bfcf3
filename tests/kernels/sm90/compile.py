"""Compiles Triton kernels as calls would, for a GPU that is not there; prints a JSON line for each.

    python compile.py FILE CASE ...

FILE is beside this one and has `CASES`, functions by name that call operations of `lamina.kernels.fused`. It
runs as a process of its own, because Triton decides at its import whether it interprets. The driver is a
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
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
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


def compile_only(kernel: JITFunction, *arguments, grid, warmup, **options) -> None:
    compiled = LAUNCH(kernel, *arguments, grid=grid, warmup=True, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    ptx = compiled.asm["ptx"]
    found = {
        "case": case,
        "kernel": kernel.__name__,
        "hash": compiled.hash,
        "registers": registers,
        "spilled": stack,
        "shared": compiled.metadata.shared,
        "tensor_cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "vector_atomics": len(re.findall(r"\b(?:atom|red)\.[\w.:]*\.v[248]\.", ptx)),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    driver.set_active(Sm90())
    JITFunction.run = compile_only
    cases = runpy.run_path(sys.argv[1])["CASES"]
    for case in sys.argv[2:]:
        cases[case]()
