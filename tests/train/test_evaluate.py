"""gradreg evaluate: a run's own figures again, other data, other weights, and errors in words."""

from __future__ import annotations

import json
import shutil

import pytest

from gradreg import cli

from .data.cases import image_tree

WORDS = [
    "digits-noisy-labels",
    "--epochs",
    "3",
    "--data.train_size",
    "300",
    "--data.validation",
    "60",
    "--model.hidden",
    "[16]",
    "--ema",
    "0.9",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "run"
    assert cli.main(["train", *WORDS, "--out", str(path)]) == 0
    return path


def evaluated(run, capsys, *words: str) -> dict[str, object]:
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_runs_own_figures_come_out_again(run, capsys):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = evaluated(run, capsys)
    assert (found["loss"], found["accuracy"], found["top5"]) == (last["test_loss"], last["test_accuracy"], last["test_top5"])
    assert found["images"] == 1497
    held_out = evaluated(run, capsys, "--split", "validation")
    assert (held_out["loss"], held_out["images"]) == (last["validation_loss"], 60)
    assert evaluated(run, capsys, "--weights", "ema")["accuracy"] == last["ema_test_accuracy"]
    best = json.loads((run / "result.json").read_text())["best"]
    assert evaluated(run, capsys, "--weights", "best")["accuracy"] == best["test_accuracy"]


def test_on_other_data(run, capsys):
    found = evaluated(run, capsys, "--data.train_size", "1000")
    assert found["images"] == 797


def test_other_data_are_normalised_as_those_trained_on(tmp_path, capsys):
    """The same images under another name, whose own colours are others."""
    image_tree(tmp_path / "cifar10", {"train": 2, "test": 2}, size=(8, 8))
    for extra in range(7):  # to the ten classes of CIFAR-10
        for part in ("train", "test"):
            shutil.copytree(tmp_path / "cifar10" / part / "cat", tmp_path / "cifar10" / part / f"class{extra}")
    words = ["--data.name", "cifar10", "--data.root", str(tmp_path), "--data.train_size", "null", "--data.label_noise", "0"]
    run = tmp_path / "run"
    assert cli.main(["train", *WORDS, *words, "--data.workers", "0", "--data.validation", "null", "--out", str(run)]) == 0
    assert evaluated(run, capsys, "--data.name", "folder", "--data.root", str(tmp_path / "cifar10")) == evaluated(run, capsys)


def test_in_words(run, capsys):
    assert cli.main(["evaluate", str(run)]) == 0
    assert "test, 1,497 images, last weights: accuracy " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--weights", "first"], "unknown --weights 'first'. Did you mean 'last'? Known: last, best, ema."),
        (["--split", "train"], "unknown --split 'train'. Did you mean 'validation'? Known: test, validation."),
        (["--model.hidden", "[17]"], "Error(s) in loading state_dict for MLP: size mismatch for layers.1.weight: copying a param with"),
        (["--data.image_size", "9"], "It is built for the size of the images and the number of classes: name data that have those of the"),
        (["--epochs", "9"], "--epochs must be left out, because an evaluation does not depend on it. It can change data, model,"),
        (["--label_smoothing", "0.1"], "--label_smoothing must be left out, because an evaluation does not depend on it."),
        (["--data.name", "digit"], "unknown data set 'digit'. Did you mean 'digits'?"),
    ],
)
def test_bad_input(run, capsys, words, error):
    assert cli.main(["evaluate", str(run), *words]) == 2
    assert error in capsys.readouterr().err


def test_json_has_no_nan(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["train", *WORDS, "--optimizer.lr", "1e12", "--out", str(run)]) == 1
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["loss"] is None


def test_what_is_not_there_is_said_to_be_missing(run, tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "must be the folder of a run; it holds no config.yaml" in capsys.readouterr().err
    plain = tmp_path / "plain"
    assert cli.main(["train", "digits-noisy-labels", "--epochs", "1", "--data.validation", "null", "--out", str(plain)]) == 0
    assert cli.main(["evaluate", str(plain), "--weights", "ema"]) == 2
    assert "--weights must name weights that the run in" in (said := capsys.readouterr().err)
    assert "It has last, best." in said
    assert cli.main(["evaluate", str(plain), "--split", "validation"]) == 2
    assert "got 'validation' of a run without any. Use --split test." in capsys.readouterr().err
    (plain / "weights.safetensors").write_bytes(b"cut off")
    assert cli.main(["evaluate", str(plain)]) == 2
    assert "weights.safetensors' must hold the weights of this model; SafetensorError" in capsys.readouterr().err
