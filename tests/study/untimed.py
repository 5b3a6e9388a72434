"""The results of studies that must be equal: everything but times, and where it ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TIMES = ("seconds", "environment")


def untimed(value: Any) -> Any:
    """``value`` without what differs from run to run."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key not in TIMES}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def results(folder: Path) -> Any:
    """The content of ``results.json``."""
    return untimed(json.loads((folder / "results.json").read_text()))


def histories(folder: Path) -> dict[str, Any]:
    """Run -> what it logged."""
    files = sorted((folder / "runs").rglob("metrics.jsonl"))
    return {str(file.parent.relative_to(folder)): [untimed(json.loads(line)) for line in file.read_text().splitlines()] for file in files}
