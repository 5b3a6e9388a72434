"""examples/jax_image_task.py: its networks against those of PyTorch, its schedule, and a study of it on generated images."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

import gradreg
from gradreg import study
from gradreg.train import models
from gradreg.train.optimization import Cosine

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "jax_image_task.py"
spec = importlib.util.spec_from_file_location("jax_image_task", EXAMPLE)
assert spec is not None
assert spec.loader is not None
example = importlib.util.module_from_spec(spec)
sys.modules["jax_image_task"] = example
spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """CIFAR-10 as class folders of six images of noise each."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for number in range(10):
            folder = root / "cifar10" / part / f"class{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("built", "named"),
    [
        (lambda: example.WideResNet(10, 1, nnx.Rngs(0)), {"name": "wrn16_4", "depth": 10, "width": 1}),
        (
            lambda: example.VisionTransformer(2, 32, 2, 32, nnx.Rngs(0)),
            {"name": "vit_tiny_patch4_32", "depth": 2, "embed_dim": 32, "num_heads": 2},
        ),
    ],
    ids=["wrn", "vit"],
)
def test_a_network_has_the_parameters_of_pytorchs_and_about_its_scale(built, named):
    theirs = models.create(named, classes=10, image_shape=(3, 32, 32)).eval()
    ours = built()
    assert sum(p.size for p in jax.tree.leaves(nnx.state(ours, nnx.Param))) == sum(p.numel() for p in theirs.parameters())
    images = np.random.default_rng(0).normal(size=(64, 3, 32, 32)).astype(np.float32)
    ours.eval()
    outputs = np.asarray(ours(jnp.asarray(images).transpose(0, 2, 3, 1)))
    with torch.no_grad():
        expected = theirs(torch.tensor(images)).numpy()
    assert outputs.shape == expected.shape == (64, 10)
    assert 0.3 < outputs.std() / expected.std() < 3  # as initialized: they differ in their random numbers alone


def test_the_schedule_is_that_of_the_training_system():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs, ours = Cosine(optimizer, steps=20, warmup=5, end=0.0), example.cosine(0.1, 20, 5)
    for step in range(20):
        assert float(ours(step)) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-7)
        theirs.step_update(step + 1)


def test_an_unknown_network_is_an_error(root, tmp_path):
    options = {"model": "mlp", "root": str(root)}
    with pytest.raises(RuntimeError, match=r"every run failed, the first with ValueError: model must be wrn or vit; got 'mlp'\."):
        study.compare(
            example.train, penalties={"sam": gradreg.sam(rho=0.1)}, seeds=1, rivals=["epochs"], options=options, out=tmp_path, workers=0
        )


@pytest.mark.parametrize("model", ["wrn", "vit"])
def test_two_devices_give_what_one_gives(root, tmp_path, model):
    """A study in its command's form on one device and on two simulated ones: the same losses, to rounding."""
    losses: dict[int, list[float]] = {}
    for devices in (1, 2):
        words = [str(EXAMPLE), "--penalties", "sam:rho=0.1,warmup={kind: zero, steps: 3}", "--rivals", "epochs", "--seeds", "1"]
        words += ["--root", str(root), "--model", model, "--train_size", "40", "--test_size", "20", "--image_size", "16", "--epochs", "2"]
        words += ["--batch_size", "20", "--width", "1" if model == "wrn" else "16", "--depth", "10" if model == "wrn" else "1"]
        words += ["--warmup_epochs", "1", "--devices", str(devices), "--workers", "0", "--out", str(tmp_path / str(devices))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        done = subprocess.run(
            [sys.executable, "-m", "gradreg", "compare", *words], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        results = json.loads((tmp_path / str(devices) / "results.json").read_text())
        evaluations = {run["variant"]: run["gradient_evaluations"] for run in results["runs"]}
        assert sorted(evaluations.values()) == [4, 5]  # four steps, the last of which is penalized
        logs = sorted((tmp_path / str(devices) / "runs").glob("*/seed-0/metrics.jsonl"))
        losses[devices] = [json.loads(line)["loss"] for log in logs for line in log.read_text().splitlines()]
    assert len(losses[1]) == 4
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)
