"""Runs ``eight_devices.py`` and ``divided_parameters.py``, whose tests need eight devices, in a process that simulates them on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_devices() -> None:
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/jax/eight_devices.py",
        "tests/jax/divided_parameters.py",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
