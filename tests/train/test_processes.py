"""Two processes against one: the same global batch gives the same run, whether the model is copied or divided, and begun or resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gradreg import cli
from gradreg.train.recipe import configuration
from gradreg.train.run_folder import RunFolder
from gradreg.train.run_to_folder import run_to_folder

# 203 images in batches of 40 leave a batch of 3 for two processes; nothing draws but the augmentation, which is the same for any number.
BASE: dict[str, Any] = {
    "data": {"name": "digits", "train_size": 203, "label_noise": 0.3},
    "augmentation": {"flip": True, "crop_padding": 1},
    "model": {"name": "mlp", "hidden": [16, 16]},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "l2_in_loss": 1e-3},
    "schedule": {"name": "cosine", "warmup_epochs": 1},
    "weight_decay": {"schedule": "auto", "start": 0.01, "refractory": 0.01, "measure_every": 5},  # also on a batch of 3
    "penalty": {"name": "gnp", "r": 0.3, "alpha": 0.8},
    "scope": "global",
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "epochs": 3,
    "batch_size": 40,
    "precision": "fp64",
    "device": "cpu",
    "threads": 1,
    "checkpoint": {"every_epochs": 1, "keep": 9},
}
RUNS: dict[str, dict[str, Any]] = {
    "copied": {"ema": 0.9},
    "micro-batches": {"accumulation": 3},
    "divided": {"parallel": "fsdp", "accumulation": 3},  # of which the last batch has one image for one process and two for the other
    "adaptive": {"optimizer": {**BASE["optimizer"], "name": "adamw", "lr": 0.01}, "schedule": {}, "parallel": "fsdp"},
}
DRAWING = {"data": {"name": "digits", "train_size": 80}, "model": {"name": "test_resnet", "drop_rate": 0.3}, "epochs": 2}
"""Dropout differs from process to process, so that two of them do not train as one."""
TOGETHER = {**RUNS, "drawing": DRAWING}


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(folder: Path, runs: list[tuple[Path, dict[str, Any]]]) -> None:
    file = folder / "runs.json"
    file.write_text(json.dumps([[str(path), settings] for path, settings in runs]))
    words = [*LAUNCHER, str(Path(__file__).with_name("several_runs.py")), str(file)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=400, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The runs under one/, by one process; under two/, by two; and under again/, by two that go on after the first epoch."""
    folder = tmp_path_factory.mktemp("processes")
    for name, changes in RUNS.items():
        alone = configuration({**BASE, **changes, "parallel": "ddp"})
        run_to_folder(folder / "one" / name, alone, track=False)
    launch(folder, [(folder / "two" / name, {**BASE, **changes}) for name, changes in TOGETHER.items()])
    for name in TOGETHER:
        shutil.copytree(folder / "two" / name, folder / "again" / name)
        (folder / "again" / name / "result.json").unlink()
        for later in sorted((folder / "again" / name / "checkpoints").iterdir())[1:]:
            shutil.rmtree(later)
    launch(folder, [(folder / "again" / name, {**BASE, **changes}) for name, changes in TOGETHER.items()])
    return folder


def weights(folder: Path, file: str = "weights.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / file)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(folder, name):
    one, two = folder / "one" / name, folder / "two" / name
    ours, theirs = weights(two), weights(one)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        torch.testing.assert_close(ours[key], expected, rtol=0, atol=1e-12)
    for here, there in zip(RunFolder(two).history(), RunFolder(one).history(), strict=True):
        assert here.train_loss == pytest.approx(there.train_loss, abs=1e-12)
        assert here.test_loss == pytest.approx(there.test_loss, abs=1e-12)
        assert here.gradient_norm == pytest.approx(there.gradient_norm, abs=1e-12)
        for key in ("step", "gradient_evaluations", "test_accuracy", "test_top5", "weight_decay", "ema_test_accuracy"):
            assert getattr(here, key) == getattr(there, key), key


def test_two_processes_measure_the_whole_batch_for_the_weight_decay(folder):
    measured = []
    for run in ("one", "two"):
        first = min((folder / run / "copied" / "checkpoints").iterdir())
        measured.append(torch.load(first / "progress.pt", weights_only=True)["weight_decay"]["auto"])
    one, two = measured
    assert one["measurements"] == two["measurements"] == 2
    for kind in ("newest", "best"):
        assert two[kind] == pytest.approx(one[kind], abs=1e-12)
    assert one["newest"] != one["best"]


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_go_on_as_if_they_had_not_been_interrupted(folder, name):
    again, two = folder / "again" / name, folder / "two" / name
    assert (again / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    assert (again / "weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()


def test_each_process_draws_numbers_of_its_own(folder):
    first = min((folder / "two" / "drawing" / "checkpoints").iterdir())
    drawn = [torch.load(first / f"process-0000{rank}.pt", weights_only=True)["random"]["torch"] for rank in (0, 1)]
    assert not torch.equal(*drawn)


def test_one_process_goes_on_with_what_two_began(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "two" / "copied", run)
    (run / "result.json").unlink()
    for later in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    assert cli.main(["train", "--resume", str(run)]) == 0
    for key, expected in weights(folder / "one" / "copied").items():
        torch.testing.assert_close(weights(run)[key], expected, rtol=0, atol=1e-12)


def test_what_was_divided_is_evaluated_by_one(folder, capsys):
    run = folder / "two" / "divided"
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    found, last = json.loads(capsys.readouterr().out), RunFolder(run).history()[-1]
    assert (found["accuracy"], found["loss"]) == (last.test_accuracy, pytest.approx(last.test_loss, abs=1e-12))


def test_a_launcher_told_otherwise_than_the_recipe_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert cli.main(["train", "digits-noisy-labels", "--out", str(tmp_path / "run")]) == 2
    expected = (
        "precision must be what accelerate launch was told, 'bf16'; got 'fp32' in the configuration. Add --precision bf16 after 'train'"
    )
    assert expected in capsys.readouterr().err


def test_a_model_is_not_divided_among_one(tmp_path, capsys):
    assert cli.main(["train", "digits-noisy-labels", "--parallel", "fsdp", "--out", str(tmp_path / "run")]) == 2
    assert "parallel must be 'ddp' with one process, which cannot shard the model" in capsys.readouterr().err


def test_processes_that_are_told_to_stop_agree_on_the_step_and_save(tmp_path):
    run = tmp_path / "run"
    words = ["digits-noisy-labels", "--epochs", "100000", "--device", "cpu", "--out", str(run)]
    launcher = subprocess.Popen(
        [*LAUNCHER, "-m", "gradreg", "train", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    )
    for _ in range(6000):
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 3:
            break
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)  # which passes it on to both
    said, _ = launcher.communicate(timeout=60)
    assert "stopped by SIGTERM after step" in said
    checkpoints = list((run / "checkpoints").iterdir())
    assert [path.name.endswith(".unfinished") for path in checkpoints] == [False]
    assert int(checkpoints[0].name.removeprefix("step-")) % 20 == 0
