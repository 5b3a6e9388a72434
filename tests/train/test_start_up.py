"""What the commands import: their start-up is made of imports, and which these are does not depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SLOW = {
    *("accelerate", "jax", "pandas", "plotly", "scipy", "sklearn", "sympy", "timm", "torchvision", "wandb"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor"),
}
"""Packages and modules of which each takes a tenth of a second to import, or many seconds."""

SHORT = "digits-noisy-labels --penalties none sam --rivals epochs --seeds 2 --epochs 1 --data.train_size 300 --workers 1"
"""A comparison of a few seconds."""


def loaded_after(*words: str) -> set[str]:
    """What a fresh interpreter has imported when ``gradreg`` has run ``words``."""
    script = f"from gradreg import cli; assert cli.main({list(words)}) == 0; import json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_recipes_are_listed_without_frameworks():
    assert not loaded_after("recipes") & {*SLOW, "torch", "numpy", "jsonargparse"}


@pytest.mark.parametrize(
    ("variant", "trackers"),
    [("none", "[]"), ("sam", "[]"), ("sam", "[tensorboard]")],
    ids=["plain", "sam", "tracked"],
)
def test_training_on_digits_imports_pytorch_and_little_else(variant, trackers, tmp_path):
    options = ["--variant", variant, "--epochs", "1", "--trackers", trackers, "--device", "cpu", "--out", str(tmp_path / "run")]
    allowed = {"accelerate"} if trackers != "[]" else set()
    assert not loaded_after("train", "digits-noisy-labels", *options) & (SLOW - allowed)


def test_a_finished_comparison_is_read_without_pytorch(tmp_path):
    words = SHORT.split()
    assert loaded_after("compare", *words, "--out", str(tmp_path)) >= {"scipy.special"}
    before = (tmp_path / "table.md").read_text()
    assert not loaded_after("compare", *words, "--out", str(tmp_path)) & {*SLOW - {"plotly", "scipy"}, "torch", "scipy.stats"}
    assert (tmp_path / "table.md").read_text() == before


def test_the_first_step_of_a_weighted_penalty_does_not_import_sympy(tmp_path):
    options = ["--variant", "gnp", "--epochs", "1", "--trackers", "[]", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert "sympy" not in loaded_after("train", "digits-noisy-labels", *options)


def test_the_keys_load_without_pytorch():
    modules = "gradreg.train.recipe, gradreg.train.arguments, gradreg.study.plan"
    script = f"import sys, {modules}; sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
