"""The tiers of the tests, and Hypothesis, which draws the same examples every time, on any machine.

- ``make test-fast`` leaves out what is marked ``slow``: tests that start processes, compile, or train. Most are whole
  files, named here.
- ``make test`` runs everything but the long sweeps, of which it takes a seeded sample.
- ``make soak`` runs those whole (``--soak``), with more examples drawn at random where Hypothesis draws them.
"""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("seeded", derandomize=True, database=None, deadline=None)
settings.register_profile("soak", max_examples=1000, deadline=None)
settings.load_profile("seeded")

HERE = Path(__file__).parent
SLOW = {
    "integrations": ("data_parallel", "examples", "transformers", "trl"),
    "jax": (
        "data_parallel",
        "equinox",
        "examples",
        "flax",
        "microbatches",
        "optax",
        "parity",
        "perturbation",
        "regularizer",
        "step",
    ),
    "study": ("compare", "l2"),
    "theory": ("command", "diagonal_network"),
    "torch": ("compile", "data_parallel", "data_parallel_inside", "fsdp"),
    "train": ("evaluate", "interruptions", "mlp_gain", "options", "processes", "recipes", "start_up", "trackers", "weight_decay"),
    "train/data": ("streaming",),
    "train/models": ("create", "parameters"),
}
"""The files of each folder, as tests/FOLDER/test_NAME.py, that are slow throughout."""
SLOW_FILES = {HERE / folder / f"test_{name}.py" for folder, names in SLOW.items() for name in names}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the tests marked soak: every point of what is sampled otherwise")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: starts processes, compiles or trains; left out by make test-fast")
    config.addinivalue_line("markers", "soak: a whole sweep, for minutes; runs with --soak only")
    if config.getoption("--soak"):
        settings.load_profile("soak")
    missing = [str(file.relative_to(HERE)) for file in SLOW_FILES if not file.is_file()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py calls slow what is not there: {', '.join(missing)}. Rename it there too.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    if not config.getoption("--soak"):
        soaking = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soaking)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
