"""``until="decided"``: a study that adds seeds to its undecided variants, from the runs to the sentences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gradreg import cli, files, study
from gradreg.study.racing import Race
from gradreg.study.stored_plan import PlanError

TASK = '''
import random
import torch
from gradreg import study

@study.task(metric="rmse", mode="min")
def train(run: study.Run, *, effect: float = 0.0, fail_at: int = -1) -> None:
    """A metric that is drawn."""
    draw = random.Random(run.seed)
    plain, noise = draw.gauss(10, 2), draw.gauss(0, 1)
    model = torch.nn.Linear(1, 1)
    regularizer = run.regularizer(model)
    if run.seed == fail_at:
        raise RuntimeError("no more")
    for epoch in run.epochs(2):
        regularizer.backward(lambda: model(torch.ones(1, 1)).sum())
        run.log(test_rmse=plain - (0 if run.penalty is None else effect + noise), validation_rmse=plain)
'''
UNDECIDED, HELPS, HARMS = "sam:rho=0.1", "sam:rho=0.1@effect=3.0", "sam:rho=0.1@effect=-9.0"
RACE = {"penalties": [UNDECIDED, HELPS, HARMS], "seeds": 3, "until": "decided", "max_seeds": 10, "workers": 0}


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "mine.py"
    path.write_text(TASK)
    return path


@pytest.fixture(scope="module")
def raced(mine: Path, tmp_path_factory: pytest.TempPathFactory) -> study.Comparison:
    return study.compare(str(mine), out=tmp_path_factory.mktemp("race") / "out", **RACE)


def values(found: study.Comparison, variant: str, budget: str = "epochs") -> dict[int, float]:
    return {r.seed: r.test for r in found.records if (r.variant, r.budget) == (variant, budget)}


def test_seeds_are_added_to_the_undecided_alone_and_the_baselines_get_those_of_their_variants(raced):
    decided = {name: verdict.decision for name, verdict in raced.verdicts.items()}
    assert decided == {UNDECIDED: "cannot tell", HELPS: "helps", HARMS: "harms"}
    counts = {name: len(values(raced, name)) for name in decided}
    assert 3 <= counts[HARMS] < counts[HELPS] < counts[UNDECIDED] == 10
    assert sorted(values(raced, "none")) == sorted(values(raced, "none", "gradients")) == list(range(10))
    assert all(sorted(values(raced, name)) == list(range(n)) for name, n in counts.items())
    assert [raced.verdicts[name].n for name in counts] == list(counts.values())


def test_the_verdicts_are_those_of_the_race(raced):
    race = Race(range(10), first=3)
    standing = race.judge(values(raced, "none"), {name: values(raced, name) for name in raced.verdicts}, mode="min")
    assert standing.finished
    for name, verdict in standing.verdicts.items():
        found = raced.verdicts[name]
        assert (found.decision, found.p_holm, found.low, found.high) == (verdict.decision, verdict.p_holm, verdict.low, verdict.high)
        assert "after Holm and all looks" in found.sentence
    rows = {row.label: row for row in raced.rows}
    assert {name: rows[name].looks for name in standing.taken} == standing.taken
    beside = race.judge_beside(
        values(raced, "none", "gradients"),
        {name: values(raced, name) for name in raced.verdicts},
        taken=standing.taken,
        mode="min",
        metric="rmse",
        against="none at equal gradients",
    )
    assert {name: rows[name].matched_difference for name in beside} == beside


def test_all_places_say_that_seeds_were_added(raced):
    said = (
        "3 at first, then one at a time to the undecided variants, up to 10. 8 of at most 8 looks were taken, which spent 0.05 of the 0.05"
    )
    page = (raced.folder / "report.html").read_text()
    assert said in raced.race_said
    assert said in str(raced)
    assert said in page
    assert "Seeds were added to the variants that were undecided, one at a time from 3 up to at most 10 (8 looks)" in page
    assert "O&#39;Brien-Fleming type" in page
    assert "Student&#39;s t" not in page
    least = min(len(values(raced, name)) for name in raced.verdicts)
    assert f"over {least} to 10 seeds" in page
    assert "| 10 (8) |" in raced.markdown()
    written = json.loads((raced.folder / "results.json").read_text())
    assert written["seeds"] == list(range(10))
    assert [look["seeds"] for look in written["race"]["looks"]] == list(range(3, 11))
    assert written["race"]["looks"][-1]["spent"] == pytest.approx(0.05)
    decided = {name: way for look in written["race"]["looks"] for name, way in look["decided"].items()}
    assert decided == {HELPS: "better", HARMS: "worse"}
    assert {row["label"]: row["looks"] for row in written["table"]}["none"] == 8


def test_an_interrupted_race_goes_on_as_if_it_had_not_been(mine, raced, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(raced.folder, folder)
    (folder / "results.json").unlink()
    kept = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**kept, "looks": kept["looks"][:2]}))
    for lost in ("sam-rho-0.1/seed-4", "none/seed-6", "none@4-gradients/seed-2"):
        shutil.rmtree(folder / "runs" / lost)
    again = study.compare(str(mine), out=folder, **RACE)
    assert again.verdicts == raced.verdicts
    assert json.loads((folder / "plan.json").read_text()) == kept
    assert {r.folder: r.test for r in again.records} == {r.folder: r.test for r in raced.records}


def test_a_race_whose_rule_or_results_have_changed_is_an_error(mine, raced, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(raced.folder, folder)
    with pytest.raises(PlanError, match=r"race with another rule: seeds .* Bound, first look and variants are fixed"):
        study.compare(str(mine), out=folder, **{**RACE, "max_seeds": 12})
    with pytest.raises(PlanError, match=r"another rule: first 3 → 4"):
        study.compare(str(mine), out=folder, **{**RACE, "seeds": 4})
    with pytest.raises(PlanError, match=r"holds a race, seeds 0 to 9 until decided; got a study without"):
        study.compare(str(mine), out=folder, **{**RACE, "until": None, "max_seeds": None})
    held = folder / "runs" / "sam-rho-0.1" / "seed-1" / "result.json"
    held.write_text(json.dumps({**json.loads(held.read_text()), "test_rmse": 99.0}))
    with pytest.raises(PlanError, match=r"results that have changed since the look at 3 seeds: it saw p .* of sam:rho=0.1,"):
        study.compare(str(mine), out=folder, **RACE)


def test_runs_of_a_study_without_a_race_are_kept_and_said(mine, tmp_path):
    options = {"penalties": [HELPS], "rivals": ["epochs"], "workers": 0, "out": tmp_path}
    study.compare(str(mine), seeds=3, **options)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    found = study.compare(str(mine), seeds=3, until="decided", max_seeds=8, **options)
    assert len(before) == 6
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert any("the first 3 seeds were judged without a race before it began" in text for text in found.warnings)


def test_a_variant_that_failed_is_out_and_may_come_back(mine, tmp_path):
    folder = tmp_path / "out"
    given = {"broken": {"penalty": "sam:rho=0.1", "fail_at": 1, "effect": 3.0}, "none": None}
    options = {**RACE, "penalties": given, "rivals": ["epochs"], "max_seeds": 4, "out": folder}
    found = study.compare(str(mine), **options)
    assert (found.verdicts["broken"].decision, len(values(found, "broken"))) == ("diverged", 3)
    looks = json.loads((folder / "plan.json").read_text())["looks"]
    assert (looks[0]["decided"], looks[0]["failed"]) == ({"broken": "diverged"}, ["runs/broken/seed-1"])
    assert study.compare(str(mine), **options).verdicts == found.verdicts
    # Had it failed for another reason, the run would end now.
    ended = folder / "runs" / "broken" / "seed-1"
    measured = files.read_json(folder / "runs" / "broken" / "seed-0" / "result.json", holds="a result", remedy="none")
    files.write_json(ended / "result.json", files.tied(measured, ended / "config.json"))
    again = study.compare(str(mine), **options)
    assert again.verdicts["broken"].decision == "helps"
    assert json.loads((folder / "plan.json").read_text())["looks"][0]["failed"] == []


@pytest.mark.parametrize("rival", ["gradients", "early"])
def test_without_equal_epochs_the_next_rival_decides(mine, tmp_path, rival):
    found = study.compare(str(mine), out=tmp_path, **{**RACE, "penalties": [HELPS, HARMS], "rivals": [rival]})
    rows = {row.label: row for row in found.rows}
    verdicts = {name: rows[name].matched_difference if rival == "gradients" else rows[name].early_difference for name in (HELPS, HARMS)}
    assert {name: v.decision for name, v in verdicts.items()} == {HELPS: "helps", HARMS: "harms"}
    assert all("after Holm and all looks" in v.sentence for v in verdicts.values())
    assert found.verdicts == {}
    assert len(values(found, HARMS)) < 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"until": "significant"}, r"unknown until 'significant'|until must be .*decided"),
        ({"until": "decided", "seeds": 1}, r"seeds must be >= 2 with until='decided'; got 1"),
        ({"until": "decided", "seeds": 5, "max_seeds": 4}, r"max_seeds must be >= seeds, the first look's; got 4 with seeds = 5"),
        ({"until": "decided", "max_seeds": 0}, r"max_seeds must be >= 1; got 0"),
        ({"until": "decided", "max_seeds": 7.5}, r"max_seeds must be .*7\.5"),
        ({"max_seeds": 9}, r"max_seeds must be left out without until; got 9"),
        ({"until": "decided", "rivals": []}, r"rivals must name one with until='decided'"),
        ({"until": "decided", "margin": -1.0}, r"margin must be .*-1"),
    ],
)
def test_bad_races_in_words(mine, tmp_path, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        study.compare(str(mine), penalties=[UNDECIDED], out=tmp_path / "out", workers=0, **given)
    assert not (tmp_path / "out").exists()


def test_without_max_seeds_the_bound_is_four_times_the_first_look_and_a_margin_lets_go(mine, tmp_path):
    found = study.compare(
        str(mine), penalties=[UNDECIDED], seeds=3, until="decided", margin=4.0, rivals=["epochs"], out=tmp_path, workers=0
    )
    assert found.plan.seeds == list(range(12))
    assert found.verdicts[UNDECIDED].decision in ("equivalent", "no gain")
    assert len(values(found, UNDECIDED)) < 12


@pytest.mark.slow
def test_two_workers_take_the_same_decisions_as_one_process(mine, raced, tmp_path, capsys):
    words = ["compare", str(mine), "--penalties", UNDECIDED, HELPS, HARMS, "--seeds", "3", "--until", "decided", "--max-seeds", "10"]
    assert cli.main([*words, "--workers", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "mine, 5 to 10 seeds" in printed
    assert raced.race_said in printed
    assert all(verdict.sentence in printed for verdict in raced.verdicts.values())
    written = json.loads((tmp_path / "results.json").read_text())
    alone = json.loads((raced.folder / "results.json").read_text())
    assert written["race"] == alone["race"]
    kept = ("label", "runs", "mean", "difference", "matched_difference", "early_difference", "looks", "verdict")
    assert [[row[key] for key in kept] for row in written["table"]] == [[row[key] for key in kept] for row in alone["table"]]
