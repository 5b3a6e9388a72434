"""TensorBoard holds what metrics.jsonl holds, also of a run that was resumed; what is not installed is said to be missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradreg import cli

WORDS = [
    "digits-noisy-labels",
    "--epochs",
    "3",
    "--data.train_size",
    "200",
    "--data.validation",
    "null",
    "--model.hidden",
    "[8]",
    "--checkpoint.every_epochs",
    "1",
]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_holds_every_number_by_default(tmp_path):
    run = tmp_path / "run"
    assert cli.main(["train", *WORDS, "--variant", "sam", "--out", str(run)]) == 0
    found = scalars(run)
    for key in ("train_loss", "test_accuracy", "gradient_norm", "strength", "radius", "lr"):
        assert found[key] == [(line["step"], pytest.approx(line[key])) for line in lines(run)]
    assert "images_per_second" in found


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path):
    run = tmp_path / "run"
    assert cli.main(["train", *WORDS, "--out", str(run)]) == 0
    (run / "result.json").unlink()
    newest, _ = sorted((run / "checkpoints").iterdir(), reverse=True)
    (newest / "manifest.json").unlink()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert [step for step, _ in scalars(run)["train_loss"]] == [2, 4, 6]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Weights & Biases without its server, MLflow into files."""
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}.items():
        monkeypatch.setenv(key, value)
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlflow")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_weights_and_biases_and_mlflow_are_told_the_same_through_a_resume(tmp_path, elsewhere):
    run = tmp_path / "run"
    words = [*WORDS, "--trackers", "[wandb, mlflow]", "--out", str(run)]
    assert cli.main(["train", *words]) == 0
    (run / "result.json").unlink()
    newest, _ = sorted((run / "checkpoints").iterdir(), reverse=True)
    (newest / "manifest.json").unlink()
    before = (run / "trackers.json").read_bytes()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert (run / "trackers.json").read_bytes() == before
    identities = json.loads(before)
    assert list((run / "wandb").glob(f"offline-run-*-{identities['wandb']}"))
    tracked = elsewhere.get_run(identities["mlflow"])
    assert (tracked.data.params["optimizer.lr"], tracked.data.params["model.name"]) == ("0.05", "mlp")
    history = elsewhere.get_metric_history(identities["mlflow"], "test_accuracy")
    assert {(m.step, m.value) for m in history} == {(line["step"], line["test_accuracy"]) for line in lines(run)}


def test_no_trackers(tmp_path):
    run = tmp_path / "run"
    assert cli.main(["train", *WORDS, "--trackers", "[]", "--out", str(run)]) == 0
    assert not (run / "tensorboard").exists()
    assert len(lines(run)) == 3


def test_one_that_is_not_installed_is_an_error_in_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["train", *WORDS, "--trackers", "[mlflow]", "--out", str(tmp_path / "run")]) == 2
    assert "trackers must name installed ones; got 'mlflow', whose package is missing. Run: pip install mlflow" in capsys.readouterr().err
