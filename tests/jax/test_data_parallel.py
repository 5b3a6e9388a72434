"""Runs ``eight_devices.py`` and ``divided_parameters.py``, whose tests need eight devices, in a process that simulates them on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("tests/jax/eight_devices.py", "tests/jax/divided_parameters.py")


def run_on_eight_devices(*options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *options, *FILES]
    # Programs that run once or twice: what is compiled need not be fast.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_on_eight_devices() -> None:
    run_on_eight_devices()


@pytest.mark.soak
def test_every_penalty_in_every_way_on_eight_devices() -> None:
    run_on_eight_devices("--soak", "-m", "soak")
