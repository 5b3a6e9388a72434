"""The folder of a run: what stands in it, and that two configurations never share one."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import yaml

from gradreg import cli
from gradreg.train import models
from gradreg.train.recipe import configuration

WORDS = ["digits-noisy-labels", "--epochs", "2", "--data.train_size", "200", "--model.hidden", "[8]"]


def test_gradreg_train_leaves_a_folder_from_which_the_run_can_be_read(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *WORDS, "--variant", "fgr", "--out", str(out)]) == 0
    files = {"config.yaml", "environment.json", "metrics.jsonl", "timings.jsonl", "weights.safetensors", "best.safetensors", "result.json"}
    assert {p.name for p in out.iterdir()} == files | {"checkpoints", "tensorboard"}
    config = configuration(yaml.safe_load((out / "config.yaml").read_text()))
    assert (config.epochs, config.penalty) == (2, {"name": "fgr", "gamma": 0.5, "epsilon": 0.5})
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(e["epoch"], e["step"], e["gradient_evaluations"]) for e in epochs] == [(1, 2, 4), (2, 4, 8)]
    result = json.loads((out / "result.json").read_text())
    assert result["test_accuracy"] == epochs[-1]["test_accuracy"]
    environment = json.loads((out / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    model = models.create(config.model, classes=10, image_shape=(1, 8, 8))
    model.load_state_dict(safetensors.torch.load_file(out / "weights.safetensors"))
    assert f"test accuracy {100 * result['test_accuracy']:.2f} %" in capsys.readouterr().out


def test_a_folder_is_never_shared_by_two_configurations(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert cli.main(["train", *WORDS, "--out", out]) == 0
    assert cli.main(["train", *WORDS, "--out", out]) == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    assert cli.main(["train", *WORDS, "--optimizer.lr", "0.2", "--out", out]) == 2
    assert "holds a run of another configuration; it differs in optimizer.lr." in capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    (tmp_path / "run" / "config.yaml").unlink()  # so that nothing says what its checkpoints are of
    assert cli.main(["train", *WORDS, "--optimizer.lr", "0.2", "--out", out]) == 2
    assert "holds checkpoints of a run whose config.yaml is gone" in capsys.readouterr().err


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, capsys):
    assert cli.main(["train", *WORDS, "--data.name", "mnist", "--data.root", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "data.root must hold MNIST" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_out_every_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.main(["train", *WORDS, "--variant", "sam"]) == 0
    made = list((tmp_path / "runs" / "train").iterdir())
    assert len(made) == 2
    assert all(path.name.startswith("digits-noisy-labels-sam-seed-0-") for path in made)


def test_a_diverged_run_exits_with_1_and_its_metrics_are_json(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *WORDS, "--optimizer.lr", "1e12", "--out", str(out)]) == 1
    assert "diverged by epoch" in capsys.readouterr().out
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert lines
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_what_is_typed_beside_a_variant_wins_over_it(tmp_path):
    out = tmp_path / "run"
    assert cli.main(["train", *WORDS, "--variant", "sam", "--penalty.rho", "0.3", "--out", str(out)]) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["penalty"] == {"name": "sam", "rho": 0.3}
