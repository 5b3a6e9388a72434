"""Races: the levels against published and independent ones, replay, what is wanted next, and that looking often costs no error."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gradreg.study.boundaries import nominal_levels, normal_quantile, stagewise_p
from gradreg.study.racing import Race
from gradreg.study.replay import replay
from gradreg.study.verdicts import compare_paired

NAN = float("nan")
FIFTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def study(*effects, seeds=12, seed=0):
    rng = np.random.default_rng(seed)
    baseline = {s: float(rng.normal(90, 2)) for s in range(seeds)}
    return baseline, {f"v{i}": {s: baseline[s] + e + float(rng.normal(0, 1)) for s in baseline} for i, e in enumerate(effects)}


def run(race, baseline, variants, **keywords):
    """Run a race as the engine does: only what is wanted is there."""
    have: dict[str, dict[int, float]] = {name: {} for name in variants}
    plain: dict[int, float] = {}
    for _ in range(len(race.seeds) + 1):
        standing = race.judge(plain, have, mode="max", **keywords)
        if standing.finished:
            return standing, plain, have
        plain |= {s: baseline[s] for s in standing.baseline_wanted}
        for name, seeds in standing.wanted.items():
            have[name] |= {s: variants[name][s] for s in seeds}
    raise AssertionError("the race did not end")


@pytest.mark.parametrize(
    ("spending", "published"),
    [
        ("obrien-fleming", (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
        ("pocock", (2.4380, 2.4268, 2.4101, 2.3966, 2.3859)),
    ],
)
def test_the_levels_are_those_of_the_tables_of_group_sequential_trials(spending, published):
    # Two-sided .05, five equal looks, both tails spent apart: the standard table of Lan-DeMets boundaries.
    assert stats.norm.isf(np.array(nominal_levels(FIFTHS, 0.05, spending)) / 2) == pytest.approx(published, abs=2e-4)


@pytest.mark.parametrize("spending", ["pocock", "obrien-fleming"])
def test_all_looks_together_spend_alpha_by_an_independent_walk(spending):
    levels = nominal_levels(tuple(n / 20 for n in range(3, 21)), 0.05, spending)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((50_000, 20)).cumsum(axis=1)[:, 2:] / np.sqrt(np.arange(3, 21))
    crossed = (2 * stats.norm.sf(np.abs(z)) <= np.array(levels)).any(axis=1).mean()
    assert crossed == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 50_000))


def test_one_look_is_the_study_without_a_race():
    baseline, variants = study(1.0, 2.0, -0.4, seeds=8)
    raced = Race(range(8), first=8).judge(baseline, variants, mode="max", margin=1.0).verdicts
    for name, verdict in compare_paired(baseline, variants, mode="max", margin=1.0).items():
        for field in ("decision", "n", "difference", "p", "low", "high", "sign_flip_p", "bca", "detectable", "needed"):
            expected = getattr(verdict, field)
            assert getattr(raced[name], field) == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected), field
    singly = Race(range(8), first=8).judge(baseline, {"v0": variants["v0"]}, mode="max").verdicts["v0"]
    assert singly.p_holm == pytest.approx(singly.p)


def test_a_race_asks_for_seeds_of_the_undecided_alone_and_ends():
    baseline, variants = study(30.0, 0.0, -30.0)
    standing, plain, have = run(Race(range(12), spending="pocock"), baseline, variants)
    assert [v.decision for v in standing.verdicts.values()] == ["helps", "cannot tell", "harms"]
    assert [len(values) for values in have.values()] == [3, 12, 3]
    assert len(plain) == 12
    assert (standing.looks, standing.wanted, standing.baseline_wanted) == (10, {}, [])
    assert "after Holm and all looks" in standing.verdicts["v0"].sentence


def test_the_first_look_and_the_steps_are_asked_for_in_the_order_of_the_seeds():
    race = Race([5, 3, 9, 1, 7, 8], first=2, step=3)
    assert race.looks == (2, 5, 6)
    empty = race.judge({}, {"a": {}}, mode="max")
    assert (empty.verdicts, empty.wanted, empty.baseline_wanted, empty.looks) == ({}, {"a": [5, 3]}, [5, 3], 0)
    begun = race.judge({5: 1.0, 3: 2.0}, {"a": {5: 1.0}}, mode="max")
    assert (begun.wanted, begun.baseline_wanted, begun.finished) == ({"a": [3]}, [], False)
    looked = race.judge({5: 1.0, 3: 2.0}, {"a": {5: 1.5, 3: 2.7}}, mode="max")
    assert (looked.looks, looked.wanted, looked.baseline_wanted) == (1, {"a": [9, 1, 7]}, [9, 1, 7])


def test_results_beyond_the_deciding_look_change_nothing():
    baseline, variants = study(30.0, 0.0)
    raced, _, _ = run(Race(range(12)), baseline, variants)
    variants["v0"] |= dict.fromkeys(range(raced.verdicts["v0"].n, 12), -1000000.0)
    again = Race(range(12)).judge(baseline, variants, mode="max")
    assert (again.verdicts, again.wanted, again.taken, again.log) == (raced.verdicts, raced.wanted, raced.taken, raced.log)


def test_a_diverged_variant_is_out_at_once():
    baseline, variants = study(30.0, 0.0)
    variants["v0"][1] = NAN
    standing, _, have = run(Race(range(12)), baseline, variants)
    assert (standing.verdicts["v0"].decision, len(have["v0"])) == ("diverged", 3)


def test_a_seed_at_which_the_baseline_diverged_is_passed_over():
    baseline, variants = study(30.0)
    baseline[0] = NAN
    standing, _, _ = run(Race(range(12), spending="pocock"), baseline, variants)
    assert (standing.verdicts["v0"].decision, standing.verdicts["v0"].baseline_failed) == ("helps", 1)


def test_a_variant_races_against_its_own_baseline():
    baseline, variants = study(0.0, 0.0)
    longer = {s: x + 30.0 for s, x in baseline.items()}
    standing = Race(range(12)).judge(baseline, variants, mode="max", baselines={"v1": longer})
    assert [v.decision for v in standing.verdicts.values()] == ["cannot tell", "harms"]
    partly = Race(range(12)).judge(baseline, variants, mode="max", baselines={"v1": {0: 1.0}})
    assert (partly.wanted, partly.baseline_wanted) == ({"v1": [1, 2]}, [])


def test_with_a_margin_a_variant_without_a_gain_is_let_go():
    baseline, variants = study(0.0)
    standing, _, have = run(Race(range(12)), baseline, variants, margin=3.0)
    assert standing.verdicts["v0"].decision in ("equivalent", "no gain")
    assert len(have["v0"]) < 12
    without, _, have = run(Race(range(12)), baseline, variants)
    assert (without.verdicts["v0"].decision, len(have["v0"])) == ("cannot tell", 12)


def test_what_is_shown_hands_its_level_to_the_others():
    levels = np.array([[0.04, 0.05], [0.02, 0.03]])
    failed = np.zeros((2, 2), dtype=bool)
    # The second variant's .035 is above the level of two at the first look, and below that of one once the first variant is shown.
    found = replay(np.array([[0.01, 0.035], [0.9, 0.9]]), failed, levels=levels).differs
    assert (found.shown.tolist(), found.look.tolist(), found.open.tolist()) == ([True, True], [0, 0], [2, 1])
    alone = replay(np.array([[0.021, 0.035], [0.9, 0.049]]), failed, levels=levels).differs
    assert (alone.shown.tolist(), alone.look.tolist()) == ([False, False], [1, 1])
    handed = replay(np.array([[0.021, 0.9], [0.029, 0.049]]), failed, levels=levels).differs
    assert (handed.shown.tolist(), handed.look.tolist(), handed.open.tolist()) == ([True, True], [1, 1], [2, 1])


def test_p_and_interval_agree_with_the_decision():
    for seed in range(6):
        baseline, variants = study(1.3, seed=seed)
        verdict = Race(range(12), spending="pocock").judge(baseline, variants, mode="max").verdicts["v0"]
        assert (verdict.p_holm <= 0.05) == (verdict.decision == "helps") == (not verdict.low <= 0 <= verdict.high)
        assert verdict.low < verdict.difference < verdict.high


def test_lower_is_better_mirrors_higher_is_better():
    baseline, variants = study(1.5, -1.5)
    turned = {name: {s: -x for s, x in values.items()} for name, values in variants.items()}
    up = Race(range(12)).judge(baseline, variants, mode="max", margin=1.0).verdicts
    down = Race(range(12)).judge({s: -x for s, x in baseline.items()}, turned, mode="min", margin=1.0).verdicts
    for name in up:
        assert (up[name].decision, up[name].n, up[name].p_holm) == (down[name].decision, down[name].n, down[name].p_holm)
        assert (up[name].low, up[name].high) == pytest.approx((-down[name].high, -down[name].low))
    assert up["v0"].decision == "helps"


def test_looking_often_costs_no_error_and_would_without_the_levels():
    race = Race(range(12), spending="pocock")
    gains = np.random.default_rng(0).standard_normal((4000, 2, 12))
    p = np.stack([stats.ttest_1samp(gains[..., :n], 0.0, axis=-1).pvalue for n in race.looks], axis=1)
    failed = np.zeros(p.shape, dtype=bool)
    false = replay(p, failed, levels=race.levels(2)).differs.shown.any(axis=-1).mean()
    uncorrected = replay(p, failed, levels=np.repeat([[0.05], [0.025]], len(race.looks), axis=1)).differs.shown.any(axis=-1).mean()
    assert 0.03 < false < 0.06
    assert uncorrected > 0.12


@pytest.mark.parametrize("effect", [0.0, 0.8, 2.0])
def test_the_intervals_of_races_that_stop_early_cover_on_both_sides(effect):
    race = Race(range(12), spending="pocock")
    gains = np.random.default_rng(1).normal(effect, 1.0, (2000, 1, 12))
    parts = [gains[..., :n] for n in race.looks]
    mean, se = (np.concatenate(x, axis=1) for x in ([p.mean(axis=-1) for p in parts], [stats.sem(p, axis=-1) for p in parts]))
    n = np.array(race.looks)
    p = 2 * stats.t.sf(np.abs(mean / se), n - 1)
    levels = race.levels(1)
    stopped = replay(p[..., None], np.zeros((*p.shape, 1), dtype=bool), levels=levels).differs.look[:, 0]
    assert effect == 0 or (stopped < len(n) - 1).mean() > 0.4
    above = np.zeros(len(gains))
    for look in set(stopped.tolist()):
        here = stopped == look
        z = normal_quantile((mean[here, look] - effect) / se[here, look], n[look] - 1)
        times = tuple(x / 12 for x in n[: look + 1])
        counts = np.broadcast_to(n[: look + 1], (here.sum(), look + 1))
        above[here] = stagewise_p(times, levels[0, : look + 1], n=counts, se=se[here, : look + 1], z=z, mean=effect)
    # A p that is right is uniform; the normal approximation to the walk of t costs up to a point on each side.
    assert (above < 0.025).mean() == pytest.approx(0.025, abs=0.02)
    assert (above > 0.975).mean() == pytest.approx(0.025, abs=0.02)
    assert above.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"seeds": range(2)}, ValueError, "at least first = 3; got 2"),
        ({"seeds": [1, 1, 2]}, ValueError, "seeds must differ"),
        ({"first": 1}, ValueError, "first must be >= 2; got 1"),
        ({"step": 0}, ValueError, "step must be >= 1; got 0"),
        ({"step": 1.5}, TypeError, "step must be a whole number"),
        ({"level": 1.0}, ValueError, "level must be between 0 and 1"),
        ({"spending": "all"}, ValueError, "unknown spending 'all'"),
    ],
)
def test_settings_out_of_range_raise(keywords, error, match):
    with pytest.raises(error, match=match):
        Race(**{"seeds": range(10), **keywords})


def test_a_race_of_nobody_raises():
    with pytest.raises(ValueError, match="at least one variant; got none"):
        Race(range(5)).judge({}, {}, mode="max")


def test_another_question_errs_no_oftener_though_the_race_stops_for_what_it_saw():
    """Two questions that share the variants' values, without an effect: the second one is judged where the first one stopped."""
    race, races = Race(range(12), first=4), 20_000
    rng = np.random.default_rng(0)
    own = rng.standard_normal((races, 12))
    other = 0.9 * own + math.sqrt(1 - 0.81) * rng.standard_normal((races, 12))
    levels = race.levels(1)

    def p_at_looks(values):
        return np.stack([stats.ttest_1samp(values[:, :n], 0.0, axis=1).pvalue for n in race.looks], axis=1)

    found = replay(p_at_looks(own)[..., None], np.zeros((races, len(race.looks), 1), bool), levels=levels).differs
    stopped = found.look[:, 0]
    beside = np.take_along_axis(p_at_looks(other), stopped[:, None], axis=1)[:, 0]
    false = (beside <= levels[0, stopped]).mean()
    assert false <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / races)
    naive = (beside <= 0.05).mean()
    assert naive > 0.05 + 3 * math.sqrt(0.05 * 0.95 / races)


def test_what_is_judged_beside_a_race_has_repeated_p_and_intervals():
    baseline, variants = study(1.4, 0.2)
    race = Race(range(12), first=4)
    taken = {"v0": 3, "v1": 9}
    verdicts = race.judge_beside(baseline, variants, taken=taken, mode="max")
    for name, verdict in verdicts.items():
        n = race.looks[taken[name] - 1]
        gains = np.array([variants[name][s] - baseline[s] for s in range(n)])
        level = race.levels(1)[0, taken[name] - 1]
        interval = stats.ttest_1samp(gains, 0.0).confidence_interval(1 - level)
        assert (verdict.n, verdict.low, verdict.high) == (n, pytest.approx(interval.low), pytest.approx(interval.high))
        alone = race.judge_beside(baseline, {name: variants[name]}, taken=taken, mode="max")[name]
        assert (alone.p_holm <= 0.05) == (not interval.low <= 0 <= interval.high) == (alone.decision == "helps")
    # A race of one look is a study without one.
    single = Race(range(12), first=12).judge_beside(baseline, variants, taken=dict.fromkeys(variants, 1), mode="max", margin=1.0)
    for name, verdict in compare_paired(baseline, variants, mode="max", margin=1.0).items():
        for field in ("decision", "low", "high", "p_holm", "no_worse_p", "no_gain_p"):
            expected = getattr(verdict, field)
            assert getattr(single[name], field) == (pytest.approx(expected, rel=1e-3) if isinstance(expected, float) else expected), field
