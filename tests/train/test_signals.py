"""Signals to a run and to its group, and two writers at once: it ends like one left alone, nothing is written twice, nobody is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .data.cases import image_tree

FILES = ("weights.safetensors", "best.safetensors", "metrics.jsonl")
RECIPE = """
data: {name: folder, image_size: 12, memory: false, workers: 1}
augmentation: {flip: true}
model: {name: mlp, hidden: [64]}
penalty: {name: fgr, gamma: 0.1, epsilon: 0.1}
epochs: 6
batch_size: 30
threads: 1
device: cpu
trackers: []
checkpoint: {every_epochs: 1}
"""


@pytest.mark.timeout(3600)  # of a hundred
@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.soak)])
def test_signals_at_random_moments_change_nothing(tmp_path, count):
    image_tree(tmp_path / "images", {"train": 40, "val": 4, "test": 4})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [str(tmp_path / "recipe.yaml"), "--data.root", str(tmp_path / "images")]
    script = [sys.executable, str(Path(__file__).with_name("signalled.py")), str(tmp_path), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*script, *words], check=False, capture_output=True, text=True, env=environment, timeout=590 if count == 5 else 3000
    )
    said = (tmp_path / "said.txt").read_text()
    assert done.returncode == 0, done.stderr + said
    assert "Traceback" not in said
    struck = json.loads(done.stdout.splitlines()[-1])
    assert len(struck) == count
    assert any(line.endswith((" 143", " 129", " 130")) for line in struck), struck  # some struck while it trained
    ended = [path for path in tmp_path.iterdir() if path.name.startswith(("signalled", "ended-", "pair-")) and path.is_dir()]
    assert len(ended) >= 1 + 2 * count // 5
    for run in ended:
        assert not (run / ".lock").exists()
        for name in FILES:
            assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (run.name, name)
