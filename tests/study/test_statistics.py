"""Means, deviations and paired intervals, by hand and by SciPy's own paired test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gradreg.study.statistics import (
    bca_interval,
    detectable_difference,
    deviation,
    holm,
    mean,
    paired_difference,
    paired_t,
    rank_correlation,
    seeds_needed,
    sign_flip_p,
    t_quantile,
)


def test_a_difference_by_hand():
    found = paired_difference({0: 3.0, 1: 5.0, 7: 99.0}, {0: 1.0, 1: 2.0, 8: 0.0})
    # Differences 2 and 3: mean 2.5, standard error 0.5, t(0.975, 1) = 12.7062
    assert (found.mean, found.pairs) == (2.5, 2)
    assert (found.low, found.high) == pytest.approx((2.5 - 6.3531, 2.5 + 6.3531), abs=1e-4)
    assert not found.excludes_zero


def test_the_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 1.0, 9), rng.normal(0.0, 1.0, 9)
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    test = stats.ttest_rel(a, b)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.excludes_zero == (test.pvalue < 0.05)


def test_too_few_seeds_give_no_interval_rather_than_a_wrong_one():
    found = paired_difference({0: 2.0}, {0: 1.0})
    assert (found.mean, found.low, found.high, found.excludes_zero) == (1.0, None, None, False)
    assert paired_difference({0: 2.0}, {1: 1.0}) is None


def test_mean_and_deviation():
    assert (mean([1.0, 2.0, 4.0]), deviation([1.0, 2.0, 4.0])) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert (mean([]), deviation([1.0])) == (None, None)


def test_the_paired_t_test_of_many_studies_is_scipys_of_each():
    samples = np.random.default_rng(0).normal(0.5, 1.0, (4, 3, 7))
    samples[1, 2, 3:5] = np.nan
    found = paired_t(samples)
    for i, j in np.ndindex(4, 3):
        theirs = stats.ttest_1samp(samples[i, j][~np.isnan(samples[i, j])], 0.0)
        assert found.p[i, j] == pytest.approx(theirs.pvalue)
    single = stats.ttest_1samp(samples[0, 0], 0.3, alternative="greater")
    assert paired_t(samples[0, 0]).p_above(0.3) == pytest.approx(single.pvalue)


def test_holm_by_hand_and_by_the_row():
    # Holm's own rule: sorted p times 4, 3, 2, 1, never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([[0.9, 0.8], [0.01, 0.9]]) == pytest.approx(np.array([[1.0, 1.0], [0.02, 0.9]]))


def test_sign_flips_count_every_flip_by_hand():
    # Of the 8 sign patterns of (1, 2, 4) the sums are ±1, ±3, ±5, ±7: two are as far out as 7, all as far as 1.
    assert sign_flip_p([1.0, 2.0, 4.0]) == 0.25
    assert sign_flip_p([1.0, 2.0, -4.0]) == 1.0
    assert sign_flip_p([-1.0, 2.0, 4.0]) == 0.5
    assert (sign_flip_p([0.0] * 5), sign_flip_p([3.0])) == (1.0, 1.0)
    assert sign_flip_p([1.0] * 10) == pytest.approx(2 / 1024)
    assert sign_flip_p([1.0] * 30) == pytest.approx(2 / 10000), "of 9,999 drawn flips and the observed one"


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 14, 20])
def test_sign_flips_are_scipys_permutation_test(n):
    rng = np.random.default_rng(n)
    for differences in (rng.normal(0.3, 1.0, n), rng.integers(-2, 4, n).astype(float)):  # the second with ties
        theirs = stats.permutation_test(
            (differences,), lambda sample, axis: sample.mean(axis=axis), permutation_type="samples", n_resamples=9999, vectorized=True,
            rng=np.random.default_rng(0),
        )  # fmt: skip
        assert sign_flip_p(differences) == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize("df", [1, 2, 4, 30])
def test_quantiles_are_those_of_students_t(df):
    for tail in (0.25, 0.025, 1e-6):
        assert t_quantile(tail, df) == pytest.approx(stats.t.isf(tail, df), rel=1e-12)


def test_bca_is_scipys_from_eight_seeds_on_and_the_same_each_time():
    sample = np.random.default_rng(1).gamma(1.0, size=12)
    theirs = stats.bootstrap((sample,), np.mean, method="BCa", confidence_level=0.9, rng=np.random.default_rng(0)).confidence_interval
    assert bca_interval(sample, level=0.9) == (theirs.low, theirs.high) == bca_interval(sample, level=0.9)
    assert bca_interval(sample[:7]) is None
    assert bca_interval([0.3] * 9) is None


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (3, 0.01), (5, 0.05), (20, 0.05 / 8), (200, 0.001)])
def test_the_detectable_difference_has_its_power(n, alpha):
    found = detectable_difference(n, 2.0, alpha=alpha)
    # P(T > c) = E[Φ(ncp − c·s)] over the sample's own s, integrated over the distribution of chi.
    c, ncp = stats.t.isf(alpha / 2, n - 1), found / 2.0 * np.sqrt(n)
    grid = (np.arange(20000) + 0.5) / 20000
    s = np.sqrt(stats.chi2.ppf(grid, n - 1) / (n - 1))
    assert stats.norm.cdf(ncp - c * s).mean() == pytest.approx(0.8, abs=1e-4)


def test_seeds_needed_at_its_ends():
    assert seeds_needed(0.0, 1.0, alpha=0.05) is None
    assert seeds_needed(1.0, 0.0, alpha=0.05) is None
    assert seeds_needed(0.01, 1.0, alpha=0.05) is None, "more than 1,000"
    assert seeds_needed(1000.0, 1.0, alpha=0.05) == 2
    # Cohen 1988: d = 0.5, two-sided .05, power .8 takes 34 pairs.
    assert seeds_needed(0.5, 1.0, alpha=0.05) == seeds_needed(-0.5, 1.0, alpha=0.05) == 34


def test_a_rank_correlation_is_spearmans_and_its_interval_covers():
    """The interval holds the population's value as often as it says, at 12 pairs and any correlation."""
    draws = np.random.default_rng(0)
    x, y = draws.standard_normal(12), draws.standard_normal(12)
    found = rank_correlation(x, y)
    assert found is not None
    assert found.value == pytest.approx(float(stats.spearmanr(x, y).statistic))
    assert (found.n, found.groups) == (12, 1)
    for rho in (0.0, 0.6):
        true = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's of two normal variables
        held = 0
        for _ in range(400):
            a = draws.standard_normal(12)
            b = rho * a + np.sqrt(1 - rho**2) * draws.standard_normal(12)
            one = rank_correlation(a, b)
            held += one.low <= true <= one.high
        assert 0.92 <= held / 400 <= 0.98


def test_within_groups_the_means_are_taken_off():
    """Between the groups more is better; within each, less is."""
    groups = [0] * 6 + [1] * 6
    x = np.array([0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104, 105.0])
    y = np.array([5, 4, 3, 2, 1, 0, 105, 104, 103, 102, 101, 100.0])
    assert rank_correlation(x, y).value > 0.4
    within = rank_correlation(x, y, groups)
    assert within.value == pytest.approx(-1.0)
    assert (within.n, within.groups) == (12, 2)
    assert within.low == -1.0
    assert -1.0 < within.high < -0.9  # of eleven pairs, as good as perfect
    alone = rank_correlation(x[:6], y[:6])
    assert alone.high > within.high  # fewer pairs


def test_a_rank_correlation_needs_pairs_that_differ():
    assert rank_correlation([1, 2, 3, 4], [1, 2, 3, 4]) is None
    assert rank_correlation([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) is not None
    assert rank_correlation([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [0, 0, 1, 1, 1]) is None  # four pairs' worth
    assert rank_correlation([1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6]) is None
    assert rank_correlation([0.1 + 0.2, 0.3, 0.3, 1.3, 1.3, 1.3, 1.3], range(7), [0, 0, 0, 1, 1, 1, 1]) is None  # equal but for rounding
