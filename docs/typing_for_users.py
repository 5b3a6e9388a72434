"""How much of what users import has a known type: ``pyright --verifytypes``, whose score must be at least 95 %."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENOUGH = 0.95


def score() -> float:
    """The share of exported symbols whose type is known; types of other packages do not count."""
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--pythonpath",
        sys.executable,
        "--verifytypes",
        "gradreg",
        "--ignoreexternal",
        "--outputjson",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return float(json.loads(done.stdout)["typeCompleteness"]["completenessScore"])


if __name__ == "__main__":
    found = score()
    print(f"{found:.1%} of the exported symbols have a known type")
    if found < ENOUGH:
        sys.exit(f"at least {ENOUGH:.0%} must: pyright --verifytypes gradreg --ignoreexternal names the others.")
