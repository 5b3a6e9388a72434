"""The folder of a run: what stands in it, and that two configurations never share one."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict

import pytest
import safetensors.torch
import torch
import yaml

from gradreg import cli
from gradreg.folders import locked
from gradreg.train import models
from gradreg.train.recipe import configuration
from gradreg.train.run_folder import RunFolder

from .data.cases import image_tree

WORDS = ["digits-noisy-labels", "--epochs", "2", "--data.train_size", "200", "--data.validation", "null", "--model.hidden", "[8]"]


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


def test_the_result_of_another_run_is_named(tmp_path, capsys):
    for seed in "01":
        assert cli.main(["train", *WORDS, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    capsys.readouterr()
    (tmp_path / "1" / "result.json").replace(tmp_path / "0" / "result.json")
    assert cli.main(["train", *WORDS, "--seed", "0", "--out", str(tmp_path / "0")]) == 2
    assert "must belong to the config.yaml beside it; it was written beside another. Remove it" in capsys.readouterr().err


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


def test_a_second_writer_is_told_who_writes_and_changes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    with locked(out, purpose="--out"):
        (out / "kept").touch()
        assert cli.main(["train", *WORDS, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert f"--out must name a folder that no other process writes; got '{out}', written by process {os.getpid()} on " in said
        assert {path.name for path in out.iterdir()} == {"kept", ".lock"}
    assert cli.main(["train", *WORDS, "--out", str(out)]) == 0
    with locked(out, purpose="--out"):  # a complete run is read, whoever holds its folder
        assert cli.main(["train", *WORDS, "--out", str(out)]) == 0


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gradreg.train.command.time.strftime", lambda _: "NOW")
    for _ in range(3):
        assert cli.main(["train", *WORDS, "--epochs", "1"]) == 0
    stem = "digits-noisy-labels-seed-0-NOW"
    assert {path.name for path in (tmp_path / "runs" / "train").iterdir()} == {stem, f"{stem}-2", f"{stem}-3"}


def test_a_run_without_out_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *WORDS, "--model.name", "mpl"]) == 2
    assert not list((tmp_path / "runs" / "train").iterdir())


def test_validation_and_test_are_columns_of_their_own(tmp_path, capsys):
    root = image_tree(tmp_path / "images", {"train": 6, "val": 2, "test": 3})
    out = tmp_path / "run"
    words = [
        "--data.name",
        "folder",
        "--data.root",
        str(root),
        "--data.train_size",
        "null",
        "--data.label_noise",
        "0",
        "--data.workers",
        "0",
    ]
    assert cli.main(["train", *WORDS, *words, "--ema", "0.5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    for split, images in (("validation", 6), ("test", 9)):
        values = {name: epochs[-1][f"{split}_{name}"] for name in ("loss", "accuracy", "top5")}
        assert {name: result[f"{split}_{name}"] for name in values} == values
        assert result[f"ema_{split}_accuracy"] == epochs[-1][f"ema_{split}_accuracy"]
        assert cli.main(["evaluate", str(out), "--split", split, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["images"], {name: found[name] for name in values}) == (images, values)
        assert cli.main(["evaluate", str(out), "--split", split, "--weights", "ema", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == epochs[-1][f"ema_{split}_loss"]
    assert result["best"]["by"] == "validation_accuracy"
    shown = [f"validation accuracy {100 * e['validation_accuracy']:.2f} %, test accuracy {100 * e['test_accuracy']:.2f} %" for e in epochs]
    for number, (epoch, accuracies) in enumerate(zip(epochs, shown, strict=True), 1):
        assert f"epoch {number}/2: loss {epoch['train_loss']:.4f}, {accuracies}\n" in said
    assert f"\n{shown[-1]}, train loss" in said


DAMAGED = {
    "a cut line": (
        "metrics.jsonl",
        b'{"epoch": 1\n',
        "line 1 of '{run}/metrics.jsonl' must be the record of an epoch; it is damaged: Expecting",
    ),
    "a line of something else": ("metrics.jsonl", b"[]\n", "line 1 of '{run}/metrics.jsonl' must be the record of an epoch; it is damaged"),
    "a line of another key": (
        "metrics.jsonl",
        b'{"epok": 1}\n',
        "metrics.jsonl' must be the record of an epoch; it is damaged: Epoch.__init__",
    ),
    "a line of bytes": ("metrics.jsonl", b"\xff\xfe\n", "line 1 of '{run}/metrics.jsonl' must be the record of an epoch; it is damaged"),
    "a cut result": ("result.json", b'{"epochs": 2', "'{run}/result.json' must hold the result of a run; it is damaged: Expecting"),
    "another result": ("result.json", b"{}", "'{run}/result.json' must hold the result of a run; it is damaged: it does not say whether"),
    "no result": ("result.json", b"[1]", "'{run}/result.json' must hold the result of a run; it is damaged: it holds list and no mapping"),
    "a deep result": (
        "result.json",
        b"[" * 100_000,
        "'{run}/result.json' must hold the result of a run; it is damaged: it is nested too deep",
    ),
    "a deep line": (
        "metrics.jsonl",
        b"[" * 100_000 + b"\n",
        "line 1 of '{run}/metrics.jsonl' must be the record of an epoch; it is damaged",
    ),
    "an empty configuration": ("config.yaml", b"", "'{run}/config.yaml' must be a mapping of keys to values; got None"),
    "a list": ("config.yaml", b"- 1", "'{run}/config.yaml' must be a mapping of keys to values; got [1]"),
    "no YAML": ("config.yaml", b"a: [", "'{run}/config.yaml' must be valid YAML"),
    "a tag": ("config.yaml", b"epochs: !!python/name:os.system", "'{run}/config.yaml': line 1 has the tag !!python/name:os.system"),
    "latin-1": ("config.yaml", "a: é".encode("latin-1"), "'{run}/config.yaml' must be text in UTF-8; line 1 has the byte 0xe9"),
    "a wrong value": ("config.yaml", b"epochs: 0", "'{run}/config.yaml': epochs must be >= 1; got 0"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(case, tmp_path, capsys):
    name, content, words = DAMAGED[case]
    (tmp_path / "config.yaml").write_text("epochs: 1\n")
    (tmp_path / name).write_bytes(content)
    folder = RunFolder(tmp_path)
    read = {"metrics.jsonl": folder.history, "result.json": folder.result, "config.yaml": folder.configuration}[name]
    with pytest.raises(ValueError, match=re.escape(words.format(run=tmp_path))):
        read()
    if name == "config.yaml":
        assert cli.main(["train", "--resume", str(tmp_path)]) == 2
        assert words.format(run=tmp_path) in capsys.readouterr().err


def test_a_text_that_recipes_would_take_for_a_number_stays_a_text(tmp_path):
    """PyYAML writes it without quotes."""
    config = configuration({"data": {"root": "1e3"}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    folder = RunFolder(tmp_path)
    assert folder.configuration() == config
    folder.check_free_for(config)


def test_an_unfinished_line_is_left_out(tmp_path):
    assert cli.main(["train", *WORDS, "--out", str(tmp_path)]) == 0
    folder = RunFolder(tmp_path)
    history = folder.history()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 3')
    assert folder.history() == history


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
