"""What every benchmark stores beside its figures, and how."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gradreg
from gradreg import files


def command() -> str:
    """The command line as it was typed; the value of ``--root``, a folder of the reader's own, is left open."""
    script, *words = sys.argv
    hidden = ["DATA" if before == "--root" else word for before, word in zip(["", *words], words, strict=False)]
    return " ".join(["python", f"benchmarks/{Path(script).name}", *hidden])


def environment(packages: Sequence[str], device: torch.device | None = None) -> dict[str, Any]:
    """Date, processor or accelerator, threads and versions."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device is not None and device.type == "cuda" else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "gradreg": gradreg.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def signature(results: dict[str, Any], *packages: str, setting: str = "") -> str:
    """Below a table: where, with what ``packages`` and ``setting``, when, and by which command it was made."""
    made = results["environment"]
    versions = ", ".join(f"{package} {made[package]}" for package in packages)
    where = f"{made['device']}, {made['cores']} core(s), {made['threads']} thread(s)"
    return f"{where}{setting}, {versions}, {made['date']}. `{results['command']}`"


def report(results: dict[str, Any], text: str, out: Path | None) -> None:
    """Print ``text``, and write ``out``.json and ``out``.md if ``out`` is given."""
    print(text)
    if out is not None:
        files.make_directory(out.parent, purpose="--out")
        files.write_json(out.with_suffix(".json"), results)
        files.write_text(out.with_suffix(".md"), text)
