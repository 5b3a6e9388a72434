"""gradreg l2: the probe, its rejection, the recipe it writes, and the clock."""

from __future__ import annotations

import json

import pytest
import yaml

from gradreg import cli
from gradreg.study import l2_probe
from gradreg.study.l2_probe import Probe
from gradreg.train import recipe as recipes
from gradreg.train.recipe import configuration

RECIPE = """
data: {name: digits, train_size: 300}
model: {name: mlp, hidden: [32], gain: 2.0}
optimizer: {name: sgd, lr: 0.05, momentum: 0.0}
schedule: {name: cosine}
batch_size: 30
threads: 1
device: cpu
"""  # 270 images to train on, 9 steps an epoch


def made(accuracies: list[float], **changes: object) -> Probe:
    values = {
        "l2": 0.2,
        "learning_rate": 0.1,
        "momentum": 0.0,
        "steps": [10 * (i + 1) for i in range(len(accuracies))],
        "accuracies": accuracies,
        "probe_steps": 10 * len(accuracies),
        "budget_steps": 1000,
        "budget_learning_rate": 0.05,
    }
    return Probe(**{**values, **changes})  # type: ignore[arg-type]


def test_prediction_is_the_constant_over_the_budgets_clock():
    probe = made([0.1, 0.5, 0.8, 0.8, 0.6, 0.5])
    assert probe.best_step == 30  # the first of the two
    assert probe.constant == pytest.approx(0.1 * 0.2 * 30)
    assert probe.predicted_l2() == pytest.approx(0.6 / (0.05 * 1000))
    assert probe.result()["predicted_l2"] == probe.predicted_l2()


def test_momentum_is_in_the_constant_and_cancels_in_the_prediction():
    probe, heavy = made([0.1, 0.5, 0.8, 0.6, 0.5]), made([0.1, 0.5, 0.8, 0.6, 0.5], momentum=0.9)
    assert heavy.constant == pytest.approx(10 * probe.constant)
    assert heavy.predicted_l2() == pytest.approx(probe.predicted_l2())


def test_a_best_accuracy_at_the_end_is_rejected_with_advice():
    probe = made([0.1 * i for i in range(10)])
    assert probe.result()["predicted_l2"] is None
    with pytest.raises(
        ValueError, match=r"best validation accuracy came at step 100 of 100.*Probe longer .* or with a larger L2 .*now 0.2"
    ):
        probe.predicted_l2()


def test_smoothing_is_a_centred_mean():
    probe = made([0.1, 0.9, 0.1, 0.6, 0.7, 0.6, 0.2], smooth=3)
    assert probe.smoothed == pytest.approx([0.5, 1.1 / 3, 1.6 / 3, 1.4 / 3, 1.9 / 3, 0.5, 0.4])
    assert (made(probe.accuracies).best_step, probe.best_step) == (20, 50)


def test_mean_learning_rate_follows_the_schedule():
    config = configuration({"schedule": {"name": "cosine", "min_lr": 0.0}, "optimizer": {"lr": 0.2}, "epochs": 10})
    assert l2_probe.mean_learning_rate(config) == pytest.approx(0.1, rel=0.02)
    assert l2_probe.mean_learning_rate(configuration({"schedule": {"name": "constant"}, "optimizer": {"lr": 0.2}})) == 0.2


def test_the_probe_is_short_constant_and_validated_out_of_the_training_images():
    settings = yaml.safe_load(RECIPE)
    plan = l2_probe.make_plan(configuration(settings), budget_epochs=100, probe_l2=0.5, probe_epochs=4)
    assert (plan.config.epochs, plan.config.schedule.name, plan.config.optimizer.weight_decay) == (4, "constant", 0.5)
    assert (plan.config.data.validation, plan.config.data.training_images()) == (0.1, 270)
    assert (plan.budget.epochs, plan.budget.schedule.name, plan.share) == (100, "cosine", 0.04)
    kept = l2_probe.make_plan(
        configuration({**settings, "data": {"name": "digits", "train_size": 300, "validation": 60}}),
        budget_epochs=9,
        probe_l2=1,
        probe_epochs=4,
    )
    assert kept.config.data.training_images() == 240


@pytest.mark.parametrize(("optimizer", "momentum"), [({"name": "sgd", "momentum": 0.9}, 0.9), ({"name": "adamw"}, 0.0)])
def test_the_clock_of_decoupled_decay_has_no_momentum(optimizer, momentum):
    settings = {**yaml.safe_load(RECIPE), "optimizer": {**optimizer, "lr": 0.01}}
    plan = l2_probe.make_plan(configuration(settings), budget_epochs=100, probe_l2=0.1, probe_epochs=1, measure_every=3)
    probe = l2_probe.run_probe(plan)
    assert (probe.momentum, probe.steps, probe.budget_steps) == (momentum, [3, 6, 9], 900)
    assert [(30 * accuracy) % 1 for accuracy in probe.accuracies] == [0, 0, 0]  # of 30 validation images, not of 1,497 test images


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def test_probe_predicts_draws_and_writes_the_recipe(recipe, tmp_path, capsys):
    words = ["l2", "probe", str(recipe), "--budget-epochs", "200", "--probe-epochs", "10", "--probe-l2", "1.0", "--measure-every", "2"]
    assert cli.main([*words, "--apply", "applied.yaml"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "runs/mine-l2-probe/probe.json").read_text())
    assert found["predicted_l2"] == pytest.approx(found["constant"] / (found["budget_learning_rate"] * found["budget_steps"]))
    assert f"predicted weight decay for 200 epochs (1800 steps): {found['predicted_l2']:.4g}" in printed
    assert "5 % of the budget" in printed
    assert "mean learning rate of the budget under its schedule: 0.025" in printed
    assert (tmp_path / "runs/mine-l2-probe/probe.png").read_bytes().startswith(b"\x89PNG")
    applied = configuration(recipes.load("applied.yaml").settings())
    assert (applied.epochs, applied.optimizer.weight_decay) == (200, pytest.approx(found["predicted_l2"], rel=1e-3))
    assert (applied.schedule.name, applied.data.validation) == ("cosine", None)


def test_probe_that_still_rises_predicts_nothing_and_writes_no_recipe(recipe, tmp_path, capsys):
    words = ["l2", "probe", str(recipe), "--budget-epochs", "200", "--probe-epochs", "2", "--probe-l2", "1e-4", "--measure-every", "6"]
    assert cli.main([*words, "--apply", "applied.yaml"]) == 1
    assert "no prediction: the best validation accuracy came at step 18 of 18" in capsys.readouterr().out
    assert not (tmp_path / "applied.yaml").exists()
    assert json.loads((tmp_path / "runs/mine-l2-probe/probe.json").read_text())["predicted_l2"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget-epochs", "1"], "--budget-epochs must not be shorter than the probe, 2 epochs; got 1."),
        (["--budget-epochs", "50", "--probe-l2", "-0.1"], "--probe-l2 must be finite and > 0; got -0.1."),
        (["--budget-epochs", "50", "--data.validation", "0"], "data.validation must be a share > 0 and < 1"),
        (["--budget-epochs", "50", "--smooth", "2"], "--smooth must be odd, for a mean centred on each measurement; got 2. Use 3."),
        (
            ["--budget-epochs", "50", "--measure-every", "10"],
            "--measure-every must leave at least 3 measurements in the probe's 18 steps; got 10.",
        ),
        (
            ["--budget-epochs", "50", "--measure-every", "1", "--apply", "x.txt"],
            "--apply must name a file that ends in .yaml; got 'x.txt'.",
        ),
        (["--budget-epochs", "50", "--measur-every", "1"], "unknown option '--measur-every'. Did you mean '--measure-every'?"),
    ],
)
def test_bad_probes_are_refused(recipe, words, message, capsys):
    assert cli.main(["l2", "probe", str(recipe), *words]) == 2
    assert message in capsys.readouterr().err


def test_clock_prints_the_timescale_and_transfers(capsys):
    words = ["l2", "clock", "--lr", "0.1", "--weight-decay", "1e-3", "--batch-size", "100", "--samples", "50000"]
    assert cli.main([*words, "--epochs", "40", "--to-batch-size", "400", "--to-lr", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "lr * weight decay: 0.0001" in printed
    assert "timescale: 1e+04 steps = 20 epochs" in printed
    assert "clock after 40 epochs: 2 timescales" in printed
    assert "with lr 0.2, batch size 400, 50000 samples: weight decay 0.002" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("clock --lr 0.1 --weight-decay -1e-3 --batch-size 100 --samples 50000", "weight_decay must be finite and > 0; got -0.001."),
        ("clock --lr x --weight-decay 1e-3 --batch-size 100 --samples 50000", "argument --lr: invalid float value: 'x'"),
        (f"clock --lr 0.1 --weight-decay 1e-3 --batch-size {'9' * 400} --samples 50000", "batch_size must be < 2**63; got 99"),
        (f"clock --lr 0.1 --weight-decay 1e-3 --batch-size 100 --samples {'9' * 400}", "samples must be < 2**63; got 99"),
        ("clock --lr 1e-200 --weight-decay 1e-200 --batch-size 100 --samples 5", "must be a share, > 0 and finite"),
        ("clock --lr 1e300 --weight-decay 1e300 --batch-size 100 --samples 5", "must be a share, > 0 and finite"),
        ("clok", "unknown action of gradreg l2 'clok'. Did you mean 'clock'? Known: probe, clock."),
    ],
)
def test_bad_clocks_are_refused(words, message, capsys):
    assert cli.main(["l2", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_compare_takes_the_run_without_l2_for_its_baseline():
    from gradreg.study.plan import make_plan
    from gradreg.train.task import RecipeTask

    recipe = recipes.load("l2-fc-digits")
    plan = make_plan(RecipeTask(recipe), ["auto", "l2-1e-2"], seeds=1)
    assert (plan.baseline, list(plan.variants)) == ("l2-0", ["l2-0", "auto", "l2-1e-2"])
    assert [job.evaluations for job in plan.jobs({})] == [2000] * 3  # 1,000 images in batches of 50, 100 epochs


def test_shipped_l2_recipes_are_there():
    for name in ("l2-fc-mnist", "l2-fc-digits"):
        recipe = recipes.load(name)
        assert {"l2-0", "l2-1e-4", "l2-1e-1", "auto"} <= set(recipe.variants)
