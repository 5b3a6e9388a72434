"""A function of one's own as a task: what it receives, what it leaves, what is fair, and what is told when it breaks the rules."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import gradreg
from gradreg import cli, study
from gradreg.study.functions import load_task
from tests.study.task_texts import LOOP, MODEL, STEP, task_text

TASK = '''
import torch
from gradreg import study

@study.task(metric="rmse", mode="min")
def train(run: study.Run, *, lr: float = 0.05, width: int = 4, epochs: int = 3) -> None:
    """A regression on noise."""
    data = torch.Generator().manual_seed(run.seed)
    x = torch.randn(60, 3, generator=data)
    y = x.sin().sum(1, keepdim=True) + 0.3 * torch.randn(60, 1, generator=data)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
    regularizer = run.regularizer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rmse = lambda rows: (model(x[rows]) - y[rows]).square().mean().sqrt()
    for epoch in run.epochs(epochs):
        for start in (0, 20):
            rows = slice(start, start + 20)
            optimizer.zero_grad()
            loss = regularizer.backward(lambda: (model(x[rows]) - y[rows]).square().mean())
            optimizer.step()
        with torch.no_grad():
            run.log(loss=loss, validation_rmse=rmse(slice(40, 50)), test_rmse=rmse(slice(50, 60)))
'''
PENALTIES = {
    "none": None,
    "sam": gradreg.sam(rho=0.1),
    "late": gradreg.sam(rho=0.1).warmup("zero", steps=3),
    "cgr": "cgr:gamma=0.1,epsilon=0.1",
}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(TASK)
    return path


def in_this_process(task, out, **options):
    return study.compare(task, **{"penalties": PENALTIES, "seeds": 2, "out": out, "workers": 0, **options})


def test_every_variant_and_seed_and_longer_baselines_of_counted_gradients(mine, tmp_path):
    found = in_this_process(str(mine), tmp_path / "out")
    runs = sorted((r.variant, r.budget, r.seed, r.epochs, r.gradient_evaluations) for r in found.records)
    # "late" has no penalty at the first three of its six steps: 9 evaluations, as many as 4.5 epochs, so that 5 are trained.
    costs = {"none": 6, "sam": 12, "late": 9, "cgr": 18}
    expected = [(name, "epochs", s, 3, cost) for name, cost in costs.items() for s in (0, 1)]
    expected += [("none", "gradients", s, epochs, 2 * epochs) for epochs in (5, 6, 9) for s in (0, 1)]
    assert runs == sorted(expected)
    assert {row.label: row.cost for row in found.rows}["sam"] == 2.0
    assert (tmp_path / "out" / "results.json").is_file()


def test_a_run_is_the_loop_written_by_hand(mine, tmp_path):
    found = in_this_process(str(mine), tmp_path / "out", penalties={"sam": gradreg.sam(rho=0.1)}, seeds=1, rivals=["epochs"])
    torch.manual_seed(0)
    namespace: dict = {}
    text = TASK.replace("run.regularizer(model)", "run.made(model)")
    exec(compile(text, "by_hand.py", "exec"), namespace)
    logged = []

    class ByHand:
        seed = 0

        def made(self, model):
            return gradreg.torch.GradientRegularizer(model, gradreg.sam(rho=0.1))

        def epochs(self, n):
            return range(n)

        def log(self, **metrics):
            logged.append({name: float(value) for name, value in metrics.items()})

    torch.manual_seed(0)
    namespace["train"].function(ByHand())
    sam = next(r for r in found.records if r.variant == "sam")
    assert sam.test == logged[-1]["test_rmse"]
    best = min(range(3), key=lambda i: logged[i]["validation_rmse"])
    assert (sam.best_epoch, sam.best_test) == (best + 1, logged[best]["test_rmse"])


def test_results_frame_table_and_page(mine, tmp_path):
    found = in_this_process(str(mine), tmp_path / "out", penalties=["sam:rho=0.1", "sam:rho=0.1@width=8"])
    frame = found.to_frame()
    assert {"variant", "seed", "budget", "test_rmse", "validation_rmse", "best_test_rmse", "gradient_evaluations"} <= set(frame.columns)
    assert len(frame) == len(found.records) == 8
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (written["schema"], written["metric"]) == (1, {"name": "rmse", "mode": "min", "percent": False})
    assert written["configuration"]["sam:rho=0.1@width=8"]["width"] == 8
    assert set(found.verdicts) == {"sam:rho=0.1", "sam:rho=0.1@width=8"}
    assert "over plain, stopped early" in found.markdown()
    assert "stopped at the epoch with the best validation metric" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_workers_give_what_one_process_gives_and_complete_runs_are_kept(mine, tmp_path, capsys):
    alone = in_this_process(str(mine), tmp_path / "a", penalties=["sam:rho=0.1"])
    words = ["compare", str(mine), "--penalties", "sam:rho=0.1", "--seeds", "2", "--workers", "2", "--out", str(tmp_path / "b")]
    assert cli.main(words) == 0
    written = json.loads((tmp_path / "b" / "results.json").read_text())
    assert [r["test_rmse"] for r in written["runs"]] == [r.test for r in alone.records]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").rglob("result.json")}
    assert cli.main(words) == 0
    assert "6 runs, 6 of them already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "b").rglob("result.json")} == before
    # Another configuration, or another version of the file, is not mixed into them.
    assert cli.main([*words, "--lr", "0.1"]) == 2
    assert "it differs in lr" in capsys.readouterr().err
    mine.write_text(TASK + "\n# changed\n")
    assert cli.main(words) == 2
    assert "its source, which has changed since" in capsys.readouterr().err
    assert cli.main([*words, "--fresh"]) == 0
    assert len(list(tmp_path.glob("b*"))) == 2


def test_results_that_were_exchanged_are_named(mine, tmp_path, capsys):
    words = ["compare", str(mine), "--penalties", "sam:rho=0.1", "--seeds", "2", "--workers", "0", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    one, other = (tmp_path / "out" / "runs" / "none" / f"seed-{seed}" / "result.json" for seed in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second), other.write_bytes(first)
    capsys.readouterr()
    assert cli.main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "result.json' must belong to the config.json beside it; it was written beside another. Remove the folder" in said
    for file in (one, other):
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_bytes()).items() if k != "configuration"}))
    assert cli.main(words) == 0  # an older result does not say what it belongs to


def test_plain_training_with_another_option_is_a_variant_and_not_the_baseline(mine, tmp_path):
    given = {"wide": {"penalty": None, "width": 8}, "sam": {"penalty": "sam:rho=0.1", "lr": 0.1}}
    found = in_this_process(str(mine), tmp_path / "out", penalties=given, rivals=["epochs"], options={"epochs": 2})
    assert found.plan.baseline == "none"
    settings = {name: dict(variant.settings) for name, variant in found.plan.variants.items()}
    assert {name: (one["width"], one["lr"], one["epochs"]) for name, one in settings.items()} == {
        "none": (4, 0.05, 2), "wide": (8, 0.05, 2), "sam": (4, 0.1, 2),
    }  # fmt: skip
    assert set(found.verdicts) == {"wide", "sam"}
    assert (
        study.compare(str(mine), penalties=given | {"plain": None}, seeds=1, out=tmp_path / "o", workers=0, rivals=[]).plan.baseline
        == "plain"
    )


def test_a_recipe_by_its_name_with_changed_keys(tmp_path):
    options = {"epochs": 1, "data.train_size": 100, "data.validation": None, "trackers": []}
    found = in_this_process(
        "digits-noisy-labels", tmp_path / "out", penalties=["sam", "fgr:gamma=0.1,epsilon=0.1"], options=options, seeds=1
    )
    assert found.plan.baseline == "none"
    assert {variant.settings["data"]["train_size"] for variant in found.plan.variants.values()} == {100}
    assert [record.gradient_evaluations for record in found.records if record.variant != "none"] == [2, 2]


def test_every_row_says_its_own_name(mine, tmp_path):
    found = in_this_process(str(mine), tmp_path / "out", penalties=["sam:rho=0.1"])
    for row in json.loads((tmp_path / "out" / "results.json").read_text())["table"]:
        assert row["verdict"] is None if row["label"] == "none" else row["verdict"].startswith(row["label"])
    gradients = in_this_process(str(mine), tmp_path / "out", penalties=["sam:rho=0.1"], rivals=["gradients"])
    assert gradients.verdicts == {}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["table"][-1]["verdict"].startswith("sam:rho=0.1")
    assert len(found.records) == len(gradients.records)


def test_no_option_of_the_command_can_be_an_option_of_a_task():
    from gradreg.study.command import OPTIONS
    from gradreg.study.functions import RESERVED

    assert {option.removeprefix("--").replace("-", "_") for option, _ in OPTIONS} <= set(RESERVED)


def test_the_task_may_stand_after_options(mine, tmp_path):
    words = [
        "--penalties",
        "sam:rho=0.1",
        "--rivals",
        "epochs",
        "--seeds",
        "1",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "out"),
        str(mine),
    ]
    assert cli.main(["compare", *words, "--epochs", "1"]) == 0


def test_steps_that_are_declared_are_counted_once_however_often_metrics_are_logged(tmp_path, monkeypatch):
    """At every step's own cost, and without going through the earlier ones again."""
    asked = []
    penalty = gradreg.sam(rho=0.1).warmup("zero", steps=3)
    cost = type(penalty).evaluations_at
    monkeypatch.setattr(type(penalty), "evaluations_at", lambda self, step, **options: asked.append(step) or cost(self, step, **options))
    run = study.Run(penalty, 0, tmp_path, metric=load_task_metric())
    run._functions.append(type("Traced", (), {"calls": 0, "evaluations": 0})())
    for _ in run.epochs(2):
        for _ in run.steps(4):
            run.log(loss=1.0)
    run.log(test_loss_of_test=1.0)
    assert run.finish()["gradient_evaluations"] == 3 + 5 * 2
    assert asked == list(range(8))


def load_task_metric():
    from gradreg.study.tasks import Metric

    return Metric("loss_of_test", "min")


def test_what_is_logged_before_the_first_step_is_at_step_0(tmp_path):
    run = study.Run(gradreg.sam(rho=0.1), 0, tmp_path, metric=load_task_metric())
    model = torch.nn.Linear(1, 1)
    regularizer = run.regularizer(model)
    total = len(run.steps(5))
    run.log(test_score=0.0)
    for _ in range(total):
        regularizer.backward(lambda: model(torch.ones(1, 1)).square().sum())
        run.log(test_score=0.0)
    assert [record["step"] for record in run._records] == [0, 1, 2, 3, 4, 5]


def test_options_of_the_command_line(mine, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["compare", f"{mine}:train", "--penalties", "sam:rho=0.1", "--seeds", "1", "--workers", "0", "--out", out]
    assert cli.main([*words, "--width", "wide"]) == 2
    assert "width" in capsys.readouterr().err
    assert cli.main([*words, "--wdith", "8"]) == 2
    assert "unknown option '--wdith'. Did you mean '--width'?" in capsys.readouterr().err
    assert cli.main([*words, "--epochs", "1", "--lr", "1e-2"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["configuration"]["none"]["lr"] == 0.01
    with pytest.raises(SystemExit, match="0"):
        cli.main(["compare", str(mine), "--help"])
    assert "--width" in capsys.readouterr().out


def test_what_an_integration_trains_with_is_counted(tmp_path):
    path = tmp_path / "mine.py"
    body = f"""
    class Integration:
        regularizer = None
    made = Integration()
    run.count(made, steps=lambda: 2)
    if run.penalty is not None:  # as Lightning's callback, which makes none for plain training
        from gradreg.torch import GradientRegularizer
        model = torch.nn.Linear(1, 1)
        made.regularizer = regularizer = GradientRegularizer(model, run.penalty)
        for _ in range(2):
            {STEP}
    epochs = len(run.epochs(2))
    run.log(test_accuracy=0.1 * epochs + 0.01 * run.seed)
    """
    path.write_text(task_text(body))
    found = in_this_process(str(path), tmp_path / "out", penalties=["sam:rho=0.1"])
    assert sorted({(r.variant, r.budget, r.epochs, r.gradient_evaluations) for r in found.records}) == [
        ("none", "epochs", 2, 2),
        ("none", "gradients", 4, 2),
        ("sam:rho=0.1", "epochs", 2, 4),
    ]
    assert not any(r.warnings for r in found.records)
    with pytest.raises(TypeError, match=r"made must have a regularizer; got 3"):
        study.Run(None, 0, tmp_path, metric=found.plan.metric).count(3)


def test_steps_without_epochs_are_lengthened_too(tmp_path):
    path = tmp_path / "mine.py"
    log = "run.log(test_accuracy=run.total_steps / 100 + run.seed / 1000)"
    path.write_text(task_text(f"{MODEL}for step in run.steps(7):\n    {STEP}{log}\n"))
    found = in_this_process(str(path), tmp_path / "out", penalties=["cgr:gamma=0.1,epsilon=0.1"])
    assert {(r.budget, r.gradient_evaluations): round(r.test, 2) for r in found.records if r.variant == "none"} == {
        ("epochs", 7): 0.07,
        ("gradients", 21): 0.21,
    }


def test_a_task_without_a_file_runs_in_this_process_and_says_so(tmp_path):
    namespace: dict = {"__name__": "__main__"}
    exec(compile(TASK, "<cell 3>", "exec"), namespace)
    with pytest.warns(UserWarning, match="has no file that a worker could import it from"):
        found = study.compare(
            namespace["train"], penalties={"sam": gradreg.sam(rho=0.1)}, seeds=1, out=tmp_path, rivals=["epochs"], workers=2
        )
    assert len(found.records) == 2


def test_modules_by_name_and_what_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "package_of_tasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_task("package_of_tasks:train").metric.name == "rmse"
    with pytest.raises(ValueError, match=r"unknown task in package_of_tasks: 'trian'. Did you mean 'train'\?"):
        load_task("package_of_tasks:trian")
    with pytest.raises(ValueError, match="must be a module that can be imported"):
        load_task("no_such_module:train")
    with pytest.raises(ValueError, match="must be a file with a task"):
        load_task("no_such_file.py")


@pytest.mark.slow
def test_a_jax_task_is_counted_and_does_not_import_torch(tmp_path):
    path = tmp_path / "jaxtask.py"
    path.write_text(
        textwrap.dedent(
            """
            import jax, jax.numpy as jnp
            from gradreg import study

            @study.task(metric="loss_of_test", mode="min")
            def eager(run):
                loss = lambda w, x: jnp.mean((x @ w - 1.0) ** 2)
                grad = run.value_and_grad(loss, state=True)
                w = jax.random.normal(jax.random.key(run.seed), (3,)); state = grad.init(w)
                for step in run.steps(4):
                    value, g, state = grad(w, jnp.eye(3), step=step, state=state)
                    w = w - 0.1 * g
                run.log(test_loss_of_test=loss(w, jnp.eye(3)))

            @study.task(metric="loss_of_test", mode="min")
            def jitted(run):
                loss = lambda w, x: jnp.mean((x @ w - 1.0) ** 2)
                grad = run.value_and_grad(loss)
                steps = run.steps(4)
                def body(w, step):
                    value, g = grad(w, jnp.eye(3), step=step)
                    return w - 0.1 * g, value
                w = jax.random.normal(jax.random.key(run.seed), (3,))
                w, _ = jax.jit(lambda w: jax.lax.scan(body, w, jnp.arange(len(steps))))(w)
                run.log(test_loss_of_test=loss(w, jnp.eye(3)))
            """
        )
    )
    script = f"""
import sys
from gradreg import study
import gradreg
for name in ("eager", "jitted"):
    found = study.compare({str(path)!r} + ":" + name, penalties=["sam:rho=0.1"], seeds=2, out={str(tmp_path)!r} + "/" + name, workers=0)
    print([r.gradient_evaluations for r in found.records], "torch" in sys.modules)
    try:
        study.compare({str(path)!r} + ":jitted", penalties=["friendly_sam:rho=0.1"], seeds=1, out={str(tmp_path / "s")!r}, workers=0)
    except ValueError as error:
        print("state must be True" in str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[4, 8, 8, 4, 8, 8] False", "True"] * 2, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at the processes of a session in /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL", "SIGINT"])
def test_no_worker_outlives_the_comparison_however_it_ends(tmp_path, name):
    import signal

    path = tmp_path / "mine.py"
    path.write_text(task_text("import time\n" + LOOP.replace("run.epochs(2):", "run.epochs(2000):\n    time.sleep(0.05)")))
    words = [
        sys.executable,
        "-m",
        "gradreg",
        "compare",
        str(path),
        "--penalties",
        "sam:rho=0.1",
        "--workers",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size for file in tmp_path.rglob("metrics.jsonl")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))  # to the parent alone
    process.communicate(timeout=60)
    assert process.returncode == {"SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9, "SIGINT": 130}[name]
    deadline = time.monotonic() + 30
    while left := [p for p in Path("/proc").glob("[0-9]*") if session_of(p) == process.pid]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def session_of(entry: Path) -> int | None:
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


def test_a_second_writer_is_told_who_holds_the_folder(mine, tmp_path):
    from gradreg.folders import FolderInUse, locked

    with locked(tmp_path / "out", purpose="--out"), pytest.raises(FolderInUse, match=r"written by process \d+"):
        in_this_process(str(mine), tmp_path / "out")


def test_a_tail_is_a_share_of_the_steps_that_the_run_says(mine: Path, tmp_path: Path) -> None:
    mine.write_text(TASK.replace("run.regularizer(model)", "run.regularizer(model, total_steps=2 * epochs)"))
    found = in_this_process(str(mine), tmp_path / "with", penalties=["sam:rho=0.1,tail=0.5"], seeds=1)
    assert [r.gradient_evaluations for r in found.records if r.variant != "none"] == [9]
    (variant,) = (v for name, v in found.plan.variants.items() if name != "none")
    assert "in the last 50 % of the steps" in variant.method
    run = study.Run(gradreg.sam(rho=0.1).tail(0.5), 0, tmp_path, metric=found.plan.metric)
    with pytest.raises(ValueError, match=r"total_steps must be known .*in a task of a study run.regularizer\(model, total_steps=...\)"):
        run.regularizer(torch.nn.Linear(1, 1)).backward(lambda: torch.zeros((), requires_grad=True))
    run.steps(10)
    assert run.penalty == gradreg.sam(rho=0.1).tail(0.5, total_steps=10)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lr", "!!int ''", "got one that the parser cannot convert: string index out of range. Quote it"),
        ("--margin", "!!int ''", "got one that the parser cannot convert"),
        ("--workers", "- " * 2000, "nested hundreds deep"),
        ("--until", "- " * 2000, "nested hundreds deep"),
        ("--lr", "9" * 400, r"< 1\.8e308"),
        ("--margin", "9" * 400, r"< 1\.8e308"),
    ],
)
def test_a_value_that_no_parser_converts_is_an_error_that_names_its_option(mine, tmp_path, capsys, option, value, message):
    words = ["compare", f"{mine}:train", "--penalties", "sam:rho=0.1", "--workers", "0", "--out", str(tmp_path / "out")]
    assert cli.main([*words, option, value]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"gradreg: error: {option} ")
    assert re.search(message, shown)
    assert cli.main([*words, f"{option}={value}"]) == 2
    assert capsys.readouterr().err == shown
