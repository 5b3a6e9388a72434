"""Every example of an adapter runs, in a short form, as a user would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "closure_optimizer.py": (["--epochs", "2"], "40 gradient evaluations"),
    "accelerate_loop.py": (["--epochs", "2"], "20 regularized steps"),
    "lightning_digits.py": (["--epochs", "2"], "40 gradient evaluations"),
    "trainer_text.py": (["--steps", "2"], "SAM(rho 0.05): training loss"),
    "grpo_reward.py": (
        ["--steps", "2"],
        "F-GR(gamma 0.01, epsilon 0.001), each clipped at 10, direction gradient clipped at 10: reward",
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path):
    options, words = EXAMPLES[name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
