"""Means over seeds, and differences paired by seed with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


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


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """``values − reference`` over the seeds that both have; None if there is none."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    differences = np.array([values[s] - reference[s] for s in seeds])
    mean = float(differences.mean())
    if len(seeds) < 2:
        return Difference(mean, None, None, len(seeds))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1) * stats.sem(differences))
    return Difference(mean, mean - half, mean + half, len(seeds))


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return float(np.mean(values)) if len(values) else None


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n − 1); None with fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
