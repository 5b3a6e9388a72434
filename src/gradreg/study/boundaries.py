"""Boundaries of group sequential tests: how much error each look may spend, and how likely a way through the looks is.

The mathematics of ``gradreg.study.racing``, by numerical integration of a Brownian motion that is killed where it leaves the boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Spending = Literal["obrien-fleming", "pocock"]
FAR = 7.0
"""Standard deviations beyond which nothing is integrated: 10⁻¹¹ of a normal distribution lies there."""


def spent(t: float, alpha: float, spending: Spending) -> float:
    """The share of ``alpha`` that may be spent by the share ``t`` of all seeds."""
    from scipy import special

    if spending == "pocock":
        return alpha * math.log1p((math.e - 1) * t)
    return float(4 * special.ndtr(special.ndtri(alpha / 4) / math.sqrt(t)))


@lru_cache(maxsize=512)
def nominal_levels(times: tuple[float, ...], alpha: float, spending: Spending) -> tuple[float, ...]:
    """Two-sided levels at looks after the shares ``times`` of the seeds: crossing at or before the k-th has chance ``spent(times[k])``.

    Source: Armitage, McPherson & Rowe 1969, Repeated significance tests on accumulating data, J. R. Stat. Soc. A 132 (the recursion).
    """
    levels: list[float] = []
    walk = Walk(times)
    before = 0.0
    for t in times:
        target = (spent(t, alpha, spending) - before) / 2
        before = spent(t, alpha, spending)

        def excess(z: float, target: float = target) -> float:
            return float(walk.above(z)) - target

        z = root_of(excess, 0.0, FAR) if walk.above(FAR) < target else math.inf
        levels.append(_two_sided(z))
        walk.stay_between(-z, z)
    return tuple(levels)


class Walk:
    """A Brownian motion at the times of the looks, killed where it leaves the boundaries; in units of its standard deviation at each look.

    One walk, or many at once whose boundaries differ: boundaries are numbers or arrays.

    Args:
        times: of the looks, ascending, the last ≤ 1.
    """

    def __init__(self, times: Sequence[float]) -> None:
        import numpy as np

        self.times = times
        self.look: int = 0
        self.narrowest: float = math.sqrt(min(np.diff([0.0, *times]) / np.asarray(times)))
        self.where = np.zeros(1)
        self.mass = np.ones(1)

    def above(self, z: ArrayLike) -> NDArray[Any]:
        """The probability to have survived so far and to be above ``z`` at this look."""
        import numpy as np
        from scipy import special

        bound = np.asarray(z)[..., None] * math.sqrt(self.times[self.look])
        return (self.mass * special.ndtr((self.where - bound) / self._gap())).sum(axis=-1)

    def stay_between(self, low: ArrayLike, high: ArrayLike) -> None:
        """Take this look: what lies outside of (low, high) is gone."""
        import numpy as np

        low, high = np.clip(low, -FAR, FAR)[..., None], np.clip(high, -FAR, FAR)[..., None]
        root, gap = math.sqrt(self.times[self.look]), self._gap()
        # So many nodes that their distance is below the standard deviation of any step: what is integrated is that smooth.
        nodes, weights = _gauss_legendre(max(24, 8 * math.ceil(float(np.max(high - low)) / self.narrowest / 4)))
        where = root * ((high + low) / 2 + (high - low) / 2 * nodes)
        kernel = np.exp(-0.5 * ((where[..., :, None] - self.where[..., None, :]) / gap) ** 2) / (gap * math.sqrt(2 * math.pi))
        self.mass = root * (high - low) / 2 * weights * (kernel @ self.mass[..., None])[..., 0]
        self.where = where
        self.look += 1

    def _gap(self) -> float:
        earlier = self.times[self.look - 1] if self.look else 0.0
        return math.sqrt(self.times[self.look] - earlier)


def stagewise_p(
    times: Sequence[float], levels: NDArray[Any], *, n: NDArray[Any], se: NDArray[Any], z: ArrayLike, mean: float = 0.0
) -> NDArray[Any]:
    """The probability of a way through a race at least as good as one that stopped at the last of ``times``, if the mean gain is ``mean``.

    Ways are ordered stagewise: stopping earlier above counts for more than later, and at the same look the larger t counts for more.

    Args:
        times: shares of the seeds at the looks.
        levels: two-sided, of the t tests at them; shape [looks], or [..., looks] for many races.
        n: pairs at each look, the same.
        se: standard errors of the mean gain at each look, the same.
        z: the normal quantile of t at the last look, with respect to ``mean``.
        mean: the true mean gain.
    """
    import numpy as np
    from scipy import special

    freedom = np.maximum(1, n - 1)
    critical = -special.stdtrit(freedom, levels / 2)
    # The boundary is where the t of a mean of 0 crosses; seen from ``mean`` it is shifted by what that is in standard errors.
    se = np.where(se > 0, se, se[..., -1:])
    shift = mean / se if mean else np.zeros_like(se)
    upper, lower = normal_quantile(critical - shift, freedom), normal_quantile(-critical - shift, freedom)
    walk = Walk(times)
    total = np.zeros(np.shape(z))
    for look in range(len(times) - 1):
        total = total + walk.above(upper[..., look])
        walk.stay_between(lower[..., look], upper[..., look])
    return total + walk.above(z)


def normal_quantile(t: ArrayLike, freedom: ArrayLike) -> NDArray[Any]:
    """The normal quantile with the tail of Student's ``t``."""
    import numpy as np
    from scipy import special

    return np.copysign(special.ndtri(special.stdtr(freedom, -np.abs(t))), t)


@lru_cache(maxsize=64)
def _gauss_legendre(nodes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    import numpy as np

    return np.polynomial.legendre.leggauss(nodes)


def root_of(function: Callable[[float], float], low: float, high: float, *, tolerance: float = 1e-12) -> float:
    """Where ``function`` is 0 between ``low`` and ``high``, at which its signs differ."""
    from scipy import optimize

    return float(cast("float", optimize.brentq(function, low, high, xtol=tolerance)))


def _two_sided(z: float) -> float:
    from scipy import special

    return float(2 * special.ndtr(-z))
