"""The environment of a run: versions, hardware and the state of the source, for reproducing it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "gradreg",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "scipy",
    "scikit-learn",
    "jsonargparse",
    "jax",
    "optax",
    "flax",
)


def usable_cores() -> int:
    """The cores that this process may use, which a container or ``taskset`` makes fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def describe() -> dict[str, Any]:
    """Versions of Python and the packages that matter, processor, accelerators, threads, and the git commit of the working directory."""
    torch: Any = sys.modules.get("torch")  # imported by whatever has used it, and not by this
    accelerators = [] if torch is None else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES} | ({} if torch is None else {"torch": str(torch.__version__)}),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "torch_threads": None if torch is None else torch.get_num_threads(),
        "accelerators": accelerators,
        "git": _git_state(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_state() -> dict[str, Any] | None:
    """The commit of this package's source checkout, and whether it was modified; None for an installed copy."""
    try:
        folder = str(Path(__file__).parent)
        commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(["git", "-C", folder, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "modified": bool(status.stdout.strip())}
