"""examples/jax_image_task.py: its networks against those of PyTorch, its schedule, and a study of it on generated images."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
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
def test_a_network_has_the_parameters_of_pytorchs(built, named):
    theirs = models.create(named, classes=10, image_shape=(3, 32, 32))
    ours = jax.tree.leaves(nnx.state(nnx.eval_shape(built), nnx.Param))
    assert sum(p.size for p in ours) == sum(p.numel() for p in theirs.parameters())
    assert sorted(p.size for p in ours if p.ndim == 4) == sorted(p.numel() for p in theirs.parameters() if p.ndim == 4)


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


DEVICES = """
import json, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {examples!r}]
import jax_image_task, gradreg
from gradreg.study import Run
from gradreg.study.tasks import Metric

found = {{}}
for model, width, depth in (("wrn", 1, 10),):
    for devices in (1, 2):
        folder = Path({out!r}) / f"{{model}}-{{devices}}"
        folder.mkdir()
        penalty = gradreg.sam(rho=0.1).warmup("zero", steps=1)
        run = Run(penalty, 0, folder, metric=Metric("accuracy", "max", True))
        jax_image_task.train(
            run, model=model, root={root!r}, train_size=40, test_size=20, image_size=16, epochs=1, batch_size=20,
            warmup_epochs=0, width=width, depth=depth, devices=devices,
        )
        result = run.finish()
        line = (folder / "metrics.jsonl").read_text().splitlines()[-1]
        found[f"{{model}} {{devices}}"] = [json.loads(line)["loss"], result["gradient_evaluations"], result["test_accuracy"]]
print(json.dumps(found))
"""


def test_two_devices_give_what_one_gives(root, tmp_path):
    """Two steps, the second of which is penalized, on one device and on two simulated ones: the same loss, to rounding."""
    code = DEVICES.format(tests=str(ROOT), examples=str(EXAMPLE.parent), out=str(tmp_path), root=str(root))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    one, two = found["wrn 1"], found["wrn 2"]
    assert two[0] == pytest.approx(one[0], rel=1e-3)
    assert one[1] == two[1] == 3  # passes: one in the warm-up, two after it
    assert 0 <= one[2] <= 1
