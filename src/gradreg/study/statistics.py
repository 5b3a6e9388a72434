"""Means over seeds, and what is computed of differences paired by seed: t test, Holm, sign flips, bootstrap, power.

Every function of ``differences`` takes an array with the seeds along its last axis; ``paired_t`` and ``holm`` work on many studies at
once, which is how ``benchmarks/study_statistics.py`` checks them. NaN stands for a seed without a value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
POWER = 0.8
"""Chance with which the smallest difference that "would have shown" would have shown."""
FEWEST_FOR_BOOTSTRAP = 8
"""Seeds from which on a BCa interval is given: with fewer the bootstrap draws too few distinct samples to reach into the tails."""
MOST_SEEDS = 1000
"""Above this, ``seeds_needed`` has no answer that somebody would run."""
FLIPS = 9999
"""Sign flips that are drawn where there are more, that is from 14 seeds on; below, all 2ⁿ are counted."""
_AT_ONCE = 4_000_000
"""Numbers that are held at a time where flips are drawn."""
_TIES = 2.2e-14
"""SciPy's: flips whose mean agrees with the observed one to this share are ties."""
ROUNDING = 1e-12
"""Differences that agree to this share of the values are equal: what is left is rounding."""


@dataclass(frozen=True)
class Difference:
    """A mean difference paired by seed.

    Args:
        mean: of the differences.
        low: lower end of the 95 % interval (Student's t); None with fewer than two pairs.
        high: upper end; None with fewer than two pairs.
        pairs: seeds that both sides have.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        return "" if self.low is None else f"[{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def t_quantile(tail: float, df: int) -> float:
    """What Student's t exceeds with chance ``tail``."""
    from scipy import special  # not scipy.stats, whose import takes a second

    return -float(special.stdtrit(df, tail))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """``values − reference`` over the seeds that both have; None if there is none."""
    import numpy as np

    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    differences = np.array([values[s] - reference[s] for s in seeds])
    mean = float(differences.mean())
    if len(seeds) < 2:
        return Difference(mean, None, None, len(seeds))
    half = t_quantile((1 - CONFIDENCE) / 2, len(seeds) - 1) * float(differences.std(ddof=1)) / math.sqrt(len(seeds))
    return Difference(mean, mean - half, mean + half, len(seeds))


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    import numpy as np

    return float(np.mean(values)) if len(values) else None


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n − 1); None with fewer than two values."""
    import numpy as np

    return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class PairedT:
    """The paired t test of one study or of many: arrays of the shape of the studies.

    Args:
        n: pairs without NaN.
        mean: of the differences; NaN without any.
        sd: their standard deviation (n − 1); NaN with fewer than two. 0 where they agree up to rounding.
        se: of the mean, ``sd / √n``.
        p: two-sided, of "the mean is 0". Where all differences agree there is no t test: p is then that of the sign flips, 2/2ⁿ, or 1 if
            all are 0. With fewer than two pairs p is 1.
    """

    n: NDArray[Any]
    mean: NDArray[Any]
    sd: NDArray[Any]
    se: NDArray[Any]
    p: NDArray[Any]

    def p_above(self, bound: ArrayLike) -> NDArray[Any]:
        """One-sided p of "the mean is at most ``bound``": small where the mean is clearly above it. 1 − this is the p of "at least"."""
        import numpy as np
        from scipy import special

        above = self.mean - np.asarray(bound)
        with np.errstate(invalid="ignore", divide="ignore"):
            p = special.stdtr(self.n - 1, -above / self.se)
        # Without a spread the sign flips have the last word; without two pairs nothing has been shown.
        flips = np.where(above > 0, 0.5**self.n, np.where(above < 0, 1 - 0.5**self.n, 0.5))
        return np.where(self.n < 2, 0.5, np.where(self.sd == 0, flips, p))


def paired_t(differences: ArrayLike, *, resolution: ArrayLike = 0.0) -> PairedT:
    """The paired t test along the last axis; NaN is left out.

    Args:
        differences: variant − baseline, the seeds along the last axis.
        resolution: standard deviations up to this are 0. ``ROUNDING`` times the size of the values keeps the rounding of ``0.3 − 0.2`` and
            ``0.2 − 0.1`` from looking like a tiny spread, and so like a large t.
    """
    import numpy as np
    from scipy import special

    values = np.asarray(differences, dtype=float)
    there = ~np.isnan(values)
    n = there.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, values, 0.0).sum(axis=-1) / n
        squares = np.where(there, values - mean[..., None], 0.0) ** 2
        sd = np.sqrt(squares.sum(axis=-1) / (n - 1))
        sd = np.where(n < 2, np.nan, np.where(sd <= resolution, 0.0, sd))
        se = sd / np.sqrt(n)
        p = 2 * special.stdtr(n - 1, -np.abs(mean) / se)
    equal = np.where(np.abs(mean) <= resolution, 1.0, 2.0 * 0.5**n)
    p = np.where(n < 2, 1.0, np.where(sd == 0, equal, p))
    return PairedT(n=n, mean=mean, sd=sd, se=se, p=p)


def holm(p: ArrayLike) -> NDArray[Any]:
    """Holm's adjusted p along the last axis: at most α for all that may be rejected so that any false rejection has chance ≤ α.

    ``p₍ᵢ₎ → max over j ≤ i of (m − j + 1)·p₍ⱼ₎``, at most 1, for the m sorted p. Holds whatever the dependence, so also for variants
    that share a baseline.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6.
    """
    import numpy as np

    values = np.asarray(p, dtype=float)
    m = values.shape[-1]
    order = np.argsort(values, axis=-1)
    ascending = np.take_along_axis(values, order, axis=-1) * np.arange(m, 0, -1)
    adjusted = np.empty_like(values)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(ascending, axis=-1), 1.0), axis=-1)
    return adjusted


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the sign-flip permutation test of one study's mean difference: exact up to 13 seeds, of 9,999 drawn flips beyond.

    Under "the penalty changes nothing" variant and baseline could be exchanged at each seed, whatever the distribution. The smallest p
    that it can give is 2/2ⁿ: .25 at 3 seeds, .0625 at 5, .002 at 10. The same number as ``scipy.stats.permutation_test``, without the
    import of ``scipy.stats``, which takes longer than all else that a finished comparison is read with.
    """
    import numpy as np

    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not values.any():
        return 1.0
    flips = _flips(len(values))
    rows = max(1, _AT_ONCE // len(values))
    null = np.concatenate([(flips[i : i + rows] * values).mean(axis=-1) for i in range(0, len(flips), rows)])
    observed = values.mean()
    near = abs(observed) * _TIES
    own = 0 if 2 ** len(values) <= FLIPS else 1  # where flips are drawn, the study's own counts as one more
    tails = [(null <= observed + near).sum() + own, (null >= observed - near).sum() + own]
    return float(min(1.0, 2 * min(tails) / (len(null) + own)))


@lru_cache(maxsize=4)
def _flips(n: int) -> NDArray[Any]:
    """The flips of n values as signs, [flips, n]: all of them, or those that SciPy's permutation test draws."""
    import numpy as np

    if 2**n <= FLIPS:
        return (1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)).astype(np.int8)
    from scipy import stats

    found: list[NDArray[Any]] = []

    def seen(sample: NDArray[Any], axis: int) -> NDArray[Any]:
        if sample.ndim > 1:
            found.append(sample.astype(np.int8))
        return sample.mean(axis=axis)

    stats.permutation_test(
        (np.ones(n),), seen, permutation_type="samples", n_resamples=FLIPS, vectorized=True, batch=max(1, _AT_ONCE // n),
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return np.concatenate(found)


def bca_interval(differences: Sequence[float], *, level: float = CONFIDENCE) -> tuple[float, float] | None:
    """BCa bootstrap interval of one study's mean difference (9,999 resamples, fixed seed); None below 8 seeds or if all are equal.

    Source: Efron 1987, Better bootstrap confidence intervals, JASA 82; by ``scipy.stats.bootstrap``.
    """
    import numpy as np

    values = np.asarray(differences, dtype=float)
    if len(values) < FEWEST_FOR_BOOTSTRAP or np.ptp(values) <= ROUNDING * np.abs(values).max():
        return None
    from scipy import stats

    generator = np.random.default_rng(0)
    found = stats.bootstrap((values,), np.mean, confidence_level=level, method="BCa", rng=generator).confidence_interval
    return float(found.low), float(found.high)


def detectable_difference(n: int, sd: float, *, alpha: float, power: float = POWER) -> float | None:
    """The smallest true difference that the two-sided paired t test at ``alpha`` shows with chance ``power``; None below two seeds.

    ``sd/√n`` times the noncentrality at which Student's t exceeds its critical value with that chance (the other tail's share is
    neglected: it is below 10⁻³ at a power of .8).
    """
    from scipy import special

    if n < 2:
        return None
    critical = t_quantile(alpha / 2, n - 1)
    return float(special.nctdtrinc(n - 1, 1 - power, critical)) * sd / math.sqrt(n)


def seeds_needed(difference: float, sd: float, *, alpha: float, power: float = POWER) -> int | None:
    """The fewest seeds with which a true ``difference`` is shown with chance ``power``; None if more than 1,000, or if it is 0."""
    if difference == 0 or sd == 0:
        return None

    def enough(n: int) -> bool:
        shown = detectable_difference(n, sd, alpha=alpha, power=power)
        return shown is not None and shown <= abs(difference)

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # enough(high), and not enough(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


FEWEST_FOR_CORRELATION = 5
"""Pairs beyond the groups' means below which a rank correlation has no interval worth the name."""


@dataclass(frozen=True)
class Correlation:
    """A rank correlation over runs.

    Args:
        value: Spearman's, −1 to 1.
        low: lower end of the 95 % interval.
        high: upper end.
        n: pairs.
        groups: whose means were taken off first; 1 for none.
    """

    value: float
    low: float
    high: float
    n: int
    groups: int = 1


def rank_correlation(x: Sequence[float], y: Sequence[float], groups: Sequence[Any] | None = None) -> Correlation | None:
    """Spearman's rank correlation with a 95 % interval; None with too few pairs, or where all values of one side are equal.

    The interval is tanh(atanh r ± 1.96·√((1 + r²/2)/(m − 3))), m the pairs less the groups beyond the first. It holds for independent
    pairs. At r = ±1, where it would have no width, the nearest other value that m ranks can have takes r's place.

    Args:
        x: one value for each pair.
        y: the other.
        groups: of each pair; the mean of its group is taken off each value first, which leaves the correlation within groups.

    Source: Bonett and Wright 2000, Sample size requirements for estimating Pearson, Kendall and Spearman correlations, Psychometrika 65.
    """
    import numpy as np
    from scipy import stats

    first, second = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    names = list(dict.fromkeys(groups)) if groups is not None else [None]
    if groups is not None:
        members = [np.array([g == name for g in groups]) for name in names]
        first, second = (_centered(values, members) for values in (first, second))
    m = len(first) - (len(names) - 1)
    if m < FEWEST_FOR_CORRELATION or any(np.ptp(values) == 0 for values in (first, second)):
        return None
    found: Any = stats.spearmanr(first, second)
    value = float(found.statistic)
    most = 1 - 12 / (m * (m * m - 1))
    inside = min(max(value, -most), most)
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt((1 + inside**2 / 2) / (m - 3))
    low, high = math.tanh(math.atanh(inside) - half), math.tanh(math.atanh(inside) + half)
    return Correlation(value, min(low, value), max(high, value), len(first), len(names))


def _centered(values: NDArray[Any], members: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The values less their group's mean; rounding that is left of equal ones is 0."""
    import numpy as np

    found = values.copy()
    for own in members:
        found[own] -= values[own].mean()
    return np.where(np.abs(found) <= ROUNDING * np.abs(values).max(initial=0.0), 0.0, found)
