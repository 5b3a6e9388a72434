"""Verdicts: by hand, by SciPy's own tests, and where a study is small, tied, diverged or incomplete."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gradreg.study.verdicts import compare_paired

NAN = float("nan")
ROOT = Path(__file__).parents[2]


def study(*effects, seeds=10, spread=1.0, seed=0):
    """A baseline and a variant for each effect, with normal differences."""
    rng = np.random.default_rng(seed)
    baseline = {s: float(rng.normal(90, 2)) for s in range(seeds)}
    return baseline, {f"v{i}": {s: baseline[s] + e + float(rng.normal(0, spread)) for s in baseline} for i, e in enumerate(effects)}


def differences(baseline, values):
    return np.array([values[s] - baseline[s] for s in baseline])


def test_by_hand():
    # Differences 1, 2, 3: mean 2, sd 1, t = 2√3 = 3.4641, p = 0.0742 with 2 degrees of freedom, half width 4.3027/√3.
    found = compare_paired({0: 5.0, 1: 5.0, 2: 5.0}, {"a": {0: 6.0, 1: 7.0, 2: 8.0}}, mode="max")["a"]
    assert (found.n, found.difference, found.sd) == (3, 2.0, 1.0)
    assert (found.low, found.high, found.p) == pytest.approx((2 - 2.4841, 2 + 2.4841, 0.0742), abs=1e-4)
    assert (found.p_holm, found.sign_flip_p, found.bca) == (found.p, 0.25, None)
    assert found.decision == "cannot tell"


def test_the_test_and_the_interval_are_scipys_and_holm_is_over_the_variants():
    baseline, variants = study(1.18, 3.0, -2.0, -0.6)
    found = compare_paired(baseline, variants, mode="max")
    for name, verdict in found.items():
        theirs = stats.ttest_rel(list(variants[name].values()), list(baseline.values()))
        assert verdict.p == pytest.approx(theirs.pvalue)
        assert (verdict.low, verdict.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    p = sorted(v.p for v in found.values())
    by_hand = [max((4 - j) * p[j] for j in range(i + 1)) for i in range(4)]
    assert sorted(v.p_holm for v in found.values()) == pytest.approx([min(1, x) for x in by_hand])
    assert found["v0"].p < 0.05 < found["v0"].p_holm, "the case must be one that Holm changes"
    assert [v.decision for v in found.values()] == ["cannot tell", "helps", "harms", "cannot tell"]


def test_lower_is_better_mirrors_higher_is_better():
    baseline, variants = study(1.5, -1.5, 0.1)
    up = compare_paired(baseline, variants, mode="max", margin=1.0)
    down = compare_paired(
        {s: -x for s, x in baseline.items()}, {k: {s: -x for s, x in v.items()} for k, v in variants.items()}, mode="min", margin=1.0
    )
    for name in up:
        a, b = up[name], down[name]
        assert (a.decision, a.gain, a.p_holm, a.no_worse_p, a.no_gain_p) == (b.decision, b.gain, b.p_holm, b.no_worse_p, b.no_gain_p)
        assert (a.difference, a.low, a.high) == pytest.approx((-b.difference, -b.high, -b.low))
    assert [v.decision for v in up.values()] == ["helps", "harms", "equivalent"]
    wrong_way = compare_paired(baseline, variants, mode="min")
    assert [v.decision for v in wrong_way.values()][:2] == ["harms", "helps"]


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, None, "missing"])
def test_a_variant_with_one_diverged_seed_never_helps(bad):
    baseline, variants = study(9.0, 9.0)
    if bad == "missing":
        del variants["v0"][4]
    else:
        variants["v0"][4] = bad
    found = compare_paired(baseline, variants, mode="max")
    assert (found["v0"].decision, found["v0"].failed, found["v0"].n, found["v0"].p_holm) == ("diverged", 1, 9, 1.0)
    assert found["v0"].p < 1e-6, "the others look good, which is why the rule is there"
    assert "does not help: it diverged or failed at 1 of 10 seeds" in found["v0"].sentence
    assert found["v1"].decision == "helps"
    # It still counts in Holm: its share goes to nobody.
    assert found["v1"].p_holm == pytest.approx(2 * found["v1"].p)


def test_a_diverged_variant_that_is_worse_elsewhere_harms():
    baseline, variants = study(-9.0)
    variants["v0"][4] = NAN
    found = compare_paired(baseline, variants, mode="max")["v0"]
    assert (found.decision, found.failed) == ("harms", 1)
    assert "It diverged or failed at 1 seed more." in found.sentence


def test_seeds_at_which_the_baseline_diverged_are_left_out_and_named():
    baseline, variants = study(9.0)
    baseline[3] = NAN
    found = compare_paired(baseline, variants, mode="max", against="plain")["v0"]
    assert (found.decision, found.n, found.failed, found.baseline_failed) == ("helps", 9, 0, 1)
    assert "1 seed left out at which plain diverged." in found.sentence


def test_seeds_that_the_baseline_does_not_have_are_ignored():
    baseline, variants = study(1.0)
    more = {"v0": {**variants["v0"], 77: 1e9}}
    assert compare_paired(baseline, more, mode="max") == compare_paired(baseline, variants, mode="max")


def test_a_variant_may_have_a_baseline_of_its_own():
    baseline, variants = study(2.0, 2.0)
    longer = {s: x + 2.0 for s, x in baseline.items()}
    found = compare_paired(baseline, variants, mode="max", baselines={"v1": longer})
    assert found["v0"].decision == "helps"
    assert found["v1"].difference == pytest.approx(float(differences(longer, variants["v1"]).mean()))
    assert found["v1"].decision == "cannot tell"


@pytest.mark.parametrize(("baseline", "values"), [({0: 1.0}, {0: 9.0}), ({0: NAN}, {0: 9.0}), ({}, {})])
def test_one_seed_or_none_tells_nothing(baseline, values):
    found = compare_paired(baseline, {"a": values}, mode="max", margin=1.0)["a"]
    assert found.decision == "cannot tell"
    assert (found.low, found.high, found.p, found.p_holm, found.sign_flip_p, found.detectable, found.needed) == (None,) * 7
    assert "cannot tell with" in found.sentence
    assert "An interval needs 2" in found.sentence


@pytest.mark.parametrize("n", [2, 3, 5, 6, 10])
def test_equal_differences_are_left_to_the_sign_flips(n):
    # A t test would have p = 0 at once; on a coarse metric two seeds tie easily.
    baseline = {s: 0.1 * s for s in range(n)}
    found = compare_paired(baseline, {"a": {s: 0.1 * s + 0.3 for s in range(n)}}, mode="max")["a"]
    assert found.p == found.sign_flip_p == pytest.approx(2 / 2**n)
    assert (found.low, found.high, found.bca, found.sd) == (None, None, None, 0.0), "the rounding of 0.1·s must not look like a spread"
    assert found.decision == ("helps" if n >= 6 else "cannot tell")


def test_a_constant_metric_has_no_verdict_but_that_it_is_equal():
    same = dict.fromkeys(range(8), 0.7)
    found = compare_paired(same, {"a": same}, mode="max")["a"]
    assert (found.p, found.sign_flip_p, found.decision, found.needed) == (1.0, 1.0, "cannot tell", None)
    assert "equal at every seed" in found.sentence
    assert compare_paired(same, {"a": same}, mode="max", margin=0.01)["a"].decision == "equivalent"


def test_a_margin_by_hand():
    # Differences −1, 0, 1, 0: mean 0, se = √(2/3)/2 = 0.40825; margin 2: t = 4.899 with 3 degrees of freedom, one-sided p 0.00814.
    values = {"a": {0: -1.0, 1: 0.0, 2: 1.0, 3: 0.0}}
    zero = dict.fromkeys(range(4), 0.0)
    found = compare_paired(zero, values, mode="max", margin=2.0)["a"]
    assert (found.no_worse_p, found.no_gain_p) == pytest.approx((0.00814, 0.00814), abs=1e-5)
    assert found.decision == "equivalent"
    assert compare_paired(zero, values, mode="max", margin=1.0)["a"].decision == "cannot tell"  # t = 2.449, p = 0.046 > 0.025
    up = {"a": {s: x + 1.0 for s, x in values["a"].items()}}
    better = compare_paired(zero, up, mode="max", margin=2.0)["a"]
    assert (better.decision, better.needed) == ("no worse", 5), "four would show 2, but these four have not shown it"
    down = {"a": {s: x - 1.0 for s, x in values["a"].items()}}
    assert compare_paired(zero, down, mode="max", margin=2.0)["a"].decision == "no gain"


def test_holm_is_over_the_claims_of_a_margin_too():
    baseline, variants = study(0.0, 0.1, -0.1)
    found = compare_paired(baseline, variants, mode="max", margin=1.0)
    alone = {name: compare_paired(baseline, {name: variants[name]}, mode="max", margin=1.0)[name] for name in variants}
    smallest = min(alone.values(), key=lambda v: v.no_worse_p)
    assert found[smallest.name].no_worse_p == pytest.approx(3 * smallest.no_worse_p)


def test_needed_seeds_would_do_and_one_fewer_would_not():
    baseline, variants = study(0.7, seeds=6, seed=3)
    found = compare_paired(baseline, variants, mode="max")["v0"]
    assert found.decision == "cannot tell"

    def power(n):
        t = stats.t.isf(0.025, n - 1)
        return stats.nct.sf(t, n - 1, found.difference / found.sd * math.sqrt(n))

    assert power(found.needed) >= 0.8 > power(found.needed - 1)
    assert f"about {found.needed}" in found.sentence


def test_the_margin_decides_how_many_seeds_are_asked_for_where_it_is_larger():
    baseline, variants = study(-0.9, seeds=4, spread=2.0)
    plain, with_margin = (compare_paired(baseline, variants, mode="max", margin=m)["v0"] for m in (None, 1.0))
    assert plain.decision == with_margin.decision == "cannot tell"
    assert with_margin.needed < (plain.needed or math.inf)
    assert "one as large as the margin" in with_margin.sentence


def test_a_verdict_is_json():
    baseline, variants = study(1.0, 0.0)
    variants["v1"][0] = NAN
    for verdict in compare_paired(baseline, variants, mode="max", margin=0.5).values():
        assert json.loads(json.dumps(asdict(verdict), allow_nan=False))["sentence"] == verdict.sentence


def test_numpy_numbers_are_taken():
    baseline, variants = study(2.0)
    arrays = {"v0": {s: np.float32(x) for s, x in variants["v0"].items()}}
    assert compare_paired({s: np.float64(x) for s, x in baseline.items()}, arrays, mode="max")["v0"].decision == "helps"


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"mode": "high"}, ValueError, "mode"),
        ({"level": 95}, ValueError, r"level must be between 0 and 1; got 95\. Write 95 % as 0\.95"),
        ({"level": "0.95"}, TypeError, "level must"),
        ({"margin": 0.0}, ValueError, "margin must be finite and > 0"),
        ({"margin": -1.0}, ValueError, "margin must be finite and > 0"),
        ({"variants": {}}, ValueError, "at least one variant; got none"),
    ],
)
def test_settings_out_of_range_raise(keywords, error, match):
    baseline, variants = study(1.0)
    with pytest.raises(error, match=match):
        compare_paired(baseline, keywords.pop("variants", variants), **{"mode": "max", **keywords})


def test_the_code_of_the_page_prints_what_the_page_says(capsys):
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    code, output = re.findall(r"```(?:python)?\n(.*?)```", text, flags=re.DOTALL)[:2]
    exec(code, {})
    assert capsys.readouterr().out == output


@pytest.fixture
def simulation(monkeypatch):
    """The benchmark, imported as a script finds its neighbors; their names are given back."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "tables", raising=False)  # docs/ has one of that name too
    yield importlib.import_module("study_statistics")
    for name in {"study_statistics", "reporting", "tables"} - before:
        sys.modules.pop(name, None)


def test_the_figures_of_the_page_are_the_stored_ones_and_keep_the_guarantee(simulation):
    page, stored = simulation.PAGE.read_text(encoding="utf-8"), simulation.STORED.read_text(encoding="utf-8")
    assert simulation.page(page, stored) == page
    results = json.loads(simulation.STORED.with_suffix(".json").read_text(encoding="utf-8"))
    assert simulation.table(results) == stored
    assert results["studies"] == 10_000
    assert [row["beyond"] for row in results["rows"]] == [kind.beyond for kind in simulation.KINDS]
    assert simulation.broken(results["rows"]) == []


def test_a_simulated_kind_that_leaves_the_guarantee_is_found(simulation):
    good = simulation.simulate(simulation.Kind("", (0.0, 1.0), 5), 400, seed=0)
    assert simulation.broken([{**good, "coverage": 0.95, "false helps": 0.05}]) == []
    assert "cover 92.9%" in simulation.broken([{**good, "coverage": 0.929}])[0]
    assert "false helps in 5.1%" in simulation.broken([{**good, "coverage": 0.95, "false helps": 0.051}])[0]
    skewed = simulation.simulate(simulation.Kind("", (0.0,), 5, simulation.low_tail, lambda g, s: np.zeros(s)), 400, seed=0)
    assert len(simulation.broken([skewed])) == 2
