"""`import lamina.layers` needs torch and einops alone and is quick; no import loads what is not used yet."""

import json
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ABSENT = ["triton", "lightning", "matplotlib", "transformers", "safetensors", "huggingface_hub", "sklearn"]
HEAVY = ["triton", "lightning", "pytorch_lightning", "torchmetrics", "matplotlib", "sklearn", "transformers"]
# torch names Triton as a requirement of its own on some platforms, and does without.
NOT_NEEDED = {"triton"}


def _requirements(name: str) -> set[str]:
    """The distribution and, transitively, what it cannot do without."""
    seen: set[tuple[str, frozenset[str]]] = set()
    ahead = [(name, frozenset[str]())]
    while ahead:
        name, extras = ahead.pop()
        if (name, extras) in seen or name in NOT_NEEDED:
            continue
        seen.add((name, extras))
        ahead += [
            (required.name.lower(), frozenset(required.extras))
            for required in map(Requirement, distribution(name).requires or ())
            if required.marker is None or any(required.marker.evaluate({"extra": e}) for e in {"", *extras})
        ]
    return {name for name, _ in seen}


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A folder of libraries that holds torch, einops and Lamina's wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("light")
    for name in _requirements("torch") | _requirements("einops"):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(installed.locate_file(top))
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def _run(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layers_and_blocks_run_on_torch_and_einops_alone(light: Path):
    code = f"""
import sys
sys.path.append({str(light)!r})
from importlib.util import find_spec
assert not [name for name in {ABSENT} if find_spec(name)], "the environment is not light"
import torch, lamina.kernels, lamina.layers, lamina.blocks
assert lamina.__file__.startswith({str(light)!r}), lamina.__file__
attention = lamina.layers.MultiHeadAttention(6, 2)
attention(torch.randn(3, 5, 6)).mean().backward()
lamina.blocks.Encoder(6, 2, 2)(torch.randn(3, 5, 6))
"""
    _run(code, "-I", "-S")


def test_no_import_loads_what_it_may_never_use():
    code = f"""
import importlib, json, sys
import torch
before, loaded = set(sys.modules), {{}}
for name in ["lamina", *("lamina." + f for f in ("kernels", "layers", "blocks", "models", "viz", "recipes"))]:
    importlib.import_module(name)
    for heavy in {HEAVY}:
        if heavy in sys.modules and heavy not in before:
            loaded.setdefault(heavy, name)
print(json.dumps(loaded))
"""
    assert json.loads(_run(code)) == {}, "loaded by the import of"


def test_importing_the_layers_adds_under_100_ms_to_torch():
    code = """
import time, torch
start = time.process_time()
import lamina.layers
print(time.process_time() - start)
"""
    # The processor's time, which other work on the machine lengthens little; the first try writes bytecode.
    took = []
    while len(took) < 7 and min(took, default=1.0) >= 0.1:
        took.append(float(_run(code)))
    assert min(took) < 0.1
