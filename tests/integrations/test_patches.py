"""The patches of ``examples/patches``: their length, and each applied to a checkout of its project and run for a few steps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .digits import digits
from .text import text

ROOT = Path(__file__).parents[2]
PATCHES = ROOT / "examples" / "patches"
LINES = {"timm-train.patch": 5, "nanogpt-train.patch": 10}
"""How many lines each may add."""


def test_each_is_short():
    assert {file.name for file in PATCHES.iterdir()} == set(LINES)
    for name, most in LINES.items():
        lines = (PATCHES / name).read_text().splitlines()
        assert 0 < sum(re.match(r"\+(?!\+\+ )", line) is not None for line in lines) <= most, name


def test_the_documentation_shows_them():
    page = (ROOT / "docs" / "integrations.md").read_text()
    for name in LINES:
        patch = (PATCHES / name).read_text()
        assert f"```diff\n{patch[patch.index('@@') :]}```" in page, name


def patched(name: str, files: tuple[str, ...], tmp_path: Path) -> Path:
    """A copy of ``files`` of the checkout, patched."""
    variable = f"GRADREG_{name.upper()}_CHECKOUT"
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"needs a checkout of {name}; set {variable} to its path")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(path) / file, tmp_path / file)
    subprocess.run(["git", "apply", "--verbose", str(PATCHES / f"{name}-train.patch")], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(folder))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_timm(tmp_path: Path):
    folder = patched("timm", ("train.py",), tmp_path)
    x, y = digits()
    for split, rows in (("train", range(64)), ("validation", range(64, 96))):
        for i in rows:
            image = Image.fromarray((x[i].view(8, 8).numpy() * 255).astype(np.uint8)).resize((32, 32)).convert("RGB")
            (folder / "images" / split / str(int(y[i]))).mkdir(parents=True, exist_ok=True)
            image.save(folder / "images" / split / str(int(y[i])) / f"{i}.png")
    options = "--data-dir images --model vit_tiny_patch16_224 --img-size 32 --num-classes 10"
    options += " --model-kwargs depth=2 embed_dim=48 num_heads=3 img_size=32 --batch-size 8 --grad-accum-steps 2 --clip-grad 1.0"
    options += " --opt adamw --lr 1e-3 --sched step --warmup-epochs 0 --workers 0 --no-prefetcher --device cpu --log-interval 1"
    options += " --output out --experiment it"
    first = run(folder, *options.split(), "--epochs", "1")
    assert "Train: 0" in first
    import torch

    state = torch.load(folder / "out" / "it" / "last.pth.tar", map_location="cpu", weights_only=False)["regularized_scaler"]
    assert state == {"scaler": None, "regularizer": {"step": 4, "evaluations": 8}}
    again = run(folder, *options.split(), "--epochs", "2", "--resume", "out/it/last.pth.tar")
    assert "Train: 1" in again
    state = torch.load(folder / "out" / "it" / "last.pth.tar", map_location="cpu", weights_only=False)["regularized_scaler"]
    assert state["regularizer"] == {"step": 8, "evaluations": 16}


@pytest.mark.slow
def test_nanogpt(tmp_path: Path):
    folder = patched("nanogpt", ("train.py", "model.py", "configurator.py"), tmp_path)
    ids = np.array([min(ord(c), 255) for c in text()], dtype=np.uint16)
    for split in ("train", "val"):
        (folder / "data" / "it").mkdir(parents=True, exist_ok=True)
        ids.tofile(folder / "data" / "it" / f"{split}.bin")
    options = (
        "--device=cpu --compile=False --dtype=float32 --dataset=it --eval_iters=1 --block_size=16 --batch_size=4 --n_layer=2 --n_head=2"
    )
    options += " --n_embd=16 --gradient_accumulation_steps=2 --max_iters=4 --eval_interval=3 --learning_rate=1e-2 --warmup_iters=0"
    found = run(folder, *options.split())
    losses = [float(loss) for loss in re.findall(r"iter \d+: loss ([\d.]+)", found)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] < 11.5  # of the whole batch, near log 50304 at first
    assert "Resuming" in run(folder, *options.split(), "--init_from=resume")
