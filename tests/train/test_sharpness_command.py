"""gradreg sharpness: the numbers of a run are those of the library on its samples, and runs stand side by side."""

from __future__ import annotations

import json

import pytest
import torch

from gradreg import cli, sharpness
from gradreg.train import models, sharpness_command
from gradreg.train.devices import Devices
from gradreg.train.loop import load_data
from gradreg.train.run_folder import WEIGHTS, RunFolder
from gradreg.train.run_to_folder import load_weights

WORDS = ["digits-noisy-labels", "--epochs", "2", "--data.train_size", "200", "--data.validation", "60", "--model.hidden", "[12]"]
FAST = ["--samples", "90", "--batch", "40", "--vectors", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharpness") / "run"
    assert cli.main(["train", *WORDS, "--out", str(path)]) == 0
    return path


def measured(run, capsys, *words: str) -> dict:
    capsys.readouterr()
    assert cli.main(["sharpness", str(run), "--json", *FAST, *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_numbers_are_those_of_the_library(run, capsys):
    (found,) = measured(run, capsys, "--split", "test")["runs"]
    config = RunFolder(run).configuration()
    data = load_data(config, Devices(config))
    model = models.create(config.model, classes=data.classes, image_shape=data.image_shape)
    load_weights(model, run / WEIGHTS["last"])
    batches = iter(data.test.batches(40))
    first, second, third = next(batches), next(batches), next(batches)
    images = torch.cat([first.images, second.images, third.images[:10]])
    labels = torch.cat([first.labels, second.labels, third.labels[:10]])
    closure = lambda: torch.nn.functional.cross_entropy(model(images), labels)  # noqa: E731
    assert found["samples"] == 90
    top = sharpness.eigenvalues(model, closure, mode="eval")
    assert found["largest_eigenvalue"] == pytest.approx(float(top.values), rel=2e-3)
    assert found["sam_sharpness"] == pytest.approx(sharpness.sam_sharpness(model, closure, rho=0.05, mode="eval").value, rel=1e-3)
    assert found["trace"] == pytest.approx(sharpness.trace(model, closure, samples=3, mode="eval").value, rel=1e-3)
    assert found["critical_sharpness"] == pytest.approx(sharpness.critical_sharpness(model, closure, mode="eval").value, rel=0.05)
    assert found["m_sharpness"] > found["sam_sharpness"]
    assert sum(found["share_by_layer"].values()) == pytest.approx(1)
    assert found["test_metric"] == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]


def test_runs_side_by_side(run, tmp_path, capsys):
    capsys.readouterr()
    other = tmp_path / "other"
    assert cli.main(["train", *WORDS, "--penalty.name", "sam", "--penalty.rho", "0.5", "--out", str(other)]) == 0
    capsys.readouterr()
    assert cli.main(["sharpness", str(run), "--against", str(other), *FAST, "--spectrum", "--out", str(tmp_path / "report")]) == 0
    text = capsys.readouterr().out
    assert "largest eigenvalue" in text
    assert "±" in text
    assert "Flatter is not better as such" in text
    report = json.loads((tmp_path / "report" / "sharpness.json").read_text())
    one, two = report["runs"]
    assert one["run"] == str(run) in text
    assert two["sam_sharpness"] < one["sam_sharpness"]  # half a unit of radius flattens the training loss
    assert report["rank_correlation_with_test"] is None  # two runs have none
    assert (one["penalty"], one["penalized"]) == (None, [])
    assert two["penalty"]["radius"] == 0.5
    top, low = two["penalized"]
    assert top["curvature"] == two["largest_eigenvalue"] > 0 > low["curvature"] == two["smallest_eigenvalue"]
    assert top["penalized"] > top["curvature"]  # what SAM adds
    capsys.readouterr()
    file = tmp_path / "report" / "sharpness.json"
    assert cli.main(["lab", "stability", "--measured", str(file), "--out", str(tmp_path / "lab")]) == 0
    assert "SAM(rho 0.5)" in capsys.readouterr().out
    assert 0 < one["negative_share"] < 1
    assert (tmp_path / "report" / "sharpness.png").stat().st_size > 10_000
    assert b"<svg" in (tmp_path / "report" / "sharpness.svg").read_bytes()
    assert json.loads(json.dumps(measured(run, capsys)["runs"][0])) == measured(run, capsys)["runs"][0]  # nothing in it is random


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "ema"], "--weights must name weights that the run"),
        (["--split", "val"], "unknown --split 'val'"),
        (["--rho", "0"], "--rho must be finite and > 0"),
        (["--samples", "0"], "--samples must be >= 1"),
        (["--vectors", "1"], "--vectors must be >= 2"),
        (["--optimizer.lr", "1"], "--optimizer.lr must be left out"),
        (["--against", "nowhere"], "'nowhere' must be the folder of a run"),
        (["--spectra"], "unknown option '--spectra'. Did you mean '--spectrum'?"),
    ],
)
def test_bad_input(run, words, message, capsys):
    capsys.readouterr()
    assert cli.main(["sharpness", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_last_record_of_a_run_is_what_the_command_measures(tmp_path, capsys):
    path = tmp_path / "run"
    block = ["--sharpness.every", "1", "--sharpness.samples", "90", "--sharpness.batch", "40", "--sharpness.vectors", "3"]
    assert cli.main(["train", *WORDS, *block, "--out", str(path)]) == 0
    (found,) = measured(path, capsys)["runs"]
    recorded = json.loads((path / "result.json").read_text())
    for name in ("largest_eigenvalue", "trace", "trace_error", "sam_sharpness", "m_sharpness", "critical_sharpness"):
        assert recorded[f"sharpness_{name}"] == pytest.approx(found[name], rel=1e-6), name


def test_five_runs_are_correlated_with_an_interval():
    runs = [
        {"test_metric": m, "trace": t, "largest_eigenvalue": None} for m, t in zip([0.1, 0.2, 0.3, 0.4, 0.5], [1, 2, 4, 3, 5], strict=True)
    ]
    others = dict.fromkeys(("smallest_eigenvalue", "sam_sharpness", "m_sharpness", "critical_sharpness"))
    found = sharpness_command._correlations([{**run, **others} for run in runs])
    assert found is not None
    assert set(found) == {"trace"}
    assert found["trace"]["n"] == 5
    assert found["trace"]["value"] == pytest.approx(0.9)
    assert found["trace"]["low"] < 0.9 < found["trace"]["high"] < 1.0
