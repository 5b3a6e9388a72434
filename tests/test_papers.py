"""The registry of the papers' claims, the rule of its verdicts, and the commands that run what is missing."""

from __future__ import annotations

import doctest
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import paper_claims  # noqa: E402
import paper_measurements  # noqa: E402
import papers  # noqa: E402
from gradreg.study import task_arguments  # noqa: E402
from gradreg.study.command import DESCRIPTION, OPTIONS  # noqa: E402
from gradreg.study.plan import make_plan  # noqa: E402
from paper_claims import STORED, Measured, verdict  # noqa: E402
from paper_experiments import EXPERIMENTS, FRAMEWORKS, GPU, Comparison, Measurement  # noqa: E402
from paper_registry import CLAIMS  # noqa: E402

COMPARISONS = [one for one in (*EXPERIMENTS, *GPU, *FRAMEWORKS) if isinstance(one, Comparison)]


def test_a_verdict_follows_from_interval_and_bounds():
    assert doctest.testmod(paper_claims).failed == 0
    told = {(low, high): verdict(Measured("", low, high, ""), (-1.0, 1.0)) for low, high in ((-0.5, 0.5), (0.5, 1.5), (1.5, 2.0), (-3, 3))}
    assert list(told.values()) == ["reproduced", "within noise", "not reproduced", "within noise"]
    assert verdict(Measured("", math.nan, math.nan, ""), (0.0, math.inf)) == "within noise"  # one seed decides nothing
    assert verdict(None, (0.0, math.inf)) == "not run"


def study(**accuracies: list[float]) -> dict:
    """The stored result of a study with these test accuracies, and validation accuracies of the opposite order."""
    runs = [
        {"variant": name, "seed": seed, "budget": "epochs", "test_accuracy": value, "validation_accuracy": 1 - value}
        for name, own in accuracies.items()
        for seed, value in enumerate(own)
    ]
    return {"runs": runs}


def test_a_difference_is_paired_by_seed_and_a_pick_is_by_validation():
    result = study(plain=[0.5, 0.6, 0.7], good=[0.51, 0.61, 0.71], bad=[0.4, 0.4, 0.4])
    found = paper_claims.over("good", "plain", names=("a", "b"))(result)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(1.0))  # though the seeds differ by twenty points
    assert found.text.startswith("a 61.00 ± 10.00, b 60.00 ± 10.00: +1.00")
    picked = paper_claims.over_picked(("good", "bad"), ("plain",), ("x", "y"))(result)  # validation prefers the worse one on test
    assert picked.text.startswith("x (bad) 40.00 ± 0.00, y 60.00")
    diverged = study(plain=[0.5, 0.6], bad=[0.5, 0.6])
    diverged["runs"][2] = {"variant": "bad", "seed": 0, "budget": "epochs", "test_accuracy": None, "diverged": True}  # as they are stored
    for key in ("test_accuracy", "validation_accuracy"):
        assert paper_claims.values(diverged, "bad", key=key)[0] == 10.0
    assert paper_claims.values(diverged, "bad")[1] == 60.0
    assert " 35.00 ±" in paper_claims.over_picked(("bad",), ("plain",), ("x", "y"))(diverged).text


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    from scipy import stats

    for count in (6, 15, 24):
        low, high = paper_claims.median_interval(count)
        covered = stats.binom.cdf(high, count, 0.5) - stats.binom.cdf(low, count, 0.5)  # between the two order statistics
        assert covered >= 0.95
        narrower = stats.binom.cdf(high - 1, count, 0.5) - stats.binom.cdf(low + 1, count, 0.5)
        assert narrower < 0.95 or high - low < 2


def test_a_ratio_of_few_rounds_decides_nothing():
    seconds = {"DB": [3.0, 3.1, 2.9, 3.2, 2.8], "F-GR": [1.0] * 5}
    few, many = (paper_claims.ratio("DB", "F-GR")({"seconds": {k: times * own for k, own in seconds.items()}}) for times in (1, 2))
    assert verdict(few, (2.0, math.inf)) == "within noise"
    assert verdict(many, (2.0, math.inf)) == "reproduced"
    assert (many.low, many.high) == (2.8, 3.2)


def test_the_slope_of_a_law_that_holds_is_minus_one():
    steps = [int(step) for step in np.geomspace(2, 3000, 90)]

    def curve(peak: float) -> list[float]:
        return [math.exp(-(math.log(step / peak) ** 2)) for step in steps]

    runs = [{"lr": 0.05, "l2": l2, "seed": seed, "accuracies": curve(50 / l2)} for l2 in (0.4, 0.2, 0.1, 0.01) for seed in range(3)]
    found = paper_claims.law_slope({"steps": steps, "runs": runs})
    assert found.low < -1 < found.high or abs(found.low + 1) < 0.05
    assert found.seeds == "9 runs, 3 seeds"  # those of 0.01 have their best at the end


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.source}: {claim.says}"[:60])
def test_a_claim_has_a_result_and_what_is_judged_or_says_what_is_lacking(claim):
    assert (claim.result is None) == (claim.measure is None)
    assert claim.result is not None or claim.lacking
    if claim.result is not None:
        assert claim.meaning
        assert claim.bounds[0] < claim.bounds[1]
        if claim.result.startswith(STORED):
            assert Path(claim.result).stem in {one.name for one in (*EXPERIMENTS, *GPU)}
        else:
            assert (ROOT / claim.result).is_file()
            assert claim.ours
            assert claim.command or "command" in claim.stored()
    found = claim.found()
    if found is not None:
        assert found.text
        assert re.search(r"\d+ (seeds?|runs|rounds)", found.seeds)


def test_every_experiment_serves_a_claim():
    used = {Path(claim.result).stem for claim in CLAIMS if claim.result is not None}
    assert {one.name for one in (*EXPERIMENTS, *GPU)} <= used


@pytest.mark.slow
@pytest.mark.parametrize("one", COMPARISONS, ids=lambda one: one.name)
def test_a_comparison_is_a_command_that_gradreg_understands(one):
    options, task = task_arguments.parse("compare", DESCRIPTION, OPTIONS, one.words("data")[1:])
    plan = make_plan(task, options["penalties"], seeds=options["seeds"], rivals=options["rivals"])
    assert len(plan.jobs({})) == len(one.penalties) * one.seeds
    assert one.shortened


def test_stored_results_have_a_command_an_environment_and_no_folder_of_a_machine():
    for file in (ROOT / STORED).glob("*.json"):
        text = file.read_text(encoding="utf-8")
        found = json.loads(text)
        assert {"command", "environment", "hours", "shortened"} <= found.keys(), file.name
        assert not re.search(r'"/|/home/|/tmp/|/root/|/work/', text), file.name


def test_measurements_go_on_where_they_stopped():
    found: dict = {}
    pieces = paper_measurements.flooding("", found)
    first = dict(next(pieces)["seeds"][0])
    pieces.close()
    again = [len(piece["seeds"]) for piece in paper_measurements.flooding("", found)]
    assert again == [2, 3, 4, 5]
    assert found["seeds"][0] == first
    assert all(seed["relative error"] < 1e-6 for seed in found["seeds"])


def test_a_measurement_is_stored_piece_by_piece_and_stops_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "RUNS", tmp_path / "runs")

    def two(root, found):
        for i in range(len(found.setdefault("seeds", [])), 3):
            found["seeds"].append({"seed": i})
            yield found

    one = Measurement("two", two, shortened="short")
    over = papers.Clock(0.0)
    for count in (1, 2):
        with pytest.raises(papers.OutOfTime, match="minutes are over"):
            papers.measure(one, "", over, tmp_path)
        assert len(json.loads((tmp_path / "two.json").read_text())["seeds"]) == count
    papers.measure(one, "", papers.Clock(None), tmp_path)
    stored = json.loads((tmp_path / "two.json").read_text())
    assert len(stored["seeds"]) == 3
    assert stored["command"] == "python benchmarks/papers.py --only two"


def test_unknown_experiments_and_entries_are_named(capsys):
    with pytest.raises(SystemExit, match=r"--only must name experiments; got nothing. Known: diagonal-network"):
        papers.chosen(["nothing"])
    with pytest.raises(SystemExit, match=r"2"):
        gpu.main(["--only", "nothing"])
    assert "--only must name entries; got nothing" in capsys.readouterr().err


class TestPlan:
    """What a GPU would be given to do."""

    def test_entries_in_order_within_the_minutes_and_a_comparison_with_the_rest(self, tmp_path):
        results = tmp_path / "gpu"
        whole = {one.entry.name: one.decision for one in gpu.plan(gpu.ENTRIES, None, results)}
        assert set(whole.values()) == {"run"}
        minutes = sum(entry.minutes for entry in gpu.ENTRIES if not entry.resumes) + 10
        told = {one.entry.name: one.decision for one in gpu.plan(gpu.ENTRIES, minutes, results)}
        assert all(told[entry.name] == "run" for entry in gpu.ENTRIES if not entry.resumes)
        assert [told[one.name] for one in GPU] == ["begin", *["later"] * (len(GPU) - 1)]

    def test_a_measurement_that_does_not_fit_is_left_and_a_smaller_one_is_run(self, tmp_path):
        told = [one.decision for one in gpu.plan(gpu.ENTRIES[:2], 2, tmp_path / "gpu")]
        assert told == ["run", "later"]

    def test_what_is_stored_is_not_run_again(self, tmp_path):
        results = tmp_path / "gpu"
        for entry in (gpu.ENTRIES[0], gpu.ENTRIES[-1]):
            entry.file(results).parent.mkdir(parents=True, exist_ok=True)
            entry.file(results).write_text("{}")
        told = [one.decision for one in gpu.plan(gpu.ENTRIES, None, results)]
        assert (told[0], told[-1]) == ("stored", "stored")
        assert set(told[1:-1]) == {"run"}

    def test_a_dry_run_says_it(self, tmp_path, capsys):
        assert gpu.main(["--dry-run", "--minutes", "1", "--results", str(tmp_path / "gpu")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(gpu.ENTRIES)
        assert lines[0].startswith("run     no-synchronization: no device synchronization")
        assert lines[1].startswith("later   step-cost-resnet50")

    def test_numbers_of_tiny_sizes_are_not_stored_among_the_others(self, capsys):
        with pytest.raises(SystemExit, match=r"2"):
            gpu.main(["--device", "cpu", "--tiny"])
        assert "--tiny needs --results" in capsys.readouterr().err


def has_ended(pid: Path) -> bool:
    """Whether the process in that file ends within a few seconds: one that is killed is still there for a moment."""
    state, until = Path("/proc") / pid.read_text().strip() / "stat", time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if state.read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_an_entry_that_takes_longer_than_it_should_is_broken_off_with_what_it_has_started(tmp_path, monkeypatch, capsys):
    pid = tmp_path / "pid"
    words = ["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"]
    monkeypatch.setattr(gpu, "ENTRIES", (gpu.Entry("slow", "sleeps", 0.0, lambda where: gpu.ended(words)),))
    results = tmp_path / "gpu"
    assert gpu.main(["--device", "cpu", "--tiny", "--root", "data", "--results", str(results), "--minutes", "0.03"]) == 0
    assert "slow: stopped after 0.03 minutes" in capsys.readouterr().out
    assert not results.exists()
    assert has_ended(pid)
    with pytest.raises(RuntimeError, match=r"sh -c exit 3 ended with status 3"):
        gpu.ended(["sh", "-c", "exit 3"])


def test_an_entry_told_to_end_leaves_nothing_running(tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    words = ["sh", "-c", f"sleep 60 & echo $! > {pid}; kill -TERM {os.getpid()}; wait"]
    monkeypatch.setattr(gpu, "ENTRIES", (gpu.Entry("slow", "sleeps", 0.0, lambda where: gpu.ended(words)),))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        gpu.main(["--device", "cpu", "--tiny", "--root", "data", "--results", str(tmp_path / "gpu")])
    assert signal.getsignal(signal.SIGTERM) == before
    assert has_ended(pid)


class WhenUnderWay(papers.Clock):
    """The time is over when a run has gone through an epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self.folder = folder

    @property
    def left(self) -> float | None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not any(file.stat().st_size for file in self.folder.rglob("timings.jsonl")):
            time.sleep(0.02)
        return 0.0


@pytest.mark.slow
def test_a_comparison_that_the_time_ends_goes_on_where_it_stopped(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    one = next(one for one in GPU if one.name == "fgr-mlp-cifar10")
    entry = gpu.Entry(one.name, "", 1, comparison=replace(one, penalties=("none", one.penalties[2]), tiny={"epochs": 60}))
    where, results, runs = gpu.Where("cpu", str(root), tiny=True), tmp_path / "gpu", tmp_path / "runs"
    with pytest.raises(papers.OutOfTime, match="the minutes are over"):
        gpu._run(entry, where, WhenUnderWay(runs), results)
    assert not entry.file(results).exists()
    (timings,) = runs.rglob("timings.jsonl")
    before = timings.read_text()
    assert 0 < before.count("\n") < 60
    gpu._run(entry, where, papers.Clock(None), results)
    assert timings.read_text().startswith(before)
    stored = json.loads(entry.file(results).read_text())
    assert [run["epochs"] for run in stored["runs"]] == [60, 60]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """CIFAR-10 as class folders of one image of noise each."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part in ("train", "test"):
        for number in range(10):
            folder = root / "cifar10" / part / f"class{number}"
            folder.mkdir(parents=True)
            Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / "0.png")
    return root


@pytest.mark.slow
def test_a_step_of_every_method_is_measured_and_none_synchronizes():
    where = gpu.Where(device="cpu", tiny=True)
    assert set(gpu.no_synchronization(where)["synchronizations"].values()) == {"none"}
    ways = gpu.step_costs("vit-s", gpu.EAGER, where)["ways"]
    assert ways.keys() == gpu.EAGER.keys()
    for measured in ways.values():
        assert {"plain", "two", "SAM", "GNP", "F-GR", "pytorch_optimizer SAM"} <= measured.keys()
        assert measured["plain"]["memory_over_plain"] == 0
        assert measured["SAM"]["memory_over_plain"] > 0
        assert "twice differentiable" in measured["failed"]["exact"]  # through fused attention


@pytest.mark.soak
@pytest.mark.parametrize("entry", gpu.ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_runs_at_least_a_step(entry, root, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    results = tmp_path / "gpu"
    assert gpu.main(["--device", "cpu", "--tiny", "--root", str(root), "--results", str(results), "--only", entry.name]) == 0
    stored = json.loads(entry.file(results).read_text())
    assert stored["name"] == entry.name
    assert stored["environment"]
    if entry.comparison is not None:
        assert {run["variant"] for run in stored["runs"]} == set(entry.comparison.penalties)
