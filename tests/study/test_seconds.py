"""The rival at equal seconds: measured once by short runs that alternate, stored, used ever after, and named where the answer is."""

from __future__ import annotations

import json
import random
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from gradreg import study
from gradreg.study import comparison
from gradreg.study import run as runs
from gradreg.study.functions import load_task
from gradreg.study.seconds import LEAST, EqualSeconds, Side, Timed, measure

TASK = '''
import torch
from gradreg import study

class Clock:
    now = 0.0
    runs = []

CLOCK = Clock()

@study.task(metric="score", percent=False)
def train(run: study.Run, *, epochs: int = 10, cost: float = 1.0, gain: float = 1.0) -> None:
    """Seconds by a clock of its own: 7 before the first step, as a compilation takes, then ``cost`` an evaluation and 0.5 an epoch."""
    model = torch.nn.Linear(1, 1)
    regularizer = run.regularizer(model)
    loop = run.epochs(epochs)
    CLOCK.runs.append((str(run.penalty), run.seed, len(loop)))
    CLOCK.now += 7.0
    for epoch in loop:
        before = regularizer.metrics["evaluations"] if epoch else 0
        regularizer.backward(lambda: model(torch.ones(1, 1)).square().sum())
        CLOCK.now += 0.5 + cost * (regularizer.metrics["evaluations"] - before)
        run.log(test_score=run.seed + 0.1 * (run.seed % 2) * (run.penalty is not None) + gain * (run.penalty is not None))
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(TASK)
    clock = load_task(str(path)).function.__globals__["CLOCK"]
    clock.runs.clear()
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return path


def timed_runs(path: Path) -> list[tuple[str, int, int]]:
    return load_task(str(path)).function.__globals__["CLOCK"].runs


def compare(path: Path, out: Path, **options):
    return study.compare(str(path), out=out, workers=0, **{"penalties": ["sam:rho=0.1"], "seeds": 3, "rivals": ["seconds"], **options})


def test_the_epochs_are_those_of_the_measured_ratio(mine, tmp_path):
    found = compare(mine, tmp_path / "out", rivals=["epochs", "gradients", "seconds"])
    # An epoch takes 1.5 s, with a second evaluation 2.5 s: ten epochs of SAM last 25 s, as 16.67 plain ones do. The 7 s drop out.
    assert found.plan.seconds["sam:rho=0.1"].ratio == pytest.approx(2.5 / 1.5)
    assert found.plan.seconds["sam:rho=0.1"].length == 17
    lengths = sorted((r.variant, r.budget, r.epochs) for r in found.records if r.seed == 0)
    assert lengths == [("none", "epochs", 10), ("none", "gradients", 20), ("none", "seconds", 17), ("sam:rho=0.1", "epochs", 10)]
    label = "none, equal seconds of sam:rho=0.1: 17 epochs, ratio 1.67 measured"
    assert label in [row.label for row in found.rows]
    assert "over plain, equal seconds" in found.markdown()
    sam = next(row for row in found.rows if row.label == "sam:rho=0.1")
    assert sam.seconds_difference.difference == pytest.approx(1 + 0.1 / 3)
    assert "Against plain training that takes as many seconds all of these 1.03 is left: helps, +1.03" in sam.verdict()
    page = (found.folder / "report.html").read_text()
    assert "measured once on one machine, in short runs that alternate (median of up to 5 rounds: 1.67 for sam:rho=0.1)" in page
    assert label in page
    assert json.loads((found.folder / "results.json").read_text())["seconds"]["sam:rho=0.1"]["length"] == 17


def test_it_is_measured_once_by_runs_that_alternate_and_never_again(mine, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = compare(mine, out)
    done = timed_runs(mine)
    assert done[:6] == [("None", s, 10) if plain else (done[1][0], s, 10) for s in range(3) for plain in (True, False)]
    short = done[6:-3]
    assert [(name == "None", length) for name, _, length in short] == [(True, 2), (False, 2)] * 6
    assert done[-3:] == [("None", s, 17) for s in range(3)]
    kept = json.loads((out / "plan.json").read_text())
    assert kept["seconds"]["sam:rho=0.1"]["lengths"] == [1, 2]

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(comparison, "measured", never)
    shutil.rmtree(out / "runs" / "none" / "seed-1")
    shutil.rmtree(next((out / "runs").glob("none@*-by-seconds")) / "seed-2")
    timed_runs(mine).clear()
    again = compare(mine, out)
    assert timed_runs(mine) == [("None", 1, 10), ("None", 2, 17)]
    assert [row.verdict() for row in again.rows] == [row.verdict() for row in first.rows]
    # The stored plan is used, whatever a machine would measure now.
    kept["seconds"]["sam:rho=0.1"] |= {"ratio": 1.2, "length": 12}
    (out / "plan.json").write_text(json.dumps(kept))
    assert {r.epochs for r in compare(mine, out).records if r.budget == "seconds"} == {12}


def test_it_can_be_left_out_and_is_not_asked_for_by_default(mine, tmp_path):
    assert {r.budget for r in compare(mine, tmp_path / "out", rivals=None).records} == {"epochs", "gradients"}
    compare(mine, tmp_path / "out")
    without = compare(mine, tmp_path / "out", rivals=["epochs"])
    assert {r.budget for r in without.records} == {"epochs"}
    assert "seconds of" not in str(without)


def test_a_variant_that_is_no_slower_is_compared_with_plain_training_itself(mine, tmp_path):
    given = {"fast": {"penalty": "sam:rho=0.1", "cost": 0.1}}
    found = compare(mine, tmp_path / "out", penalties=given)
    assert found.plan.seconds["fast"].ratio == pytest.approx(0.7 / 1.5)
    assert {r.budget for r in found.records} == {"epochs"}
    assert found.rows[-1].seconds_difference.decision == "helps"


def test_variants_with_the_same_length_share_a_baseline(mine, tmp_path):
    found = compare(mine, tmp_path / "out", penalties=["sam:rho=0.1", "sam:rho=0.2"])
    assert sum(r.budget == "seconds" for r in found.records) == 3
    assert found.rows[1].label == "none, equal seconds of sam:rho=0.1 and sam:rho=0.2: 17 epochs, ratio 1.67 measured"


def test_a_race_may_be_decided_at_equal_seconds(mine, tmp_path):
    found = compare(mine, tmp_path / "out", until="decided", max_seeds=5)
    row = next(row for row in found.rows if row.label == "sam:rho=0.1")
    assert row.seconds_difference.decision == "helps"
    assert "at equal seconds over" in row.seconds_difference.sentence
    assert "after Holm and all looks" in row.seconds_difference.sentence
    assert sum(r.budget == "seconds" for r in found.records) == row.runs < 6


def side(length: int, step_of, *, shortest: int = 1) -> Side:
    """A run whose steps take what ``step_of`` says: seconds and evaluations of each."""

    def run(stretch: Fraction) -> Timed | str:
        n = int(length * stretch)
        if n < shortest:
            return "TaskError: too short"
        return Timed(3.0 + sum(step_of(i)[0] for i in range(n)), sum(step_of(i)[1] for i in range(n)))

    return Side(run, length, run(Fraction(1)).evaluations)


def test_a_penalty_that_rests_at_first_is_seen_in_longer_runs():
    # Twenty of forty steps without, twenty with a second evaluation that takes as long as the first.
    late = side(40, lambda i: (1.0, 1) if i < 20 else (2.0, 2))
    found = measure(side(40, lambda i: (1.0, 1)), late)
    assert (found.ratio, found.length) == (pytest.approx(1.5), 60)
    every = measure(side(40, lambda i: (1.0, 1)), side(40, lambda i: (2.0, 2) if i % 5 == 0 else (1.0, 1)))
    assert (every.ratio, every.length) == (pytest.approx(1.2), 48)


def test_short_runs_are_lengthened_until_the_clock_tells_and_the_task_can():
    tiny = measure(side(1000, lambda i: (0.001, 1)), side(1000, lambda i: (0.003, 2)))
    assert tiny.lengths[0] * 0.001 >= LEAST > tiny.lengths[0] * 0.0005
    assert tiny.ratio == pytest.approx(3.0)
    rare = measure(side(40, lambda i: (1.0, 1), shortest=5), side(40, lambda i: (2.0, 2), shortest=5))
    assert (rare.lengths, rare.length) == ((8, 16), 80)
    with pytest.raises(
        ValueError, match=r"a run of 20 and of 40 epochs or steps must be possible.*got TaskError: too short.*'seconds' out"
    ):
        measure(side(40, lambda i: (1.0, 1), shortest=21), side(40, lambda i: (2.0, 2)))
    with pytest.raises(ValueError, match=r"must take longer than one of 20"):
        measure(side(40, lambda i: (0.0, 1)), side(40, lambda i: (0.0, 2)))


def test_a_ratio_is_not_moved_by_one_disturbed_round():
    calls = iter(range(10_000))

    def run(stretch: Fraction) -> Timed:
        disturbed = 100.0 if next(calls) == 9 else 0.0
        return Timed(10 * float(stretch) + disturbed, 10 * float(stretch))

    found = measure(Side(run, 10, 10), side(10, lambda i: (2.0, 2)))
    assert found.ratio == pytest.approx(2.0)


def compiled(length: int, seconds: float, evaluations: float, draws: random.Random, *, logs: bool = True, every: int = 1) -> Side:
    """A run whose first epoch compiles, for a time that varies by more than its epochs take."""

    def run(stretch: Fraction) -> Timed:
        n, start = int(length * stretch), draws.uniform(1.0, 9.0)
        marks = tuple((i + 1.0, start + seconds * (i + 1), evaluations * (i + 1)) for i in range(every - 1, n, every)) if logs else ()
        return Timed(start + seconds * n, evaluations * n, marks)

    return Side(run, length, evaluations * length)


def test_a_compilation_that_varies_by_more_than_the_epochs_take_does_not_move_the_ratio():
    draws = random.Random(0)
    found = measure(compiled(30, 0.02, 1, draws), compiled(30, 0.035, 2, draws))
    assert (found.ratio, found.length) == (pytest.approx(1.75), 53)
    assert len(found.rounds) == 5
    assert found.agrees
    seldom = measure(compiled(30, 0.02, 1, draws), compiled(30, 0.035, 2, draws, every=2))
    assert seldom.ratio == pytest.approx(1.75)


def test_rounds_that_do_not_agree_are_added_to_and_said():
    draws = random.Random(0)
    found = measure(compiled(30, 0.02, 1, draws, logs=False), compiled(30, 0.035, 2, draws, logs=False))
    assert not found.agrees
    low, high = found.quartiles
    assert low <= found.ratio <= high
    assert high > 1.2 * low
    assert measure(side(40, lambda i: (1.0, 1)), side(40, lambda i: (2.0, 2))).agrees


def test_a_round_that_is_alone_agrees_with_none():
    assert not EqualSeconds(1.7, 17, (1.7,), (1, 2)).agrees
    assert EqualSeconds(1.7, 17, (1.7, 1.7, 1.75), (1, 2)).agrees


def test_a_mark_before_the_first_length_is_left_out_and_one_mark_is_none():
    marks = ((1.0, 5.0, 1.0), (2.0, 6.0, 3.0), (4.0, 10.0, 7.0))
    assert Timed(11.0, 7.0, marks).since(2) == (2.0, 4.0, 4.0)
    assert Timed(11.0, 7.0, marks).since(1) == (3.0, 5.0, 6.0)
    assert Timed(11.0, 7.0, marks).since(3) is None


def test_a_rival_whose_seconds_could_not_be_told_is_warned_of(mine, tmp_path):
    compare(mine, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "plan.json").read_text())
    kept["seconds"]["sam:rho=0.1"] |= {"rounds": [0.5, 1.6, 1.7, 9.0]}
    (tmp_path / "out" / "plan.json").write_text(json.dumps(kept))
    found = compare(mine, tmp_path / "out")
    said = "sam:rho=0.1: its seconds could not be told well, 1.33 to 3.52 times those of none"
    assert said in str(found)
    assert said in (found.folder / "report.html").read_text()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_real_task_is_measured_wherever_its_runs_are(tmp_path, workers):
    path = tmp_path / "real.py"
    path.write_text(TASK.replace("        CLOCK.now += 0.5", "        __import__('time').sleep(0.02)\n        CLOCK.now += 0.5"))
    found = study.compare(
        str(path), penalties=["sam:rho=0.1"], seeds=2, rivals=["seconds"], out=tmp_path / "out", workers=workers, options={"epochs": 4}
    )
    assert found.plan.seconds["sam:rho=0.1"].ratio > 0
    assert not list(tmp_path.glob("gradreg-*"))
