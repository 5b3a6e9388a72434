"""The examples run as a user runs them, for ten epochs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("script", "lines"), [("jax_digits.py", 2), ("equinox_digits.py", 3)])
def test_digits(script: str, lines: int) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / script), "--epochs", "10", "--seeds", "1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = [float(number) for number in re.findall(r"test accuracy ([\d.]+) % over 1 seeds", finished.stdout)]
    assert len(found) == lines
    assert all(60 < percent < 97 for percent in found)
    assert len(set(found)) > 1  # the penalty does something
