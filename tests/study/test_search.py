"""A search: what is varied, what is dropped, that both sides get as much, that nothing is lost or run twice, and what is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

import gradreg
from gradreg import cli, own_code, study
from gradreg.folders import locked
from gradreg.study.executors.local import LocalExecutor
from gradreg.study.functions import load_task
from gradreg.study.search import Finding, is_behind
from gradreg.study.search_space import arms
from gradreg.study.searcher import Searcher, open_storage, opened_storage
from gradreg.study.tasks import TaskError
from gradreg.study.tuning import plan_search

TASK = '''
import os
import torch
from gradreg import study

@study.task(metric="rmse", mode="min")
def train(run: study.Run, *, lr: float = 0.05, width: int = 4, kind: str = "tanh", wait: float = 0.0) -> None:
    """A regression on noise."""
    with open(os.environ["RUNS"], "a") as file:
        file.write(f"{run.folder.parent.name} {run.seed}\\n")
    data = torch.Generator().manual_seed(run.seed)
    x = torch.randn(60, 3, generator=data)
    y = x.sin().sum(1, keepdim=True) + 0.3 * torch.randn(60, 1, generator=data)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
    regularizer = run.regularizer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rmse = lambda rows: (model(x[rows]) - y[rows]).square().mean().sqrt()
    import time
    time.sleep(wait)
    for epoch in run.epochs(3):
        for start in (0, 20):
            rows = slice(start, start + 20)
            optimizer.zero_grad()
            regularizer.backward(lambda: (model(x[rows]) - y[rows]).square().mean())
            optimizer.step()
        with torch.no_grad():
            run.log(validation_rmse=rmse(slice(40, 50)), test_rmse=rmse(slice(50, 60)))
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(TASK)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.txt"))
    return path


def tuned(mine: Path, **options):
    given = {"penalty": "sam", "trials": 4, "seeds": 2, "confirm": 2, "out": mine.parent / "out", "workers": 0}
    return study.tune(load_task(str(mine)), **{**given, **options})


def runs_of(mine: Path) -> list[str]:
    return (mine.parent / "runs.txt").read_text().splitlines()


# ---- what is proposed


def test_a_search_with_other_seeds_proposes_other_values_and_one_with_the_same_the_same(mine: Path) -> None:
    def proposed(first: int, folder: str) -> list[dict]:
        task = load_task(str(mine))
        planned = plan_search(task, arms(task, ["sam"], {}), trials=3, seeds=1, confirm=2)
        search = replace(planned, seeds=range(first, first + 1))
        (mine.parent / folder).mkdir()
        searcher = Searcher(search, mine.parent / folder, open_storage("memory", mine.parent))
        searcher.run(executor=LocalExecutor(0))
        return [dict(one.values) for one in searcher.findings()]

    one, again, other = proposed(0, "one"), proposed(0, "again"), proposed(5, "other")
    assert one == again
    assert not any(value in other for value in one)


# ---- what is dropped


def test_a_trial_is_behind_as_the_paired_t_test_says() -> None:
    best = {0: 0.90, 1: 0.92, 2: 0.95}
    for scores in ({0: 0.85, 1: 0.90, 2: 0.91}, {0: 0.85, 1: 0.93, 2: 0.95}, {0: 0.91, 1: 0.93, 2: 0.94}):
        p = stats.ttest_1samp([scores[s] - best[s] for s in scores], 0.0, alternative="less").pvalue
        assert is_behind(scores, best, [], mode="max") == (p < 0.1)
        assert is_behind({s: -v for s, v in scores.items()}, {s: -v for s, v in best.items()}, [], mode="min") == (p < 0.1)


def test_the_spread_of_other_trials_makes_one_seed_enough() -> None:
    best = {0: 0.90, 1: 0.92, 2: 0.95}
    others = [{0: 0.89, 1: 0.90, 2: 0.94}, {0: 0.86, 1: 0.87, 2: 0.92}]  # differences -.01, -.02, -.01 and -.04, -.05, -.03
    spread = ((2 * (0.01 / 3) ** 2 + (0.02 / 3) ** 2 + 2 * 0.01**2) / 4) ** 0.5
    border = stats.t.ppf(0.1, 4) * spread
    assert is_behind({0: 0.90 + 1.01 * border}, best, others, mode="max")
    assert not is_behind({0: 0.90 + 0.99 * border}, best, others, mode="max")
    assert not is_behind({0: 0.1}, best, [], mode="max")  # one difference has no spread of its own
    assert not is_behind({7: 0.1}, best, others, mode="max")


# ---- a search from its beginning to its end


def test_both_sides_get_as_many_trials_and_the_best_by_validation_is_confirmed_with_fresh_seeds(mine: Path) -> None:
    found = tuned(mine, search={"lr": "log:0.001:0.3"}, trials=6)
    for side in ("none", "sam"):
        own = [one for one in found.findings if one.arm == side]
        assert len(own) == 6
        complete = [one for one in own if one.state == "complete"]
        assert all(set(one.scores) == {0, 1} for one in complete)
        assert all(len(one.scores) < 2 or one.mean > found.chosen[side].mean for one in own if one.state == "dropped")
        assert found.chosen[side] == min(complete, key=lambda one: one.mean)
    comparison = found.comparison
    assert comparison is not None
    assert comparison.plan.seeds == [2, 3]
    assert comparison.plan.rivals == ("epochs", "gradients", "early")  # seconds are measured on request alone
    settings = {name: variant.settings for name, variant in comparison.plan.variants.items()}
    assert settings["none"]["lr"] == found.chosen["none"].values["lr"]
    assert settings["sam"]["penalty"] == gradreg.sam(rho=found.chosen["sam"].values["penalty.rho"]).to_dict()
    held = json.loads((mine.parent / "out" / "search.json").read_text())
    assert [trial["values"] for trial in held["trials"]] == [dict(one.values) for one in found.findings]
    assert held["chosen"] == {side: one.number for side, one in found.chosen.items()}
    assert len(found.to_frame()) == 12
    assert sum(len(one.scores) for one in found.findings) == len([line for line in runs_of(mine) if int(line.split()[1]) < 2])


def test_what_is_selected_by_is_validation_and_never_test(mine: Path) -> None:
    """Test is the inverse of validation here, so that the best by one is the worst by the other."""
    mine.write_text(
        TASK.replace("validation_rmse=rmse(slice(40, 50)), test_rmse=rmse(slice(50, 60))", "validation_rmse=lr, test_rmse=1 / lr")
    )
    found = tuned(mine, search={"lr": "log:0.001:0.3"}, trials=3)
    for side in ("none", "sam"):
        own = [one for one in found.findings if one.arm == side]
        assert all(score == pytest.approx(one.values["lr"]) for one in own for score in one.scores.values())
        assert found.chosen[side].values["lr"] == min(one.values["lr"] for one in own)


def test_the_page_draws_the_search_and_links_to_the_comparison(mine: Path) -> None:
    found = tuned(mine, search={"lr": "log:0.001:0.3"})
    page = (mine.parent / "out" / "search.html").read_text()
    for text in ("What rho does", "What lr does", "How the best came about", "confirmation/report.html", *found.sentences()):
        assert text in page
    assert page.count('<td class="left">sam</td>') == 4
    for one in found.findings:
        assert f'<td class="left">{one.shown_values()}</td>' in page


def test_a_side_without_anything_to_search_is_taken_as_it_is(mine: Path) -> None:
    found = tuned(mine)
    assert {one.arm for one in found.findings} == {"sam"}
    assert found.sentences()[0] == "none: nothing to search, taken as it is"


def test_equal_choices_share_their_runs(mine: Path) -> None:
    found = tuned(mine, penalty="sam:rho=0.1", search={"kind": "tanh|relu"}, trials=5)
    assert len(found.findings) == 10
    assert len(set(runs_of(mine))) == len(runs_of(mine)) <= 2 * 2 * 2 + 3 * 2


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuned(mine, out=mine.parent / "whole", search={"lr": "log:0.001:0.3"})
    all_runs = sorted(runs_of(mine))
    (mine.parent / "runs.txt").unlink()
    kept, calls = Searcher._take, []

    def interrupted(self, job, result):
        calls.append(job)
        if len(calls) in (3, 8):
            raise KeyboardInterrupt("told to")
        kept(self, job, result)

    monkeypatch.setattr(Searcher, "_take", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="told to"):
            tuned(mine, search={"lr": "log:0.001:0.3"})
    again = tuned(mine, search={"lr": "log:0.001:0.3"})
    assert sorted(runs_of(mine)) == all_runs  # nothing twice, nothing left out

    def results(found):
        return sorted((one.arm, tuple(one.values.items()), tuple(one.scores.items()), one.state) for one in found.findings)

    assert results(again) == results(whole)
    assert again.sentences() == whole.sentences()


def test_what_a_trial_had_found_is_kept_where_its_runs_are_not(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine that shares the storage takes a trial over with the scores it has, and does not run those seeds again."""
    kept, calls = Searcher._take, []

    def interrupted(self, job, result):
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt("told to")
        kept(self, job, result)

    monkeypatch.setattr(Searcher, "_take", interrupted)
    shared = {"storage": f"sqlite:///{mine.parent / 'search.db'}", "trials": 2}
    with pytest.raises(KeyboardInterrupt, match="told to"):
        tuned(mine, out=mine.parent / "one", **shared)
    (mine.parent / "runs.txt").unlink()
    found = tuned(mine, out=mine.parent / "other", **shared)
    searched = [line for line in runs_of(mine) if int(line.split()[1]) < 2]
    assert sum(len(one.scores) for one in found.findings) == len(searched) + 1


def test_what_another_process_still_runs_is_waited_for_and_taken_over_when_that_ends(mine: Path) -> None:
    task, out = load_task(str(mine)), mine.parent / "out"
    search = plan_search(task, arms(task, ["sam"], {}), trials=4, seeds=2, confirm=2)
    out.mkdir()
    other = Searcher(search, out, open_storage(None, out))
    with locked(Path(other._signature["folder"]), purpose="the other process"):
        assert other._begin()
        found = tuned(mine)
        assert found.comparison is None
        assert not found.chosen
        assert found.warnings[0].startswith("other processes still run 1 trial of this search")
        assert len(found.findings) == 4
        assert found.warnings[0] in (out / "search.html").read_text()
        assert not json.loads((out / "search.json").read_text())["confirmed"]
    (begun,) = (one for one in found.findings if one.state == "running")
    again = tuned(mine)
    assert again.comparison is not None
    assert sum(one.values == begun.values for one in again.findings) == 1
    assert len(again.findings) == 4


def test_tables_that_another_process_makes_at_the_same_moment_are_taken(tmp_path: Path, monkeypatch) -> None:
    from optuna import storages
    from sqlalchemy.exc import IntegrityError

    opens, tried = storages.RDBStorage, []

    def made_meanwhile(*args, **kwargs):
        tried.append(args)
        if len(tried) == 1:
            raise IntegrityError(
                "CREATE TYPE", {}, ValueError('duplicate key value violates unique constraint "pg_type_typname_nsp_index"')
            )
        return opens(*args, **kwargs)

    monkeypatch.setattr(storages, "RDBStorage", made_meanwhile)
    with opened_storage(f"sqlite:///{tmp_path / 'search.db'}", tmp_path) as opened:
        assert opened.get_all_studies() == []
    assert len(tried) == 2
    assert opened.engine.pool.checkedin() == 0  # its connections are closed


def test_more_trials_are_added_to_a_search(mine: Path) -> None:
    few = tuned(mine)
    more = tuned(mine, trials=6)
    assert [one.values for one in more.findings][:4] == [one.values for one in few.findings]
    assert len(more.findings) == 6


def test_where_more_trials_choose_another_winner_the_comparison_of_the_old_one_is_kept_aside(mine: Path) -> None:
    def comparisons() -> list[Path]:
        return sorted((mine.parent / "out").glob("confirmation*"))

    few = tuned(mine)
    (old,) = comparisons()
    table = (old / "table.md").read_text()
    runs = len(runs_of(mine))
    assert tuned(mine).chosen == few.chosen  # nothing is run again, and nothing moved
    assert (comparisons(), len(runs_of(mine))) == ([old], runs)
    trials = 4
    while (more := tuned(mine, trials=(trials := trials + 1))).chosen["sam"].values == few.chosen["sam"].values:
        assert comparisons() == [old]
    new, aside = comparisons()
    assert (new, (aside / "table.md").read_text()) == (old, table)
    assert more.comparison is not None
    assert (new / "table.md").read_text() != table
    tuned(mine, trials=trials)
    assert comparisons() == [new, aside]


# ---- what is told


def test_the_best_at_an_end_of_its_range_is_told(mine: Path) -> None:
    found = tuned(mine, penalty="sam:rho=0.05", search={"lr": [0.05], "width": "4:5"}, trials=3)
    assert any("width=" in text and "end of its range, 4:5" in text for text in found.warnings)


def test_another_search_in_the_folder_is_refused(mine: Path) -> None:
    tuned(mine)
    with pytest.raises(ValueError, match=r"holds a search of another kind for 'mine: sam'; it differs in seeds\. Choose another --out"):
        tuned(mine, seeds=3)
    mine.write_text(TASK.replace("0.3 * torch", "0.4 * torch"))
    name = next(name for name in sys.modules if name.startswith(own_code.PREFIX) and sys.modules[name].__file__ == str(mine))
    del sys.modules[name]
    with pytest.raises(ValueError, match="differs in source"):
        tuned(mine)


def test_a_task_without_validation_cannot_be_tuned(mine: Path) -> None:
    mine.write_text(TASK.replace("validation_rmse=rmse(slice(40, 50)), ", ""))
    with pytest.raises(TaskError, match=r"selects by validation_rmse, which mine does not log.*run\.log\(validation_rmse=\.\.\.\)"):
        tuned(mine)


def test_trials_that_diverge_are_dropped_and_a_side_of_nothing_else_is_an_error(mine: Path) -> None:
    with pytest.raises(RuntimeError, match="no trial of none is complete, of 4: all diverged"):
        tuned(mine, search={"lr": "log:1e30:1e38"})


def test_trials_that_raise_are_told_with_their_error(mine: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no trial of sam@width=-3 is complete, of 4: the first with RuntimeError.*line 1"):
        tuned(mine, penalty="sam@width=-3")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"trials": 0}, "trials must be >= 1"),
        ({"seeds": 0}, "seeds must be >= 1"),
        ({"confirm": 1}, "confirm must be >= 2"),
        ({"penalty": "sam:rho=0.1"}, "search must name something"),
        ({"storage": "somewhere"}, "storage must be memory, journal:FILE, or a URL"),
        ({"storage": "postgresql://me:secret@127.0.0.1:9/none"}, "must be a data base that can be reached"),
        ({"storage": "nosuch://x"}, "must be a data base that can be reached"),
    ],
)
def test_bad_arguments(mine: Path, options, told: str) -> None:
    with pytest.raises(ValueError, match=told) as raised:
        tuned(mine, **options)
    assert "secret" not in str(raised.value)


def test_storage_in_memory_and_in_a_data_base(mine: Path) -> None:
    by_default = tuned(mine)
    for i, storage in enumerate(("memory", f"sqlite:///{mine.parent}/search.db", f"journal:{mine.parent}/own.journal")):
        found = tuned(mine, storage=storage, out=mine.parent / f"out-{i}")
        assert [one.values for one in found.findings] == [one.values for one in by_default.findings]


def test_the_command(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trials", "3", "--seeds", "2", "--confirm", "2", "--workers", "0", "--out", str(mine.parent / "out")]
    assert cli.main(["tune", str(mine), "--penalty", "fgr", "--search", "lr=log:0.001:0.3", *options]) == 0
    shown = capsys.readouterr().out
    assert "mine: 3 trials each of none and fgr, 2 seeds at most" in shown
    assert shown.count("on validation, ") == 6
    assert "confirmed fgr, seed 3" in shown
    assert f"report: {mine.parent / 'out' / 'search.html'}" in shown
    assert cli.main(["tune", str(mine), "--search", "lr", *options]) == 2
    assert "--search must be written NAME=RANGE" in capsys.readouterr().err
    assert cli.main(["tune", str(mine), "--penalty", "fgr", "--search", "lr=log:0.001:0.3", *options, "--fresh"]) == 0


@pytest.mark.slow
def test_the_command_with_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trials", "2", "--seeds", "1", "--confirm", "2", "--workers", "0", "--epochs", "2", "--data.validation", "100"]
    searched = ["--penalty", "sam", "fgr:epsilon=0.1", "--search", "optimizer.lr=log:0.01:0.3", "--out", str(tmp_path)]
    assert cli.main(["tune", "digits-noisy-labels", *options, *searched]) == 0
    assert "2 trials each of none and sam and fgr:epsilon=0.1" in capsys.readouterr().out
    held = json.loads((tmp_path / "search.json").read_text())
    assert {(trial["arm"], *sorted(trial["values"])) for trial in held["trials"]} == {
        ("none", "optimizer.lr"),
        ("sam", "optimizer.lr", "penalty.rho"),
        ("fgr:epsilon=0.1", "optimizer.lr"),
    }


def new_data_base() -> str:
    """The URL of an empty data base on the PostgreSQL that GRADREG_POSTGRES names, as .ci/postgres starts it."""
    psycopg = pytest.importorskip("psycopg")
    url = os.environ["GRADREG_POSTGRES"]
    name = f"gradreg_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{url.rpartition('/')[0]}/{name}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "storage",
    [
        "journal",
        pytest.param(
            "postgres",
            marks=pytest.mark.skipif(
                not os.environ.get("GRADREG_POSTGRES"), reason="GRADREG_POSTGRES names no data base; .ci/postgres start FOLDER starts one"
            ),
        ),
    ],
)
def test_two_processes_share_a_search_and_one_is_killed(mine: Path, storage: str) -> None:
    command = [
        *(sys.executable, "-m", "gradreg", "tune", str(mine), "--penalty", "sam", "--search", "lr=log:0.001:0.3", "--wait", "0.2"),
        *("--trials", "5", "--seeds", "2", "--confirm", "2", "--workers", "0", "--out", str(mine.parent / "out")),
        *(["--storage", new_data_base()] if storage == "postgres" else []),
    ]
    first, second = (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True) for _ in range(2)
    )
    until = time.monotonic() + 120
    while not (mine.parent / "runs.txt").exists() or len(runs_of(mine)) < 4:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    assert second.wait(timeout=240) == 0, second.communicate()[1]
    second.communicate()
    first.communicate()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    held = json.loads((mine.parent / "out" / "search.json").read_text())
    assert held["confirmed"]
    for side in ("none", "sam"):
        own = [trial for trial in held["trials"] if trial["arm"] == side]
        assert 5 <= len(own) <= 6  # two processes may both begin the last
        assert all(trial["state"] in ("complete", "dropped") for trial in own)
    complete = {"/".join(path.parent.parts[-2:]) for path in (mine.parent / "out" / "trials").rglob("result.json")}
    began = [line.replace(" ", "/seed-") for line in runs_of(mine)]
    twice = {run for run in began if began.count(run) > 1}
    assert len(twice) <= 1  # the one that was killed while it ran
    assert complete == {run for run in began if run.startswith(("none-", "sam-"))}


def test_a_finding_without_scores_has_no_mean() -> None:
    assert Finding("sam", 0, {}, {}, "running", 0.0, 0.0).mean is None
    assert Finding("sam", 0, {}, {0: 0.5, 1: None}, "dropped", 0.0, 0.0).mean is None
