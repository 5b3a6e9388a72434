"""Means, deviations and paired intervals, by hand and by SciPy's own paired test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gradreg.study.statistics import deviation, mean, paired_difference


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
