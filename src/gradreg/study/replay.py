"""A race replayed from the p of its looks, one or many at once; and how likely one variant's way through it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gradreg.study import statistics
from gradreg.study.boundaries import normal_quantile, root_of, stagewise_p
from gradreg.study.verdicts import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Claim:
    """Which variants have been shown to be so, for one kind of claim ("differs", "gains less than the margin"); variants are the last axis.

    Args:
        shown: whether it was shown.
        look: the index of the look at which it was, else of the last look that the variant had.
        open: to how many variants the level was divided there.
    """

    shown: NDArray[Any]
    look: NDArray[Any]
    open: NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """A race replayed: its claims, and which variants would go on."""

    differs: Claim
    no_gain: Claim | None
    no_worse: Claim | None
    active: NDArray[Any]


def replay(
    p: NDArray[Any],
    failed: NDArray[Any],
    *,
    levels: NDArray[Any],
    no_gain: NDArray[Any] | None = None,
    no_worse: NDArray[Any] | None = None,
) -> Outcome:
    """Run one race, or many at once, from the p of every look.

    Args:
        p: two-sided p of the t test, shape [..., looks, variants].
        failed: whether the variant has a diverged seed by then, the same shape.
        levels: of the t test, shape [variants, looks]: row m − 1 if m variants are open.
        no_gain: one-sided p of "better by the margin or more", the same shape as ``p``.
        no_worse: of "worse by the margin or more".
    """
    import numpy as np

    looks, variants = p.shape[-2:]
    shape = (*p.shape[:-2], variants)
    active = np.ones(shape, dtype=bool)
    ps = [p, None if no_gain is None else 2 * no_gain, None if no_worse is None else 2 * no_worse]
    claims = [Claim(np.zeros(shape, bool), np.zeros(shape, int), np.full(shape, variants)) for _ in ps]
    for look in range(looks):
        for claim, values in zip(claims, ps, strict=True):
            if values is None:
                continue
            waiting = active & ~claim.shown
            claim.look[waiting] = look
            for _ in range(variants):  # each one shown raises the level of the others, which may show the next
                left = np.maximum(variants - claim.shown.sum(axis=-1, keepdims=True), 1)
                claim.open[...] = np.where(waiting & ~claim.shown, left, claim.open)
                new = waiting & ~claim.shown & (values[..., look, :] <= levels[left - 1, look])
                if not new.any():
                    break
                claim.shown[...] |= new
        active &= ~(claims[0].shown | claims[1].shown | failed[..., look, :])
    return Outcome(claims[0], None if no_gain is None else claims[1], None if no_worse is None else claims[2], active)


@dataclass(frozen=True)
class Path:
    """One variant's way through a race up to the look at which it stopped, and how likely a way at least as good is.

    For a race of one look p and interval are those of the t test.

    Args:
        times: shares of the seeds at the looks.
        levels: of the t tests at them.
        history: the sample at each look.
    """

    times: tuple[float, ...]
    levels: tuple[float, ...]
    history: tuple[Sample, ...] = field(repr=False)

    @cached_property
    def _tests(self) -> list[statistics.PairedT]:
        return [sample.test for sample in self.history]

    def p_upper(self, mean: float) -> float:
        """The probability of a way at least as good as this one if the mean gain is ``mean``."""
        test = self._tests[-1]
        if test.n < 2 or test.sd == 0:
            return self.p_at_least(z_of(1 - float(test.p_above(mean))), mean)
        return self.p_at_least(float(normal_quantile((test.mean - mean) / test.se, test.n - 1)), mean)

    def p_at_least(self, z: float, mean: float = 0.0) -> float:
        """The same with ``z`` at the last look in place of this way's, if the mean gain is ``mean``."""
        import numpy as np

        n, se = np.array([test.n for test in self._tests]), np.array([test.se for test in self._tests])
        return float(stagewise_p(self.times, np.array(self.levels), n=n, se=se, z=z, mean=mean))

    def interval(self, alpha: float) -> tuple[float, float] | None:
        """The 1 − ``alpha`` interval of the mean difference; None without a spread.

        It holds the means under which neither a way at least as good as this one nor one at most as good has a chance below ``alpha``/2.
        """
        sample, test = self.history[-1], self._tests[-1]
        if test.n < 2 or test.sd == 0:
            return None
        ends: list[float] = []
        for target in (alpha / 2, 1 - alpha / 2):

            def excess(mean: float, target: float = target) -> float:
                return self.p_upper(mean) - target

            reach = float(test.se) * 4
            while excess(float(test.mean) - reach) > 0 or excess(float(test.mean) + reach) < 0:
                reach *= 2
            ends.append(root_of(excess, float(test.mean) - reach, float(test.mean) + reach, tolerance=1e-6 * float(test.se)))
        low, high = sorted(sample.sign * end for end in ends)
        return low, high


def z_of(p: float) -> float:
    """The normal quantile of ``p``."""
    from scipy import special

    return float(special.ndtri(p))
