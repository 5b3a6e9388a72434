"""What a task logs beside its metric: in the run's result, in results.json, in the terminal and on the page."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from gradreg import cli, study
from gradreg.study import logged

TASK = '''
import torch
from gradreg import study

@study.task(metric="rmse", mode="min")
def train(run: study.Run, *, epochs: int = 2) -> None:
    """A line."""
    model = torch.nn.Linear(1, 1)
    regularizer = run.regularizer(model)
    for epoch in run.epochs(epochs):
        regularizer.backward(lambda: model(torch.ones(1, 1)).sum())
        penalized = run.penalty is not None
        forgotten = 9.0 if epoch == 0 else 0.5 + epoch / 2 + run.seed**2 - penalized * (2 + run.seed % 2)
        run.log(loss=1.0, validation_rmse=1.0, test_rmse=1.0 + run.seed, forgetting=forgotten)
    run.log(loss_in_4_bits=float("nan") if penalized and run.seed == 1 else 3.0 + run.seed)
'''


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(TASK)
    return path


def test_the_last_value_its_mean_and_the_paired_difference(mine, tmp_path):
    found = study.compare(str(mine), penalties=["sam:rho=0.1"], seeds=4, out=tmp_path / "out", workers=0)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    runs = {(run["variant"], run["budget"], run["seed"]): run for run in written["runs"]}
    assert runs["none", "epochs", 2]["logged"] == {"forgetting": 5.0, "loss_in_4_bits": 5.0}
    assert runs["sam:rho=0.1", "epochs", 1]["logged"] == {"forgetting": -1.0, "loss_in_4_bits": None}
    assert "loss" not in runs["none", "epochs", 2]["logged"]
    assert written["logged"] == found.logged
    assert written["logged"]["names"] == ["forgetting", "loss_in_4_bits"]
    none, longer, sam = written["logged"]["table"]
    assert (none["label"], longer["budget"], sam["label"]) == ("none", "gradients", "sam:rho=0.1")
    plain, own = np.array([1.0, 2.0, 5.0, 10.0]), np.array([-1.0, -1.0, 3.0, 7.0])
    assert (none["forgetting"]["mean"], none["forgetting"]["sd"]) == pytest.approx((plain.mean(), plain.std(ddof=1)))
    assert none["forgetting"]["difference"] is None
    assert longer["forgetting"]["difference"] == 1.0  # four epochs in place of two
    interval = stats.ttest_rel(own, plain).confidence_interval(0.95)
    cell = sam["forgetting"]
    assert (cell["difference"], cell["low"], cell["high"]) == pytest.approx(((own - plain).mean(), interval.low, interval.high))
    assert sam["loss_in_4_bits"]["runs"] == 3
    assert sam["loss_in_4_bits"]["difference"] == 0.0
    page = (tmp_path / "out" / "report.html").read_text()
    shown = page[page.index('<table id="logged">') : page.index("Means ± standard deviations over seeds; below")]
    assert "<th>loss in 4 bits</th>" in shown
    assert f"<td>2.00 ± 3.83<small>{cell['difference']:+.2f} [{cell['low']:+.2f}, {cell['high']:+.2f}]</small></td>" in shown
    assert logged.NOT_JUDGED in page


def test_the_command_prints_it_and_a_task_that_logs_nothing_else_has_none(mine, tmp_path, capsys):
    words = ["compare", str(mine), "--penalties", "sam:rho=0.1", "--seeds", "2", "--workers", "0", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert "forgetting, mean ± sd: none 1.50 ± 0.71; " in " ".join(capsys.readouterr().out.split())
    mine.write_text(
        TASK.replace("    run.log(loss_in_4_bits", "    dict(a").replace(", forgetting=", ", loss=").replace("loss=1.0, ", "", 1)
    )
    found = study.compare(str(mine), penalties=["sam:rho=0.1"], seeds=1, out=tmp_path / "other", workers=0)
    assert found.logged is None
    assert found.logged_said == []
    assert "logged" not in json.loads((tmp_path / "other" / "results.json").read_text())
    assert 'id="logged"' not in (tmp_path / "other" / "report.html").read_text()


def test_a_run_that_diverged_has_no_part_in_it(mine, tmp_path):
    mine.write_text(TASK.replace("test_rmse=1.0 + run.seed,", "test_rmse=float('nan') if penalized and run.seed == 1 else 1.0,"))
    found = study.compare(str(mine), penalties=["sam:rho=0.1"], seeds=3, out=tmp_path / "out", workers=0, rivals=["epochs"])
    assert [run.diverged for run in found.records if run.variant != "none"] == [False, True, False]
    none, sam = found.logged["table"]
    assert (none["runs"], sam["runs"]) == (3, 2)
    assert sam["forgetting"]["mean"] == pytest.approx((-1.0 + 3.0) / 2)
    assert sam["forgetting"]["difference"] == pytest.approx(-2.0)  # of seeds 0 and 2


def test_a_damaged_result_is_named(mine, tmp_path):
    study.compare(str(mine), penalties=["sam:rho=0.1"], seeds=1, out=tmp_path, workers=0, rivals=["epochs"])
    file = next(tmp_path.glob("runs/none/**/result.json"))
    result = json.loads(file.read_text())
    assert math.isfinite(result["logged"]["forgetting"])
    file.write_text(json.dumps({**result, "logged": {"forgetting": "much"}}))
    with pytest.raises(ValueError, match=r"it is damaged: logged\. Remove the run's folder"):
        study.compare(str(mine), penalties=["sam:rho=0.1"], seeds=1, out=tmp_path, workers=0, rivals=["epochs"])
