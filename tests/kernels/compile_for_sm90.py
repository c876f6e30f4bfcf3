"""Compiles the attention kernels as a call would, for a GPU that is not there; prints what came out as JSON.

    python compile_for_sm90.py DTYPE HEAD_DIM FEATURE ...

Runs as a process of its own, because Triton decides at its import whether it interprets. The driver is a
stand-in that names the target, and the launch is replaced by the compiler: nothing runs, so tensors may be on
a CPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from lamina.kernels.fused import _attention_launch as launching
from lamina.kernels.fused import dot_product_attention as fused
from lamina.kernels.fused.attention_weights import attention_weights
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FEATURES = {
    "plain": {},
    "bias": {"bias": True, "after": 0},
    "table": {"table": True},
    "Gaussian": {"power": 2, "after": 0},
    "mask": {"mask": True, "lengths": True, "before": 100, "after": 100},
    "dropout": {"mask": True, "dropout": 0.1},
    "windows": {"table": True, "length": 64},
    "packed": {"packed": True, "after": 0},
    "weights": {"bias": True, "weights": True},
}


class Sm90:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def report(kernel, programs: int, *arguments, **options) -> None:
    compiled = kernel.warmup(*arguments, grid=(programs,), **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    ptx = compiled.asm["ptx"]
    found = {
        "feature": feature,
        "kernel": kernel.__name__,
        "registers": registers,
        "spilled": stack,
        "shared": compiled.metadata.shared,
        "tensor_cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
    }
    print(json.dumps(found), flush=True)


def compile_all(dtype: torch.dtype, dim: int, length: int = 1024, **features) -> None:
    def some(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    batch, heads = 2, 4
    packed = features.get("packed", False)
    query, key, value = (some(1 if packed else batch, heads, length, dim) for _ in range(3))
    places = torch.arange(length, dtype=torch.int32)
    table = features.get("table", False)
    dropout = features.get("dropout", 0.0)
    starts = torch.tensor([0, length // 2, length], dtype=torch.int32) if packed else None
    inputs = [
        query,
        key,
        value,
        torch.ones(batch, 1, length, length, dtype=torch.bool) if "mask" in features else None,
        some(1, heads, length, length) if "bias" in features else None,
        some(heads, 2 * length) if table else None,
        places + length - 1 if table else None,
        places if table else None,
        torch.zeros(heads) if "power" in features else None,
        features.get("power", 0),
        torch.full((batch,), length) if "lengths" in features else None,
        starts,
        starts,
        [length, length] if packed else [],
        features.get("before", -1),
        features.get("after", -1),
        dim**-0.5,
        dropout,
        torch.zeros(1, dtype=torch.int64) if dropout else None,
    ]
    if "weights" in features:  # of the value, the lengths and the dropout it has none
        attention_weights._init_fn(*inputs[:2], *inputs[3:10], *inputs[14:17])
        return
    out, lse = fused.attention._init_fn(*inputs)
    fused.attention_backward._init_fn(torch.empty_like(out), None, out, lse, [True] * 6, *inputs)


if __name__ == "__main__":
    driver.set_active(Sm90())
    launching.launch = report
    for feature in sys.argv[3:]:
        compile_all(getattr(torch, sys.argv[1]), int(sys.argv[2]), **FEATURES[feature])
