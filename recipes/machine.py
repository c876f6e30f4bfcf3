"""Where a result comes from: versions, machine, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

PACKAGES = (
    "lamina",
    "torch",
    "triton",
    "lightning",
    "torchmetrics",
    "numpy",
    "scikit-learn",
    "tokenizers",
    "sacrebleu",
)


def versions() -> dict[str, str]:
    """Python and the installed packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": str(torch.__version__)}


def machine(device: str) -> dict[str, str | int]:
    """Processor, cores that this process may use, and the accelerator that trains."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores,
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else device,
    }
    return found


def git_commit() -> str | None:
    """The commit of the clone that this package runs from, with a + where files differ; None without one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # installed: the repository around it, if any, is another project's
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]  # a kill leaves no lock behind
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
