"""The attention kernels compile for a Hopper GPU, on a machine without one, and fit into it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_for_sm90.py"
SHARED = 232_448  # bytes that a block may have
FEATURES = ("plain", "bias", "table", "Gaussian", "mask", "dropout")
# Bytes of registers that a kernel may spill into local memory. Heads wider than 128 in float32 spill whatever
# the tiles; they run where they are asked for, and `explain` says why they are not chosen.
ALLOWED = {
    ("float32", 256): 8192,
    ("float32", 128): 128,
    ("float32", 64): 16,
    ("bfloat16", 256): 16,
    ("bfloat16", 128): 16,
}
CASES = [
    *((dtype, dim, FEATURES) for dtype in ("bfloat16", "float32") for dim in (64, 128)),
    ("bfloat16", 256, FEATURES),
    ("bfloat16", 32, ("windows", "packed", "weights")),
    ("float16", 80, ("bias", "mask")),
    ("bfloat16", 8, ("plain",)),
    pytest.param("float32", 256, ("bias",), marks=pytest.mark.slow),
    pytest.param("float64", 64, ("plain",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "dim", "features"), CASES)
def test_compiles_for_hopper(dtype, dim, features):
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, dtype, str(dim), *features], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    for feature in features:
        names = [k["kernel"] for k in compiled if k["feature"] == feature]
        own = ["bias_kernel"] if feature in ("bias", "table", "windows") else []
        expected = ["forward_kernel", "query_kernel", "key_kernel", *own]
        assert names == (["forward_kernel", "weights_kernel"] if feature == "weights" else expected)
    for kernel in compiled:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["spilled"] <= ALLOWED.get((dtype, dim), 0), kernel
        assert kernel["atomics"] == 0, kernel  # every run gives the same
        assert dtype == "float64" or kernel["tensor_cores"] > 0, kernel
