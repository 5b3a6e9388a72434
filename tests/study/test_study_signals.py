"""Signals to a comparison, its workers and its group, and two writers at once: its results are those of one left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gradreg.folders import LOCK, locked
from tests.study.untimed import results, untimed
from tests.train.signalled import members

TASK = """
import torch
from gradreg import study

@study.task(metric="error", mode="min")
def train(run: study.Run, *, lr: float = 0.1) -> None:
    torch.manual_seed(run.seed)
    model = torch.nn.Linear(8, 1)
    x, y = torch.randn(400, 8), torch.randn(400, 1)
    regularizer = run.regularizer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for epoch in run.epochs(4):
        for step in range(50):
            optimizer.zero_grad()
            loss = regularizer.backward(lambda: (model(x) - y).square().mean())
            optimizer.step()
        error = (model(x) - y).abs().mean().item()
        run.log(test_error=error, validation_error=error + 1, loss=loss)
"""
RECIPE = """
data: {name: digits, train_size: 300}
model: {name: mlp, hidden: [32]}
epochs: 3
batch_size: 20
threads: 1
device: cpu
checkpoint: {every_epochs: 1}
variants: {none: {}, sam: {penalty: {name: sam, rho: 0.1}}}
"""


def logged(file: Path) -> Any:
    return [untimed(json.loads(line)) for line in file.read_text().splitlines()]


@pytest.mark.timeout(7200)  # of a hundred
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="finds the workers in /proc")
@pytest.mark.parametrize(("count", "pairs"), [(5, 1), pytest.param(100, 20, marks=pytest.mark.soak)])
def test_signals_at_random_moments_change_nothing_in_a_comparison(tmp_path, count, pairs):
    (tmp_path / "mine.py").write_text(TASK)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    both = ["--seeds", "2", "--workers", "2"]
    words = {"recipe": [str(tmp_path / "recipe.yaml"), *both], "task": [str(tmp_path / "mine.py"), "--penalties", "none", "sam", *both]}
    (tmp_path / "words.json").write_text(json.dumps(words if count > 5 else {"recipe": words["recipe"]}))
    script = [sys.executable, str(Path(__file__).with_name("signalled_studies.py")), str(tmp_path), str(count), str(pairs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run(script, check=False, capture_output=True, text=True, env=environment, timeout=590 if count == 5 else 7000)
    said = (tmp_path / "said.txt").read_text()
    assert done.returncode == 0, done.stderr + said
    assert "Traceback" not in said
    struck = json.loads(done.stdout.splitlines()[-1])
    assert len(struck) == count
    assert any(line.endswith("while it ran") for line in struck), struck
    for name in json.loads((tmp_path / "words.json").read_text()):
        whole = tmp_path / f"{name}-whole"
        ended = [path for path in tmp_path.glob(f"{name}-*") if path.is_dir() and path != whole]
        assert ended
        for folder in ended:
            assert results(folder) == results(whole), folder.name
            for left in folder.rglob(LOCK):  # by a writer that was killed: its presence means nothing, but nobody may hold it
                with locked(left.parent, purpose="what is left"):
                    pass
            for file in whole.rglob("metrics.jsonl"):
                assert logged(folder / file.relative_to(whole)) == logged(file), (folder.name, file)
            for file in whole.rglob("*.safetensors"):
                if "checkpoints" not in file.parts:
                    assert (folder / file.relative_to(whole)).read_bytes() == file.read_bytes(), (folder.name, file)


def catches_interrupts(process: int) -> bool:
    """Whether Python runs in it by now, and its own handler of SIGINT is in place."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("SigCgt:") and int(line.split()[1], 16) >> (signal.SIGINT - 1) & 1 for line in lines)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="finds the workers in /proc")
@pytest.mark.parametrize(
    ("number", "status", "answer"),
    [(signal.SIGINT, 130, ["gradreg: interrupted"]), (signal.SIGHUP, 129, []), (signal.SIGTERM, 143, [])],
    ids=["SIGINT", "SIGHUP", "SIGTERM"],
)
@pytest.mark.parametrize(("task", "starting"), [("mine.py", "spawn_main"), ("recipe.yaml", "forkserver")])
def test_a_signal_to_all_while_workers_start_is_answered_without_tracebacks(number, status, answer, task, starting, tmp_path):
    (tmp_path / "mine.py").write_text(TASK)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ["compare", str(tmp_path / task), "--penalties", "none", "sam", "--workers", "2", "--out", str(tmp_path / "out")]
    # Ignored, in a shell's background jobs or by nohup, they would be ignored here too.
    handled = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    handled = {which: signal.signal(which, handler) for which, handler in handled.items()}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "gradreg", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    finally:
        for which, handler in handled.items():
            signal.signal(which, handler)
    try:
        while not any(starting in line and catches_interrupts(worker) for worker, line in members(process.pid)):
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, said
    assert said.splitlines()[1:] == answer
