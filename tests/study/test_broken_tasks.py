"""Tasks that break the rules of a study, fail or say too little: the error or the warning that names the line and the remedy."""

from __future__ import annotations

import json
import re

import pytest

import gradreg
from gradreg import cli, study
from gradreg.study.functions import load_task
from gradreg.study.tasks import TaskError
from tests.study.task_texts import LOOP, MODEL, STEP, task_text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must have a task; got none"),
        (task_text("pass") + "\n@study.task(metric='a')\ndef other(run): pass\n", r"several tasks, other, train: name one"),
        (task_text("pass", signature=""), "must take the run first"),
        (task_text("pass", signature="run, *, lr"), r"option 'lr' of task 'train' \(mine.py, line 5\) must have a default value"),
        (task_text("pass", signature="run, *, seeds: int = 1"), "must not have the name of an option of gradreg compare; got seeds"),
        (task_text("pass", header='@study.task(metric="test_accuracy")'), "must be named without test_ or validation_"),
        (task_text("pass", header='@study.task(metric="accuracy", mode="maximum")'), "unknown mode 'maximum'"),
        (task_text("pass"), r"none, seed 0: the task must ask how long to train"),
        (task_text("for epoch in run.epochs(2): run.log(test_accuracy=0.5)"), "must take its gradients from the run"),
        (task_text(f"{MODEL}for epoch in run.epochs(2): run.log(test_accuracy=0.5)"),
         r"never called run.regularizer\(model\).backward\(...\).*\(mine.py, line 5\)"),
        (task_text(f"{MODEL}for epoch in run.epochs(2):\n    {STEP}"),
         r"must log its metric as test_accuracy; got no metrics at all\. Write run.log"),
        (task_text(LOOP.replace("test_accuracy", "accuracy")), r"must log its metric as test_accuracy; got accuracy"),
        (task_text(LOOP.replace("0.5 +", "50 +")), r"test_accuracy must be a share between 0 and 1.*got 50"),
        (task_text(LOOP + "run.epochs(3)"), r"must be asked for once; got run.epochs\(3\) after run.epochs\(2\)"),
        (task_text("KEPT or KEPT.append(run.regularizer(MODEL))\nrun.regularizer(MODEL).backward(lambda: MODEL(torch.ones(1, 1)).sum())\n"
               "for epoch in run.epochs(1):\n    KEPT[0].backward(lambda: MODEL(torch.ones(1, 1)).sum())\n    run.log(test_accuracy=0.5)"),
         "must use a regularizer of its own; got one that an earlier run made"),
    ],
)  # fmt: skip
def test_a_task_that_breaks_the_rules(tmp_path, capsys, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    status = cli.main(
        ["compare", str(path), "--penalties", "sam:rho=0.1", "--seeds", "2", "--workers", "0", "--out", str(tmp_path / "out")]
    )
    printed = capsys.readouterr()
    assert status == 2, printed.out
    assert re.search(message, printed.err), printed.err


def test_an_unknown_penalty_is_refused_before_the_function_is_called(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(task_text("raise AssertionError('called')"))
    assert cli.main(["compare", str(path), "--penalties", "smam:rho=0.1", "--workers", "0", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "unknown variant or penalty 'smam'. Did you mean 'sam'?" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


LEFT = (
    r"2 of 2 runs returned after 1 of 2 epochs, so that compute is not matched\. Leave the loop by its end, or call "
    r"run.epochs with the epochs that it trains\. \(mine.py, line 5\)"
)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (LOOP.replace("epochs(2):", "epochs(2):\n    if epoch: break"), LEFT),
        (LOOP + "\n    break", LEFT),
        (LOOP.replace("test_accuracy=", "test_accuracy=float('nan') or "),
         r"without a loss that is not finite\. Log 0.0, say, where the metric is not defined\. \(mine.py, line 5\)"),
        (LOOP.replace("0.5 + 0.1 * run.seed", "0.5"), r"every seed gave the same result \(mine.py, line 5\). The task must use run.seed"),
    ],
)  # fmt: skip
def test_what_a_reader_must_know_is_said_beside_the_table(tmp_path, capsys, body, message):
    path = tmp_path / "mine.py"
    path.write_text(task_text(body))
    assert (
        cli.main(["compare", str(path), "--penalties", "sam:rho=0.1", "--seeds", "2", "--workers", "0", "--out", str(tmp_path / "out")])
        == 0
    )
    assert re.search(message, capsys.readouterr().out)


def test_a_run_that_raises_is_one_failed_run_and_the_study_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "mine.py"
    path.write_text(task_text("if run.penalty is not None and run.seed == 1: raise ArithmeticError('no luck')\n" + LOOP))
    out = tmp_path / "out"
    assert cli.main(["compare", str(path), "--penalties", "sam:rho=0.1", "--seeds", "3", "--workers", "0", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "failed: ArithmeticError: no luck (mine.py, line 7)" in printed
    assert "(1 of 3 failed)" in printed
    assert "1 of 3 runs failed" in (out / "report.html").read_text()
    assert "raise ArithmeticError('no luck')" in (out / "runs" / "sam-rho-0.1" / "seed-1" / "error.txt").read_text()
    verdict = json.loads((out / "results.json").read_text())["table"][-1]["difference"]
    assert verdict["decision"] == "diverged"
    # Started again, only what failed is run.
    path.write_text(path.read_text().replace("no luck", "no luck"))
    assert cli.main(["compare", str(path), "--penalties", "sam:rho=0.1", "--seeds", "3", "--workers", "0", "--out", str(out)]) == 1
    assert "9 runs, 8 of them already there" in capsys.readouterr().out


def test_a_metric_that_is_not_finite_is_a_diverged_run(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(task_text(LOOP.replace("0.5 + 0.1 * run.seed", "float('nan') if run.penalty else 0.5 + 0.1 * run.seed")))
    found = study.compare(str(path), penalties=["sam:rho=0.1"], seeds=2, rivals=["epochs"], workers=0, out=tmp_path / "out")
    assert [(r.diverged, r.test) for r in found.records if r.variant != "none"] == [(True, None)] * 2
    assert found.verdicts["sam:rho=0.1"].decision == "diverged"


def test_task_errors_stop_a_study_in_python_too(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(task_text("for epoch in run.epochs(2): run.log(test_accuracy=0.5)"))
    with pytest.raises(TaskError, match="must take its gradients from the run"):
        study.compare(str(path), penalties=["sam:rho=0.1"], workers=0, out=tmp_path / "out")


def test_a_file_that_ends_the_program_when_it_is_imported_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("\nraise SystemExit(3)")
    with pytest.raises(
        ValueError, match=r"'.*broken.py' cannot be imported: SystemExit in line 2: 3\. Put what it runs by itself under if"
    ):
        load_task(str(tmp_path / "broken.py"))


def test_a_plain_function_is_told_what_is_missing():
    def train(run): ...

    with pytest.raises(TypeError, match=r"must be decorated with @study.task; got the plain function train"):
        study.compare(train, penalties={"sam": gradreg.sam(rho=0.1)})
