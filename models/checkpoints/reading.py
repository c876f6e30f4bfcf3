"""Reads the tensors of a checkpoint, in whichever of the usual formats it is."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# In a folder, the first of these that is there.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names, on the CPU.

    Args:
        path: a file of safetensors, of PyTorch (read with `weights_only`, so that nothing in it runs) or of
            NumPy (.npz), an index of several, or a folder as Hugging Face's libraries write it.

    Returns:
        Names and tensors; of a PyTorch file also what stands under "state_dict" or "model".

    Raises:
        FileNotFoundError: there is no such file, or the folder holds none of a known name.
        ValueError: the file is damaged or holds other things than tensors.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"the folder {path} holds none of {', '.join(FILES)}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.name.endswith(".index.json"):
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {name: t for shard in shards for name, t in read_tensors(path.parent / shard).items()}
    try:
        state = _read(path)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"path {path} cannot be read as a checkpoint: {error}") from error
    for wrapper in "state_dict", "model":
        if isinstance(inner := state.get(wrapper), dict):
            state = inner
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"path {path} must hold tensors alone, got also {', '.join(map(str, others[:5]))}")
    return state


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        try:
            import numpy as np
        except ImportError as error:
            raise ValueError("a file of NumPy needs NumPy, which is not installed") from error

        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not names with tensors")
    return state
