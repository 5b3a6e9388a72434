"""``gradreg compare`` end to end: runs, compute-matched baselines, results, interruption, divergence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gradreg import cli
from gradreg.train import recipe as recipes
from gradreg.train.loop import train
from gradreg.train.recipe import configuration
from gradreg.train.task import RecipeTask


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_results_hold_every_run_and_its_compute_matched_baseline(comparison):
    runs = results_of(comparison.folder)["runs"]
    found = sorted((r["variant"], r["budget"], r["seed"], r["gradient_evaluations"], r["diverged"]) for r in runs)
    expected = [("none", "epochs", s, 64, False) for s in range(3)] + [("none", "gradients", s, 128, False) for s in range(3)]
    expected += [(v, "epochs", s, 128, False) for v in ("gnp", "fgr") for s in range(3)]
    assert found == sorted(expected)
    assert all(0 < r["test_accuracy"] <= 1 and r["seconds"] > 0 for r in runs)


def test_a_run_in_a_worker_is_the_run_that_train_makes(comparison):
    recipe = recipes.load("digits-noisy-labels")
    config = configuration(recipe.settings("gnp", base={**recipe.base, "epochs": 8, "seed": 2}))
    alone = train(config).summary()
    (run,) = [r for r in results_of(comparison.folder)["runs"] if (r["variant"], r["seed"]) == ("gnp", 2)]
    assert run["test_accuracy"] == alone["test_accuracy"]


def test_the_table_is_that_of_the_runs(comparison):
    results = results_of(comparison.folder)
    accuracy = {
        (v, b): np.array([100 * r["test_accuracy"] for r in results["runs"] if (r["variant"], r["budget"]) == (v, b)])
        for v, b in [("none", "epochs"), ("none", "gradients"), ("gnp", "epochs"), ("fgr", "epochs")]
    }
    # Runs hold shares, and the table points of percent, as the metric's "percent" tells.
    assert results["metric"] == {"name": "accuracy", "mode": "max", "percent": True}
    rows = {(row["variant"], row["budget"]): row for row in results["table"]}
    for key, values in accuracy.items():
        assert rows[key]["mean"] == pytest.approx(values.mean())
        assert rows[key]["deviation"] == pytest.approx(values.std(ddof=1))
        for text in (f"{values.mean():.2f}", f"± {values.std(ddof=1):.2f}"):  # beside or below each other, as wide as the terminal is
            assert text in comparison.printed
    gnp = rows["gnp", "epochs"]
    assert gnp["difference"]["difference"] == pytest.approx((accuracy["gnp", "epochs"] - accuracy["none", "epochs"]).mean())
    assert gnp["matched_difference"]["difference"] == pytest.approx((accuracy["gnp", "epochs"] - accuracy["none", "gradients"]).mean())
    assert gnp["cost"] == 2.0
    assert f"report: {comparison.folder / 'report.html'}" in comparison.printed


def test_started_again_nothing_is_run_twice(comparison, capsys):
    before = {p: p.stat().st_mtime_ns for p in comparison.folder.rglob("weights.safetensors")}
    assert len(before) == 12
    assert cli.main(comparison.words) == 0
    assert "12 runs, 12 of them already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in comparison.folder.rglob("weights.safetensors")} == before


def test_an_ascii_terminal_of_40_columns_gets_the_table_of_a_complete_study(comparison, tmp_path):
    out = tmp_path / "größe"
    shutil.copytree(comparison.folder, out, symlinks=True)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40", "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "gradreg", *comparison.words[:-1], str(out)]
    done = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert all(byte < 128 and byte != 27 for byte in done.stdout)
    printed = done.stdout.decode()
    assert "12 runs, 12 of them already there" in " ".join(printed.split())
    assert "gr\\xf6\\xdfe/report.html" in printed
    table, there, _ = printed.partition("with 95 % intervals")
    assert there
    assert max(map(len, table.splitlines())) <= 40
    for row in results_of(out)["table"]:
        assert f"{row['mean']:.2f}" in table


def test_another_configuration_is_not_mixed_into_the_same_folder(comparison, capsys):
    assert cli.main([*comparison.words, "--batch_size", "50"]) == 2
    assert "holds a run of another configuration; it differs in batch_size" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="interrupts a process group")
def test_interrupted_it_leaves_no_process_and_goes_on_with_what_is_missing(tmp_path):
    words = ["compare", "--penalties", "none", "sam", "--seeds", "2", "--epochs", "20", "--workers", "1", "--out", str(tmp_path)]
    handled = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # in a shell's background jobs it is ignored, and children inherit that
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "gradreg", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, handled)
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.rglob("result.json")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "no run ended in time"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert gone(process.pid)
    done = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert 0 < len(done) < 6
    again = subprocess.run([sys.executable, "-m", "gradreg", *words], capture_output=True, text=True, check=True)
    assert f"6 runs, {len(done)} of them already there" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert len(results_of(tmp_path)["runs"]) == 6


def test_a_variant_that_diverges_is_reported_and_not_hidden(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "hot.yaml"
    path.write_text(
        "data: {train_size: 200}\nmodel: {name: mlp, hidden: [8]}\nepochs: 2\nthreads: 1\n"
        "variants: {none: {}, hot: {optimizer: {lr: 1.0e+12}, penalty: {name: sam, rho: 0.1}}}\n"
    )
    out = tmp_path / "out"
    assert cli.main(["compare", str(path), "--seeds", "2", "--workers", "1", "--out", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "diverged (2 of 2)" in printed
    assert "hot, SAM(rho 0.1): no result, of 2 runs it diverged in every one." in printed
    hot = [r for r in results_of(out)["runs"] if r["variant"] == "hot"]
    assert [(r["diverged"], r["test_accuracy"]) for r in hot] == [(True, None), (True, None)]
    assert "diverged (2 of 2)" in (out / "report.html").read_text()


def test_a_dead_worker_is_an_error_in_words_and_what_is_complete_stays(tmp_path, monkeypatch):
    from gradreg.study import plan as plans
    from gradreg.study.executors import local
    from gradreg.study.running import run_jobs

    recipe = recipes.load("digits-noisy-labels")
    base = {**recipe.settings(), "epochs": 1, "data": {"train_size": 100}}
    jobs = plans.make_plan(RecipeTask(recipe, base), ["sam"], seeds=1).jobs({})
    jobs = [job for job in jobs if job.name == "sam"] + [job for job in jobs if job.name != "sam"]
    runs = run_jobs(lambda: jobs, tmp_path, executor=local.LocalExecutor(workers=1))
    next(runs)
    monkeypatch.setattr(local, "_start_worker", _die)
    broken = run_jobs(lambda: jobs[:1], tmp_path, executor=local.LocalExecutor(workers=1))
    with pytest.raises(RuntimeError, match="a worker process died while running sam/seed-0 or beside it"):
        next(broken)
    assert (tmp_path / jobs[0].folder / "result.json").is_file()
    runs.close()


def gone(group: int) -> bool:
    """Whether the process group disappears within half a minute (the system takes a moment to collect what has ended)."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def _die(*_):
    os._exit(1)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ('study.compare("digits-noisy-labels", penalties=["sam:rho=0.1"], seeds=2, workers=1, out="out")', "compare"),
        ('study.tune("digits-noisy-labels", trials=1, seeds=1, confirm=2, workers=1, out="out")', "tune"),
    ],
)
def test_a_script_without_its_guard_is_told_so(call, name, tmp_path):
    (tmp_path / "script.py").write_text(f"from gradreg import study\n\n{call}\n")
    found = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert f'RuntimeError: study.{name} must stand under if __name__ == "__main__": in a script' in found.stderr
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: a worker process died while running ")
    assert "where one has printed a traceback, for what that says" in last
