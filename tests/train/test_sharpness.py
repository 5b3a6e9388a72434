"""The block sharpness of a recipe: what it records is what the library measures, and the run is the one that it would have been."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradreg import cli, sharpness, study
from gradreg.train.devices import Devices
from gradreg.train.evaluation import evaluate
from gradreg.train.loop import load_data, train
from gradreg.train.outcome import Epoch
from gradreg.train.recipe import configuration
from gradreg.train.run_folder import RunFolder
from gradreg.train.run_to_folder import run_to_folder
from gradreg.train.sharpness_recorder import SharpnessRecorder, closures_of

BASE: dict[str, Any] = {
    "data": {"name": "digits", "train_size": 120, "label_noise": 0.3},
    "augmentation": {"flip": True, "crop_padding": 1},
    "model": {"name": "mlp", "hidden": [10]},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "penalty": {"name": "sam", "rho": 0.1},
    "epochs": 5,
    "batch_size": 40,
    "threads": 1,
    "device": "cpu",
}
BLOCK = {"every": 2, "samples": 70, "batch": 30, "vectors": 3, "rho": 0.2}


def test_a_run_records_what_the_library_measures_and_is_the_run_that_it_would_have_been():
    config = configuration({**BASE, "sharpness": BLOCK})
    plain, measured = train(configuration(BASE)), train(config)
    for name, tensor in plain.weights.items():
        assert torch.equal(tensor, measured.weights[name]), name
    assert [e.epoch for e in measured.history if e.sharpness] == [2, 4, 5]  # every other one, and the last
    assert not any(e.sharpness for e in plain.history)
    found = measured.history[-1].sharpness
    images, labels = next(iter(load_data(config, Devices(config)).unaugmented(70).batches(100))).labeled()
    assert len(labels) == 70
    closure = lambda: nn.functional.cross_entropy(measured.model(images), labels)  # noqa: E731
    top = sharpness.eigenvalues(measured.model, closure, mode="eval")
    assert found["sharpness_largest_eigenvalue"] == pytest.approx(float(top.values), rel=2e-3)
    assert found["sharpness_sam_sharpness"] == pytest.approx(
        sharpness.sam_sharpness(measured.model, closure, rho=0.2, mode="eval").value, rel=1e-3
    )
    trace = sharpness.trace(measured.model, closure, samples=3, mode="eval")
    assert found["sharpness_trace"] == pytest.approx(trace.value, rel=1e-3)
    assert found["sharpness_trace_error"] == pytest.approx(trace.standard_error, rel=1e-3)
    assert found["sharpness_m_sharpness"] > found["sharpness_sam_sharpness"]
    assert measured.summary()["sharpness_epoch"] == 5
    assert measured.summary()["sharpness_trace"] == found["sharpness_trace"]
    assert measured.history[-1].gradient_evaluations == plain.history[-1].gradient_evaluations
    assert Epoch.from_dict(measured.history[-1].to_dict()) == measured.history[-1]


def test_the_measured_samples_are_the_same_at_every_time_and_not_augmented():
    config = configuration({**BASE, "augmentation": {"flip": True, "crop_padding": 2}})
    data, clean = load_data(config, Devices(config)), load_data(configuration({**BASE, "augmentation": {}}), Devices(config))
    once, again, other = (d.unaugmented(25).batches(10) for d in (data, data, clean))
    for a, b, c in zip(once, again, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.images, c.images)
        assert torch.equal(a.labels, c.labels)
    assert len(data.unaugmented(10_000)) == 120
    trained = torch.cat([batch.labels for batch in data.train.batches(1, 120)])
    measured = torch.cat([batch.labels for batch in data.unaugmented(120).batches(50)])
    assert torch.equal(trained.sort().values, measured.sort().values)  # the noise of the training labels is in both


def test_what_cannot_be_measured_is_nan_and_said_and_the_run_goes_on():
    config = configuration({**BASE, "epochs": 2, "sharpness": {**BLOCK, "every": 1}})
    recorder = SharpnessRecorder(config, load_data(config, Devices(config)), Devices(config))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))
    with pytest.warns(
        UserWarning, match=r"critical_sharpness could not be measured after epoch 1, recorded as nan: the loss must be finite"
    ):
        found = recorder.after(1, model)
    assert set(found) == {f"sharpness_{name}" for name in config.sharpness.measures}
    assert all(math.isnan(value) for value in found.values())
    assert recorder.after(2, model).keys() == found.keys()  # said once


def test_a_critical_sharpness_that_is_not_there_leaves_the_others():
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    closure = lambda: model.weight.square().sum()  # noqa: E731
    with pytest.warns(UserWarning, match="exactly zero"):
        found = sharpness.summary(model, closure)
    assert found.numbers["largest_eigenvalue"] == pytest.approx(2.0)
    assert set(found.failures) == {"sam_sharpness", "critical_sharpness"}
    assert "the gradient must not be zero" in str(found.failures["sam_sharpness"])
    assert math.isnan(found.record()["sharpness_critical_sharpness"])
    assert found.gradients > 0


def test_a_summary_has_the_numbers_of_the_functions_and_raises_for_wrong_arguments():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 1).double()
    closure = lambda: nn.functional.mse_loss(model(x), y)  # noqa: E731
    found = sharpness.summary(model, closure, measures=["smallest_eigenvalue", "trace"], vectors=4, tolerance=1e-8)
    parameters = torch.nn.utils.parameters_to_vector(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([p.numel() for p in model.parameters()])
        weights = {name: part.view_as(p) for name, part, p in zip(names, parts, model.parameters(), strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(model, weights, (x,)), y)

    whole: Any = torch.autograd.functional.hessian(loss, parameters.detach())
    assert found.numbers["smallest_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(whole)[0]), rel=1e-6)
    assert abs(found.numbers["trace"] - float(whole.trace())) < 5 * found.numbers["trace_error"]
    assert set(found.numbers) == {"smallest_eigenvalue", "smallest_eigenvalue_error", "trace", "trace_error"}
    with pytest.raises(ValueError, match="sizes must hold one number for each closure"):
        sharpness.summary(model, closure, sizes=[1, 2])
    with pytest.raises(ValueError, match="unknown measures 'flatness'"):
        sharpness.summary(model, closure, measures=["flatness"])
    with pytest.raises(TypeError, match="measures must be a list of measures"):
        sharpness.summary(model, closure, measures=[])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"every": 0}, r"sharpness.every must be >= 1; got 0. Use null for none."),
        ({"every": 1, "samples": 0}, r"sharpness.samples must be >= 1"),
        ({"every": 1, "rho": 0.0}, r"sharpness.rho must be finite and > 0"),
        ({"every": 1, "vectors": 1}, r"sharpness.vectors must be >= 2; got 1. A standard error needs two."),
        ({"every": 1, "measures": ["flatness"]}, r"unknown sharpness.measures 'flatness'"),
        ({"every": 1, "measures": []}, r"sharpness.measures must name some of largest_eigenvalue"),
    ],
)
def test_bad_blocks_are_named(block: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        configuration({**BASE, "sharpness": block})


def test_several_processes_must_be_able_to_share_the_samples():
    config = configuration({**BASE, "sharpness": {**BLOCK, "samples": 71}})
    devices = Devices(config)
    devices.processes = 2
    with pytest.raises(ValueError, match=r"sharpness.samples must be a multiple of the 2 processes.*got 71. Use 72."):
        SharpnessRecorder(config, load_data(config, Devices(config)), devices)


def test_a_folder_that_is_older_than_the_block_goes_on(tmp_path: Path):
    config = configuration({**BASE, "epochs": 1})
    run_to_folder(tmp_path / "run", config, track=False)
    file = tmp_path / "run" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.startswith("sharpness:"))
    last = next(i for i in range(first + 1, len(lines)) if not lines[i].startswith((" ", "-")))
    file.write_text("".join(lines[:first] + lines[last:]))
    RunFolder(tmp_path / "run").check_free_for(config)
    with pytest.raises(ValueError, match=r"it differs in sharpness.every"):
        RunFolder(tmp_path / "run").check_free_for(configuration({**BASE, "epochs": 1, "sharpness": {"every": 1}}))


@pytest.mark.slow
def test_the_block_of_a_recipe_reaches_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({**BASE, "penalty": None, "epochs": 2, "sharpness": BLOCK}))
    out = tmp_path / "out"
    words = ["compare", str(recipe), "--penalties", "none", "sam:rho=0.1", "--seeds", "3", "--rivals", "epochs", "--workers", "0"]
    assert cli.main([*words, "--sharpness.every", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Flatter is not better as such" in printed
    assert "rank correlation with test accuracy over all runs" in printed
    found = json.loads((out / "results.json").read_text())
    block = found["sharpness"]
    assert block["measures"] == ["largest_eigenvalue", "trace", "sam_sharpness", "m_sharpness", "critical_sharpness"]
    for line in block["table"]:
        own = [run["sharpness_trace"] for run in found["runs"] if run["variant"] == line["variant"]]
        assert line["trace"]["mean"] == pytest.approx(sum(own) / 3)
        assert line["trace"]["standard_error"] == pytest.approx(float(torch.tensor(own, dtype=torch.float64).std()) / 3**0.5)
    over = {(one["measure"], one["over"]): one for one in block["correlations"]}
    assert over["trace", "over all runs"]["n"] == 6
    assert over["trace", "within variants"]["groups"] == 2
    page = (out / "report.html").read_text()
    assert 'id="sharpness"' in page
    assert block["caution"] in page
    assert "rank correlation with the test metric, within variants" in page
    records = [json.loads(line) for line in (out / "runs" / "none" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert all("sharpness_trace_error" in record for record in records)


def test_evaluation_and_measurement_share_a_mode_that_is_left():
    """The loop's model is in eval mode after the evaluation, and the next epoch trains it: BatchNorm is measured in eval mode."""
    config = configuration({**BASE, "model": {"name": "cnn_bn"}, "epochs": 1, "sharpness": {**BLOCK, "every": 1, "measures": ["trace"]}})
    outcome = train(config)
    data = load_data(config, Devices(config))
    before = evaluate(outcome.model, data.test).loss
    recorder = SharpnessRecorder(config, data, Devices(config))
    outcome.model.train()
    assert recorder.after(1, outcome.model) == outcome.history[-1].sharpness
    assert outcome.model.training
    closures, sizes = closures_of(config, outcome.model, data.unaugmented(70).batches(30), 70)
    alone = sharpness.trace(outcome.model, closures, sizes=sizes, samples=3, mode="eval").value
    assert outcome.history[-1].sharpness["sharpness_trace"] == pytest.approx(alone, rel=1e-6)
    assert evaluate(outcome.model, data.test).loss == before


TASK = """
import torch
from gradreg import study

@study.task(metric="rmse", mode="min")
def train(run: study.Run, *, every: int = 2, epochs: int = 3, broken: bool = False, measure: bool = True) -> None:
    data = torch.Generator().manual_seed(run.seed)
    x = torch.randn(60, 3, generator=data)
    y = x.sin().sum(1, keepdim=True)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    regularizer = run.regularizer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in run.epochs(epochs):
        optimizer.zero_grad()
        loss = regularizer.backward(lambda: (model(x[:40]) - y[:40]).square().mean())
        optimizer.step()
        with torch.no_grad():
            run.log(loss=loss, test_rmse=(model(x[40:]) - y[40:]).square().mean().sqrt())
        kinked = lambda: model[0].weight.abs().sum()
        smooth = lambda: (model(x[:40]) - y[:40]).square().mean()
        if measure:
            run.sharpness(model, kinked if broken else smooth, every=every, vectors=4)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(TASK)
    return path


@pytest.mark.slow
def test_a_task_measures_when_it_is_due_and_trains_as_without(mine: Path, tmp_path: Path):
    def runs(out: str, **options: Any) -> Any:
        penalties = ["none", "sam:rho=0.1"]
        return study.compare(str(mine), penalties=penalties, seeds=2, rivals=["epochs"], workers=0, out=tmp_path / out, options=options)

    found, without = runs("with"), runs("without", measure=False)
    assert [(r.test, r.gradient_evaluations) for r in found.records] == [(r.test, r.gradient_evaluations) for r in without.records]
    assert without.sharpness is None
    assert without.sharpness_said == []
    assert [r.sharpness["epoch"] for r in found.records] == [3] * 4  # the last epoch too
    file = tmp_path / "with" / "runs" / "none" / "seed-0" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["epoch"] for line in lines if "sharpness_trace" in line] == [2, 3]
    assert found.to_frame()["sharpness_largest_eigenvalue"].notna().all()
    assert "largest eigenvalue: none" in str(found)
    assert "Flatter is not better" in str(found)


@pytest.mark.slow
def test_a_task_whose_loss_has_no_curvature_is_told_and_goes_on(mine: Path, tmp_path: Path):
    options = {"broken": True}
    found = study.compare(
        str(mine), seeds=1, penalties=["sam:rho=0.1"], rivals=["epochs"], workers=0, out=tmp_path / "out", options=options
    )
    assert found.records[0].sharpness["largest_eigenvalue"] is None
    assert found.records[0].sharpness["sam_sharpness"] > 0
    assert any("could not measure largest_eigenvalue each time: the loss has no second derivative" in text for text in found.warnings)
    assert "largest_eigenvalue" not in found.sharpness["measures"]


def test_the_seconds_of_a_run_do_not_count_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    run = study.Run(None, 0, tmp_path, metric=study.tasks.Metric("rmse", "min"))
    model = nn.Linear(2, 1)

    def closure() -> torch.Tensor:
        clock[0] += 1.0
        return model(torch.ones(3, 2)).square().mean()

    with pytest.raises(RuntimeError, match=r"got no run.epochs\(n\) or run.steps\(n\) so far"):
        run.sharpness(model, closure)
    for _ in run.epochs(1):
        clock[0] += 5.0
        assert run.sharpness(model, closure, measures=["trace"])["sharpness_trace"] > 0
        run.log(test_rmse=1.0)
    assert run._records[-1]["seconds"] == 5.0
    assert clock[0] > 106.0
