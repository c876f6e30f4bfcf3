"""Imports point one way: recipes -> models -> blocks -> layers -> kernels; viz looks at layers and models."""

import re
import sys

import pytest
from house.tree import FOLDERS, PYPROJECT, ROOT, imports, modules

MAY_IMPORT = {
    "kernels": {"kernels"},
    "layers": {"layers", "kernels"},
    "blocks": {"blocks", "layers", "kernels"},
    "models": {"models", "blocks", "layers", "kernels"},
    "recipes": {"recipes", "viz", "models", "blocks", "layers", "kernels"},
    "viz": {"viz", "layers", "models"},
}
# `import lamina.layers` needs torch and einops alone. Triton is imported where a kernel of it runs.
LIBRARIES = {
    "kernels": {"torch", "einops", "triton"},
    "layers": {"torch", "einops"},
    "blocks": {"torch", "einops"},
    "models": {"torch", "einops", "safetensors", "huggingface_hub", "numpy"},  # numpy reads .npz files alone
    "viz": {"torch", "einops", "matplotlib", "numpy"},
}
IMPORT_NAMES = {"scikit-learn": "sklearn"}


def violations(name: str, source: str) -> list[str]:
    """What this module imports and must not."""
    folder = name.split(".")[1]
    found = []
    for target in imports(name, source):
        top, *rest = target.split(".")
        if top == "absolute lamina":
            found.append(f"{name} imports {target.removeprefix('absolute ')}: write it as a relative import")
        elif folder not in FOLDERS or top in sys.stdlib_module_names:
            continue
        elif top == "lamina" and rest and rest[0] in FOLDERS and rest[0] not in MAY_IMPORT[folder]:
            found.append(f"{name} imports {target}: {folder} must not import {rest[0]}")
        elif top != "lamina" and folder in LIBRARIES and top not in LIBRARIES[folder]:
            found.append(f"{name} imports {top}: {folder} may import {', '.join(sorted(LIBRARIES[folder]))}")
    return found


@pytest.mark.parametrize("name", modules())
def test_imports_point_one_way(name):
    assert violations(name, modules()[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lamina.kernels.scores", "from ..layers import AdditiveAttention"),
        ("lamina.kernels.__init__", "from ..layers.masking import causal_mask"),
        ("lamina.kernels.fused.scores", "from ...blocks import Encoder"),
        ("lamina.layers.attention", "from ..blocks.encoder import Encoder"),
        ("lamina.layers.attention", "from .. import models"),
        ("lamina.layers.attention", "def draw():\n    from ..viz import attention"),
        ("lamina.layers.attention", "import safetensors.torch"),
        ("lamina.layers.attention", "import triton"),
        ("lamina.layers.attention", "from lamina.kernels import explain"),
        ("lamina.layers.attention", "import lamina.kernels"),
        ("lamina.blocks.encoder", "from huggingface_hub import PyTorchModelHubMixin"),
        ("lamina.blocks.encoder", "import_module('..recipes.vit', __package__)"),
        ("lamina.models.vit", "from ..recipes import reproduce"),
        ("lamina.models.vit", "import matplotlib.pyplot as plt"),
        ("lamina.viz.curves", "from ..recipes import reproduce"),
        ("lamina.viz.curves", "importlib.import_module(f'lamina.recipes.{name}')"),
    ],
)
def test_a_forbidden_import_is_found(name, source):
    assert len(violations(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "lamina.layers.attention",
            "import math\nfrom torch import nn\nfrom ..kernels import explain",
        ),
        ("lamina.layers.__init__", "from .masking import causal_mask"),
        ("lamina.kernels.fused.scores", "import triton\nfrom ..scores import reference"),
        ("lamina.models.vit", "from ..blocks import Encoder\nfrom safetensors.torch import save_file"),
        ("lamina.recipes.vit", "from ..viz import attention\nfrom ..models import ViT\nimport lightning"),
        ("lamina.viz.attention", "def draw():\n    import matplotlib\nfrom ..layers import causal_mask"),
        ("lamina.__main__", "from .recipes import command"),
    ],
)
def test_an_allowed_import_is_not(name, source):
    assert violations(name, source) == []


def test_only_the_command_line_stands_at_the_root():
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_each_library_of_the_recipes_extra_is_used_and_each_used_is_declared():
    declared = {
        IMPORT_NAMES.get(name, name)
        for line in PYPROJECT["project"]["optional-dependencies"]["recipes"]
        for name in re.findall(r"^[\w-]+", line)
    }
    needed = {name for line in PYPROJECT["project"]["dependencies"] for name in re.findall(r"^[\w-]+", line)}
    used = {
        target.split(".")[0]
        for name, file in modules().items()
        if name.split(".")[1] in ("recipes", "viz", "__main__")
        for target in imports(name, file.read_text())
    }
    used -= {"lamina", *sys.stdlib_module_names}
    assert declared - used == set(), "declared and not used"
    assert used - declared - needed == set(), "used and not declared"
