"""Runs that are killed, stopped, out of disk or damaged, and gone on with: nothing is lost, and nothing comes out differently."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gradreg import cli

# Dropout, stochastic depth, BatchNorm, augmentation, an average of the weights and a decaying L2: all that draws or remembers.
MODEL = "{name: test_resnet, drop_rate: 0.3, drop_path_rate: 0.2}"
SETTINGS = {
    "--variant": "gnp",
    "--epochs": "10",
    "--data.train_size": "500",
    "--data.validation": "null",
    "--model": MODEL,
    "--augmentation.flip": "true",
    "--ema": "0.9",
    "--weight_decay": "{schedule: auto, start: 0.01, refractory: 0.01, measure_every: 1}",
    "--checkpoint.every_epochs": "1",
    "--checkpoint.every_minutes": "0.001",
}
WORDS = ["digits-noisy-labels", *(word for pair in SETTINGS.items() for word in pair)]
FILES = ("weights.safetensors", "best.safetensors", "ema.safetensors", "metrics.jsonl")


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


def assert_same_run(run: Path, expected: Path) -> None:
    """The same weights, metrics, state of the optimizer and of the random numbers, bit for bit."""
    for name in FILES:
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    ours, theirs = newest_checkpoint(run), newest_checkpoint(expected)
    assert ours.name == theirs.name
    for name in ("optimizer.pt", "process-00000.pt"):
        assert equal(*(torch.load(path / name, weights_only=True) for path in (ours, theirs))), name


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.soak)])
def test_a_run_killed_at_random_moments_ends_like_one_that_was_left_alone(tmp_path, kills):
    script = Path(__file__).with_name("killed.py")
    words = [sys.executable, script, tmp_path, str(kills), *WORDS]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr
    struck = json.loads(done.stdout.splitlines()[-1])
    assert len(struck) == kills
    assert {"between checkpoints", "while a checkpoint was written"} <= set(struck)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_run_told_to_stop_saves_itself_and_goes_on(tmp_path, capsys):
    words = [*WORDS, "--checkpoint.every_epochs", "null", "--checkpoint.every_minutes", "null"]
    assert cli.main(["train", *words, "--out", str(tmp_path / "whole")]) == 0
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "gradreg", "train", *words, "--out", str(stopped)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    for _ in range(6000):
        if (stopped / "metrics.jsonl").exists() and (stopped / "metrics.jsonl").read_text().count("\n") >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in said
    assert f"Resume with: gradreg train --resume {stopped}" in said
    assert not (stopped / "result.json").exists()
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(stopped)]) == 0
    assert "resuming from step-" in capsys.readouterr().out
    assert_same_run(stopped, tmp_path / "whole")


def test_a_run_cut_off_between_an_epochs_last_step_and_its_record_repeats_the_record(tmp_path, monkeypatch):
    """Where nothing is left to train, what the record says of the last step must come from the checkpoint."""
    from gradreg.train.loop import Run

    words = [*WORDS, "--checkpoint.every_minutes", "1e-9"]
    assert cli.main(["train", *words, "--out", str(tmp_path / "whole")]) == 0
    third = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[2])
    assert third["weight_decay"] != 0.01  # AutoL2 has left its beginning
    record = Run._record

    def cut_off(run: Run, epoch: int, *rest: float) -> None:
        if epoch == 3:
            raise RuntimeError("cut off")
        record(run, epoch, *rest)

    monkeypatch.setattr(Run, "_record", cut_off)
    assert cli.main(["train", *words, "--out", str(tmp_path / "cut")]) == 1
    monkeypatch.undo()
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def interrupted(folder: Path, epochs: int = 3) -> Path:
    """A complete run, cut back to the state in which it was just before its end."""
    run = folder / "run"
    assert cli.main(["train", *WORDS, "--epochs", str(epochs), "--checkpoint.every_minutes", "null", "--out", str(run)]) == 0
    for name in ("result.json", *FILES[:3]):
        (run / name).unlink()
    return run


def test_a_damaged_checkpoint_is_passed_over_and_said_to_be(tmp_path, capsys):
    run = interrupted(tmp_path)
    expected = tmp_path / "expected"
    assert cli.main(["train", *WORDS, "--epochs", "3", "--checkpoint.every_minutes", "null", "--out", str(expected)]) == 0
    newest = newest_checkpoint(run)
    whole = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"checkpoint {newest.name} is damaged (optimizer.pt has {len(whole) // 2} bytes, not {len(whole)}); going back" in said
    assert "resuming from step-000000000010, with 2 of 3 epochs done" in said
    assert_same_run(run, expected)


def test_with_every_checkpoint_damaged_the_run_begins_again(tmp_path, capsys):
    run = interrupted(tmp_path, epochs=2)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    metrics = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("going back to the one before it") == 1
    assert (
        "checkpoint step-000000000005 is damaged (manifest.json cannot be read: FileNotFoundError); none is left: the run starts again"
        in said
    )
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(tmp_path, capsys):
    """A limit on the size of files stands in for a full disk: both fail in the middle of a write."""
    run = tmp_path / "run"
    words = [*WORDS, "--epochs", "4", "--checkpoint.every_minutes", "null"]
    limited = subprocess.Popen(
        [sys.executable, "-m", "gradreg", "train", *words, "--out", str(run)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(6000):
        if any((run / "checkpoints").glob("step-*[0-9]")):
            break
        time.sleep(0.005)
    resource.prlimit(limited.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    _, said = limited.communicate(timeout=60)
    assert limited.returncode == 2, said
    assert "gradreg: error: the checkpoint of step" in said
    assert "Earlier checkpoints are unchanged: free some space, and resume with gradreg train --resume." in said
    assert "Traceback" not in said
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left
    assert not any("unfinished" in name for name in left)
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert f"resuming from {left[-1]}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["digits-noisy-labels"], ["--epochs", "3"], ["--out", "elsewhere"]])
def test_resume_stands_alone(tmp_path, capsys, words):
    assert cli.main(["train", *words, "--resume", str(tmp_path)]) == 2
    assert "--resume must be the only argument, because a run resumes with its own configuration" in capsys.readouterr().err


def test_resume_wants_the_folder_of_a_run(tmp_path, capsys):
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "must be the folder of a run; it holds no config.yaml" in capsys.readouterr().err


def test_a_complete_run_is_left_as_it_is(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", "digits-noisy-labels", "--epochs", "1", "--out", str(run)]
    assert cli.main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert cli.main(words) == 0
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert capsys.readouterr().out.count("is complete; remove the folder to run it again") == 2
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
