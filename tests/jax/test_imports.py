"""Each engine needs its own framework alone."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("engine", "others"),
    [("gradreg.jax", ["torch", "optax", "flax", "equinox"]), ("gradreg.torch", ["jax", "optax"]), ("gradreg", ["jax", "torch", "numpy"])],
)
def test_an_engine_loads_no_other_framework(engine: str, others: list[str]) -> None:
    program = f"import {engine}, sys; loaded = [name for name in {others} if name in sys.modules]; sys.exit(', '.join(loaded) or None)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, f"import {engine} loads {finished.stderr}"
