"""``import gradreg`` is free of frameworks, and each engine loads its own framework alone."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "jax", "jaxlib", "numpy", "scipy", "optax", "timm", "yaml", "jsonargparse", "matplotlib"]


def modules_after(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after running ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import gradreg",
        "import gradreg; str(gradreg.sam(rho=0.1).warmup('zero', steps=3)), gradreg.fgr(gamma=1, epsilon=1).to_dict()",
        "import gradreg.cli; gradreg.cli.main(['--help'])",
    ],
    ids=["import", "use", "help"],
)
def test_no_framework_is_loaded(code: str) -> None:
    assert not modules_after(code) & set(HEAVY)


@pytest.mark.slow
def test_the_torch_engine_loads_no_jax() -> None:
    pytest.importorskip("torch")
    loaded = modules_after("import gradreg.torch")
    assert "torch" in loaded
    assert not loaded & {"jax", "optax", "timm", "accelerate"}


def test_public_names_are_those_of_all() -> None:
    import gradreg

    assert sorted(gradreg.__all__, key=lambda name: (not name.isupper(), name)) == list(gradreg.__all__)  # as the linter sorts them
    assert len(set(gradreg.__all__)) == len(gradreg.__all__)
    for name in gradreg.__all__:
        assert getattr(gradreg, name).__module__.startswith("gradreg.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        ("import gradreg.torch", "torch", "torch"),
        ("from gradreg.torch import GradientRegularizer", "torch", "torch"),
        ("import gradreg.jax", "jax", "jax"),
        ("from gradreg import study", "yaml", "study"),
        ("from gradreg import sharpness; sharpness.trace", "torch", "sharpness"),
        ("import gradreg.integrations.closure", "torch", "torch"),
        ("import gradreg.integrations.lightning", "lightning", "lightning"),
        ("import gradreg.integrations.transformers", "transformers", "transformers"),
        ("import gradreg.integrations.trl", "trl", "trl"),
        ("import gradreg.integrations.trl", "torch", "trl"),
        ("import gradreg.integrations.timm", "timm", "timm"),
        ("import gradreg.integrations.peft", "peft", "peft"),
        ("import gradreg.jax.transformation", "optax", "jax"),
        ("import gradreg.jax.weight_decay", "optax", "jax"),
        ("import gradreg.sharpness.jax", "jax", "jax"),
        ("import gradreg.theory.stability", "numpy", "theory"),
        ("import gradreg.theory.sparse_regression", "numpy", "theory"),
        ("import gradreg.theory.diagonal_network", "scipy", "theory"),
        ("import gradreg.theory.kernel_decay", "scipy", "theory"),
        ("import gradreg.theory.flooding", "numpy", "theory"),
    ],
)
def test_an_import_without_its_package_names_the_extra(code: str, package: str, extra: str) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None\ntry: exec({code!r})\nexcept ModuleNotFoundError as error: print(error.name, error)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(package)
    assert result.stdout.endswith(f"Run: pip install 'gradreg[{extra}]'\n")
