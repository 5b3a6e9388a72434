"""What all executors share, and the local one: options, entry points, deaths, studies at a URL, partial tables, bad input."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from gradreg import cli, study
from gradreg.folders import FolderInUse
from gradreg.study import urls
from gradreg.study.executors import executor as executors
from gradreg.study.executors import order
from gradreg.study.executors.executor import Ended, Executor, ExecutorError, Session, Site, Work
from gradreg.study.executors.local import LocalExecutor
from gradreg.study.running import _said, run_jobs
from tests.study.untimed import histories, results


def words(mine: Path, out: str, *more: str) -> list[str]:
    return ["compare", str(mine), "--penalties", "sam:rho=0.1", "--rivals", "epochs", "--seeds", "3", "--out", out, *more]


def begun(mine: Path) -> list[str]:
    return [" ".join(line.split()[:2]) for line in (mine.parent / "runs.txt").read_text().splitlines()]


# ---- one that dies


def test_a_run_whose_process_dies_three_times_has_failed_and_the_others_are_there(mine, capsys):
    out = mine.parent / "out"
    assert cli.main(words(mine, str(out), "--workers", "2", "--die", "sam-1")) == 1
    said = capsys.readouterr().out
    runs = results(out)["runs"]
    assert [(run["variant"], run["seed"]) for run in runs if "error" in run] == [("sam:rho=0.1", 1)]
    (error,) = [run["error"] for run in runs if "error" in run]
    assert error.startswith("its process died 3 times, the last time: its process was ended by SIGSEGV; its last lines: Fatal Python error")
    assert "in string_at" in error
    assert 'mine.py", line' in (out / "runs" / "sam-rho-0.1" / "seed-1" / "error.txt").read_text()
    assert begun(mine).count("sam-rho-0.1 1") == 3
    assert "1 of 3 runs failed" in said


class Scripted(Executor):
    """Carries works out in this process, but lets them die as told."""

    name = "scripted"

    def __init__(self, deaths: dict[str, list[bool]]) -> None:
        self.deaths, self.submitted = deaths, list[str]()

    def at_a_time(self) -> int:
        return 1

    def session(self, site, on_share):
        import contextlib

        outer = self

        class One(Session):
            def __init__(self) -> None:
                self.waiting: list[Work] = []

            def submit(self, works) -> None:
                self.waiting += works
                outer.submitted.extend(work.key for work in works)

            def wait(self, seconds):
                work = self.waiting.pop()
                own = outer.deaths.get(work.key) or []
                if own:
                    return [Ended(work.key, died="it was told to", lines=["first", "last"], own=own.pop())]
                return [Ended(work.key, work.call(lambda share: None))]

        return contextlib.nullcontext(One())


@pytest.mark.parametrize(
    ("deaths", "told"),
    [
        ([True, True], None),
        ([True, True, True], "its process died 3 times, the last time: it was told to; its last lines: first | last"),
        ([False] * 9, None),
        ([False] * 10, "its machine was lost 10 times, the last time: it was told to"),
        ([True, False, False, True, False], None),
    ],
    ids=["two", "three", "nine losses", "ten losses", "both"],
)
def test_deaths_of_a_run_are_counted_and_losses_of_its_machine_apart(mine, deaths, told):
    executor = Scripted({"sam-rho-0.1/seed-0": list(deaths)})
    found = study.compare(str(mine), penalties=["sam:rho=0.1"], rivals=["epochs"], seeds=2, out=mine.parent / "out", executor=executor)
    (record,) = [one for one in found.records if (one.variant, one.seed) == ("sam:rho=0.1", 0)]
    assert record.error == told if told is None else record.error.startswith(told)
    assert executor.submitted.count("sam-rho-0.1/seed-0") == len(deaths) + (told is None)
    assert executor.submitted.count("none/seed-0") == 1


def test_of_a_crash_what_happened_is_repeated_and_not_the_stack_around_it():
    lines = [
        "words",
        "*** SIGSEGV received ***",
        "PC: @ 0x1",
        "    @ 0x2",
        "Fatal Python error: Aborted",
        "Stack:",
        "File a",
        "File b",
        "File c",
    ]
    assert _said(Ended("x", died="so", lines=lines)) == "; its last lines: words | Fatal Python error: Aborted | Stack: | File a | File b"


# ---- found by entry point


def test_an_executor_of_another_package_is_found_by_its_entry_point_with_its_options(mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "other.py").write_text(
        "from dataclasses import dataclass\nfrom contextlib import contextmanager\n"
        "from gradreg.study.executors.executor import option\nfrom gradreg.study.executors.local import LocalExecutor, _InThisProcess\n"
        "from gradreg.study.executors.executor import Executor\n\n@dataclass(frozen=True)\nclass Other(Executor):\n    name = 'other'\n"
        "    greeting: str = option('--other-greeting', 'what it says', default='hello')\n\n    def at_a_time(self):\n        return 1\n\n"
        "    @contextmanager\n    def session(self, site, on_share):\n        print(self.greeting, site.name)\n"
        "        yield _InThisProcess(on_share)\n"
    )
    place = tmp_path / "other-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (place / "entry_points.txt").write_text("[gradreg.executors]\nother = other:Other\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    executors.known.cache_clear()
    try:
        assert set(executors.known()) == {"local", "ray", "slurm", "other"}
        parsed = {"executor": "other", "other_greeting": "good day", "workers": None}
        study.compare(str(mine), penalties=["sam:rho=0.1"], seeds=2, out=tmp_path / "out", executor=executors.from_command(parsed))
        assert "good day mine" in capsys.readouterr().out
        study.compare(str(mine), penalties=["sam:rho=0.1"], seeds=2, out=tmp_path / "again", executor="other")
        assert "hello mine" in capsys.readouterr().out
    finally:
        executors.known.cache_clear()
        sys.modules.pop("other", None)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--executor", "rya"], "unknown executor 'rya'. Did you mean 'ray'?"),
        (["--slurm-time", "3"], "--slurm-time must go with --executor slurm; got --executor local"),
        (["--executor", "slurm", "--workers", "3"], "--workers must go with --executor local; got --executor slurm"),
        (["--executor", "ray", "--run-cpus", "0"], "--run-cpus must be"),
        (["--executor", "ray", "--run-gpus", "-1"], "--run-gpus must be finite and >= 0; got -1"),
        (["--executor", "slurm", "--run-gpus", "0.5"], "--run-gpus must be a whole number >= 0 on Slurm; got 0.5"),
        (["--executor", "slurm", "--slurm-option", "qos"], "--slurm-option must be options of sbatch such as qos=low"),
        (["--partial"], "--partial needs a complete run; got none in"),
        (["--out", "nowhere://a/b"], "'nowhere://a/b' must be a URL that fsspec knows"),
        (["--out", "s3://a/b", "--fresh"], "--fresh must go with a folder"),
    ],
)
def test_bad_input_is_told_in_words(mine, capsys, more, told):
    assert cli.main(words(mine, str(mine.parent / "out"), *more)) == 2
    assert told in capsys.readouterr().err
    assert not (mine.parent / "out").exists()


def test_a_missing_package_is_named_with_its_extra(mine, capsys, monkeypatch):
    for name, extra in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, name, None)
        assert cli.main(words(mine, str(mine.parent / "out"), "--executor", extra)) == 2
        assert f"--executor {extra} needs the package '{name}', which is not installed. Run: pip install 'gradreg[{extra}]'" in (
            capsys.readouterr().err
        )
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert cli.main(words(mine, "s3://bucket/study")) == 2
    assert "needs the package 's3fs', which is not installed. Run: pip install s3fs" in capsys.readouterr().err


def test_a_task_of_a_notebook_or_options_that_cannot_be_pickled_are_told_in_words(mine):
    @study.task(metric="loss", mode="min")
    def inner(run: study.Run) -> None:
        raise AssertionError

    with pytest.raises(ExecutorError, match="task 'inner' must have a file that a worker can import it from; got a function of a notebook"):
        study.compare(inner, penalties=["sam:rho=0.1"], out=mine.parent / "out", executor="ray")
    with pytest.raises(ExecutorError, match=r"the run a must be one that can be pickled, to reach another process; got .*lambda"):
        Work("a", lambda share: {}).pickled()
    with pytest.raises(TypeError, match="executor must be 'local', 'ray', 'slurm' or an Executor; got 3"):
        study.compare(str(mine), penalties=["sam:rho=0.1"], executor=3)
    with pytest.raises(ValueError, match="workers must be left out with executor='ray'"):
        study.compare(str(mine), penalties=["sam:rho=0.1"], executor="ray", workers=2)


# ---- a worker


def told(site: Site, **changed: object) -> dict:
    """What a worker answers to an order."""
    made = order.Orders(site, capture=False, threads=1).of(Work("a", dict_of_one))
    return order.entry()({**made, **changed})


def dict_of_one(on_progress) -> dict:
    on_progress(0.5)
    return {"one": 1}


def test_a_worker_of_another_version_names_both(tmp_path):
    assert told(Site(tmp_path)) == {"one": 1}
    versions = {"gradreg": "99.0", "torch": "1.0+cu11", "nothing-of-this-name": "2"}
    answer = told(Site(tmp_path), versions=versions, host="driver")["executor_error"]
    from importlib import metadata

    import gradreg

    assert f"gradreg {gradreg.__version__}, but 99.0 on driver" in answer
    assert f"torch {metadata.version('torch')}, but 1.0+cu11 on driver and nothing-of-this-name none, but 2 on driver" in answer


def test_a_worker_that_does_not_see_the_folder_says_so_within_ten_seconds(tmp_path):
    begun = time.monotonic()
    for seen in ({"folder": str(tmp_path / "elsewhere"), "token": "a"}, {"folder": str(tmp_path), "token": "of another folder"}):
        answer = told(Site(tmp_path), seen=seen)["executor_error"]
        assert f"--out must be a folder that workers see under the same path; got {seen['folder']!r}, which a worker on" in answer
    assert time.monotonic() - begun < 20


def test_a_driver_reads_how_far_works_on_other_machines_are(tmp_path):
    orders = order.Orders(Site(tmp_path), capture=True, threads=1)
    made = orders.of(Work("a", dict_of_one))
    with order._noted(Path(made["note"]), capture=True) as tell:
        shares: dict[str, float] = {}
        print("said, and kept", flush=True, file=sys.__stderr__)
        tell(0.0)
        assert orders.under_way(["a", "b"], shares.__setitem__) == 1
        assert shares == {"a": 0.0}
        assert orders.under_way(["a"], shares.__setitem__) is None  # asked a moment ago
    assert orders.written("a") == []  # of one that has ended nothing stays
    orders.close()
    assert list(tmp_path.iterdir()) == []


# ---- at a URL


def at_url(mine: Path, *more: str) -> str:
    url = f"file://{mine.parent}/store/study"
    assert cli.main(words(mine, url, *more)) == 0
    return url


def test_a_study_at_a_url_is_that_of_a_folder_and_resumes(mine, capsys):
    at_url(mine, "--workers", "2")
    store = mine.parent / "store" / "study"
    assert cli.main(words(mine, str(mine.parent / "out"), "--workers", "0")) == 0
    assert results(store) == results(mine.parent / "out")
    assert histories(store) == histories(mine.parent / "out")
    assert {"results.json", "report.html", "table.md", "runs"} <= {file.name for file in store.iterdir()}
    assert not (store / ".lock").exists()
    assert not list(store.rglob("*.tmp"))
    before = begun(mine)
    (store / "runs" / "none" / "seed-1" / "result.json").unlink()
    at_url(mine, "--workers", "0")
    assert "6 runs, 5 of them already there" in capsys.readouterr().out
    assert begun(mine) == [*before, "none 1"]


def test_the_result_of_a_run_is_uploaded_last_and_no_driver_writes_beside_another(mine, monkeypatch, tmp_path):
    written: list[str] = []
    whole = urls._write
    monkeypatch.setattr(urls, "_write", lambda store, path, data: (written.append(path.rpartition("/")[2]), whole(store, path, data)))
    url = at_url(mine, "--workers", "0")
    run = written[: written.index("result.json") + 1]
    assert {"config.json", "metrics.jsonl", "environment.json"} <= set(run[:-1])
    mirror = urls.Mirror(url, tmp_path / "copy")
    mirror.folder.mkdir()
    place = mine.parent / "store" / "study" / ".lock"
    with mirror.locked():
        assert json.loads(place.read_text())["pid"]
        with pytest.raises(FolderInUse, match=r"written by process \d+ on .*; if it died, two minutes"):
            study.compare(str(mine), penalties=["sam:rho=0.1"], rivals=["epochs"], seeds=3, out=url, workers=0)
    assert not place.exists()
    old = {"host": "another", "pid": 1, "since": "long ago", "renewed": time.time() - urls._DEAD - 1}
    for dead in (old, {**mirror._signature(), "pid": 2**22 + 1}):  # not renewed; and of a process of this machine that is no more
        place.write_text(json.dumps(dead))
        study.compare(str(mine), penalties=["sam:rho=0.1"], rivals=["epochs"], seeds=3, out=url, workers=0)
        assert not place.exists()


def test_a_store_that_holds_objects_in_memory_too(mine):
    found = study.compare(str(mine), penalties=["sam:rho=0.1"], rivals=["epochs"], seeds=2, out="memory://a/study", workers=0)
    assert len(found.records) == 4
    before = begun(mine)
    assert study.compare(str(mine), penalties=["sam:rho=0.1"], rivals=["epochs"], seeds=2, out="memory://a/study", workers=0)
    assert begun(mine) == before


# ---- a straggler


def test_a_straggler_does_not_hold_the_table_back(mine, capsys):
    """Asked of another process while the study runs: two of four seeds of one variant, all of the other."""
    out = mine.parent / "out"
    plan = ["--penalties", "sam:rho=0.1", "--rivals", "epochs", "--out", str(out)]
    assert cli.main(["compare", str(mine), *plan, "--seeds", "4", "--workers", "0"]) == 0
    whole = results(out)
    shutil.rmtree(out / "runs" / "sam-rho-0.1" / "seed-2")
    (out / "runs" / "sam-rho-0.1" / "seed-3" / "result.json").unlink()
    (out / "results.json").unlink()
    capsys.readouterr()
    from gradreg.folders import locked

    before = begun(mine)
    with locked(out, purpose="--out"):  # by the driver
        assert cli.main(["compare", str(mine), *plan, "--seeds", "4", "--partial"]) == 0
    said = capsys.readouterr().out
    assert "partial: 6 of the 8 runs planned by now are there" in said
    assert "2 seeds" in said, said
    assert begun(mine) == before
    assert not (out / "results.json").exists()
    assert cli.main(["compare", str(mine), *plan, "--seeds", "4", "--workers", "0"]) == 0
    assert results(out) == whole


def test_the_local_executor_says_how_many_runs_wait(mine, monkeypatch):
    from gradreg.study.functions import load_task
    from gradreg.study.plan import make_plan

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    jobs = make_plan(load_task(str(mine)), ["sam:rho=0.1"], seeds=3, rivals=["epochs"]).jobs({})
    queued: list[int | None] = []
    ended = run_jobs(lambda: jobs, mine.parent / "out" / "runs", executor=LocalExecutor(workers=1), on_queue=queued.append)
    assert len({job.folder for job, _ in ended}) == 6
    assert max(queued) == 5
    assert queued[-1] == 0


# ---- thousands of runs


def test_no_folder_holds_thousands_of_entries_and_studies_of_before_still_open(mine):
    from collections import Counter

    from gradreg.study.functions import load_task
    from gradreg.study.plan import make_plan

    task = load_task(str(mine))
    few = make_plan(task, ["sam:rho=0.1"], seeds=3, rivals=["epochs"]).jobs({})
    assert few[0].folder == "none/seed-0"
    assert few[1].folder == "sam-rho-0.1/seed-0"
    seeds = make_plan(task, ["sam:rho=0.1"], seeds=5000, rivals=["epochs"]).jobs({})
    variants = {f"sam {i}": "sam:rho=0.1" for i in range(9999)}
    named = make_plan(task, variants, seeds=1, rivals=["epochs"]).jobs({})
    for jobs in (seeds, named):
        assert len({job.folder for job in jobs}) == 10_000
        folders = {place for job in jobs for place in (Path(job.folder), *Path(job.folder).parents)}
        entries = Counter(place.parent for place in folders)
        assert max(entries.values()) <= 1010
    assert seeds[2 * 999].folder == "none/seed-999"
    assert seeds[2 * 1000].other_folders[0] == "none/seed-1000"


def test_a_study_that_grew_finds_its_runs_where_they_were(mine, monkeypatch):
    from gradreg.study import plan as plans

    settings = {"penalties": ["sam:rho=0.1"], "rivals": ["epochs"], "workers": 0, "out": mine.parent / "out"}
    study.compare(str(mine), seeds=3, **settings)
    before = begun(mine)
    monkeypatch.setattr(plans, "MOST_IN_FOLDER", 2)
    found = study.compare(str(mine), seeds=3, partial=True, penalties=["sam:rho=0.1"], rivals=["epochs"], out=mine.parent / "out")
    assert len(found.records) == 6
    assert (mine.parent / "out" / "runs" / "none" / "seed-2").is_dir()
    study.compare(str(mine), seeds=4, **settings)
    assert begun(mine) == [*before, "seeds-1000 3", "seeds-1000 3"]
    assert (mine.parent / "out" / "runs" / "none" / "seeds-1000" / "seed-2" / "result.json").is_file()
