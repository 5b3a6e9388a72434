"""Racing: seeds are added to the variants that are undecided, up to a bound, and looking many times costs no error.

A race looks at its variants after ``first`` seeds and again after every ``step`` more. Without a correction each look is another chance of
a false verdict. Here every variant spends its share of the error over the looks by a spending function (Lan & DeMets 1983), and a variant
that is decided hands its share to the others (Holm's rule for group sequential tests: Maurer & Bretz 2013). A race is a function of its
results and its settings alone: it is replayed from its first look each time, so an interrupted race resumes as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from gradreg import checks
from gradreg.study import boundaries, statistics, verdicts
from gradreg.study.boundaries import Spending, nominal_levels, root_of
from gradreg.study.replay import Claim, Outcome, Path, replay, z_of
from gradreg.study.verdicts import Mode, Sample, Settings, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

CORRECTION = "after Holm and all looks"
_MOST_ALPHA = 0.99


@dataclass(frozen=True)
class Look:
    """One look of a race.

    Args:
        seeds: at this look.
        spent: the chance of any false verdict that has been spent by then.
        level: of the t test, for the variants that are not shown to differ at its end.
        p: name → two-sided p of the t test, of the variants looked at.
        decided: name → "better", "worse", "diverged" or "no gain", of those that it decided.
    """

    seeds: int
    spent: float
    level: float
    p: dict[str, float]
    decided: dict[str, str]


class Standing:
    """Where a race stands: what it has seen, and the seeds to run next. Verdicts are computed when they are asked for.

    Args:
        race: its rule.
        history: its looks so far.
        shared: the variants that are compared with the baseline that all share.
        settings: of the verdicts.
        there: the seeds of that baseline that are there.
    """

    def __init__(self, race: Race, history: _History, settings: Settings, *, shared: Sequence[str], there: Container[int]) -> None:
        self._race, self._history, self._settings = race, history, settings
        self._shared, self._there = shared, there

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """Name → verdict at the last look for which all results are there, final for decided variants; empty before the first."""
        return self._race._verdicts(self._history, self._settings)

    @property
    def wanted(self) -> dict[str, list[int]]:
        """Name → seeds that the next look needs and that are not there; variants that need none are left out."""
        return self._history.wanted

    @property
    def baseline_wanted(self) -> list[int]:
        """The same of the shared baseline."""
        needed = any(name in self._history.wanted for name in self._shared)
        return [seed for seed in self._history.due if seed not in self._there] if needed else []

    @property
    def looks(self) -> int:
        """How many looks have been taken."""
        return len(self._history.samples)

    @property
    def taken(self) -> dict[str, int]:
        """Name → how many of them the variant had."""
        return self._history.taken

    @property
    def given(self) -> dict[str, int]:
        """Name → how many seeds, from the first on, it has been given: those of its last look, or of the one that it waits for."""
        history = self._history
        return {name: len(history.due) if name in history.wanted else self._race.looks[n - 1] for name, n in history.taken.items()}

    @property
    def log(self) -> list[Look]:
        """What each look so far saw and decided."""
        return list(self._race._log(self._history))

    @property
    def finished(self) -> bool:
        """Whether every variant is decided or has reached the bound."""
        return not self.wanted and not self.baseline_wanted


@dataclass(frozen=True)
class Race:
    """The rule of a race.

    At a look after n of at most N seeds a variant is decided if its paired t test has ``p ≤ a``, where the levels ``a`` of all looks are
    such that a Brownian motion crosses at or before this look with probability ``f(n/N)``. The spending function f of the level
    α/m that Holm leaves to each of the m variants not yet shown to differ is

    - "obrien-fleming": ``f(t) = 4 − 4·Φ(Φ⁻¹(1 − α/4m)/√t)``: spends almost all at the end, where it shows nearly as
      much as a study of that many seeds without a race;
    - "pocock": ``f(t) = (α/m)·ln(1 + (e − 1)·t)``: stops earlier, shows less at the bound, and judges by few seeds.

    The walk of t over few seeds is not quite a Brownian motion: from 3 seeds on, any false verdict has a chance of 5 % by simulation with
    "obrien-fleming", and of 6 % with "pocock" (docs/statistics.md).

    A variant that diverged at a seed is decided at that look, since it cannot help. With a margin, so is one whose gain is shown to be
    smaller.

    Args:
        seeds: all seeds that may be run, in the order in which they are; their number is the bound.
        first: seeds before the first look, ≥ 2.
        step: seeds between two looks, ≥ 1.
        level: 1 − the chance of any false "helps" or "harms" over all variants and looks; of the intervals.
        spending: the spending function.

    Source: Lan & DeMets 1983, Discrete sequential boundaries for clinical trials, Biometrika 70; Jennison & Turnbull 2000, Group
    Sequential Methods (t tests at the levels of normal ones, intervals by the stagewise order, the recursion); Maurer & Bretz 2013,
    Multiple testing in group sequential trials using graphical approaches, Stat. Biopharm. Res. 5.
    """

    seeds: Sequence[int]
    first: int = 3
    step: int = 1
    level: float = statistics.CONFIDENCE
    spending: Spending = "obrien-fleming"

    def __post_init__(self) -> None:
        checks.whole("first", self.first, minimum=2, remedy="A difference needs two seeds to have a spread.")
        checks.whole("step", self.step, minimum=1)
        verdicts.check_settings("max", level=self.level, margin=None)
        checks.choice("spending", self.spending, get_args(Spending))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ; got {checks.describe(self.seeds)}.")
        if len(self.seeds) < self.first:
            raise ValueError(f"seeds must be at least first = {self.first}; got {len(self.seeds)}. Raise the bound or lower first.")

    @property
    def looks(self) -> tuple[int, ...]:
        """Seeds at each look; the last is the bound."""
        most = len(self.seeds)
        return (*range(self.first, most, self.step), most)

    def levels(self, variants: int) -> NDArray[Any]:
        """The level of the t test at each look (columns) if m variants are not yet shown to differ (row m − 1)."""
        import numpy as np

        times = tuple(n / len(self.seeds) for n in self.looks)
        return np.array([nominal_levels(times, (1 - self.level) / m, self.spending) for m in range(1, variants + 1)])

    def judge(
        self,
        baseline: Mapping[int, float | None],
        variants: Mapping[str, Mapping[int, float | None]],
        *,
        mode: Mode,
        margin: float | None = None,
        baselines: Mapping[str, Mapping[int, float | None]] | None = None,
        metric: str = "metric",
        unit: str = "",
        against: str = "the baseline",
    ) -> Standing:
        """The verdicts so far and the seeds to run next.

        Arguments as of ``compare_paired``, but a seed that is absent has not been run yet; None, NaN and infinity are diverged runs. A
        decided variant is judged by the seeds of the look that decided it; later ones are ignored.
        With ``baselines``, the seeds wanted of a variant are those that the variant or its own baseline lacks.
        """
        sides = self._sides(baseline, variants, baselines, mode=mode, margin=margin)
        return Standing(
            self,
            self._replay(sides, mode=mode, margin=margin),
            Settings(mode, self.level, margin, metric, against, len(variants), correction=CORRECTION, unit=unit),
            shared=[name for name, (own, _) in sides.items() if own is baseline],
            there=baseline,
        )

    def judge_beside(
        self,
        baseline: Mapping[int, float | None],
        variants: Mapping[str, Mapping[int, float | None]],
        *,
        taken: Mapping[str, int],
        mode: Mode,
        margin: float | None = None,
        baselines: Mapping[str, Mapping[int, float | None]] | None = None,
        metric: str = "metric",
        unit: str = "",
        against: str = "the baseline",
    ) -> dict[str, Verdict]:
        """The verdicts on another question, over the seeds that the race has given: against another baseline, say.

        Whatever ended the race, they hold: their p and intervals are repeated ones, which no rule of stopping makes err more often,
        because all looks together do so with chance 1 − ``level`` at most. Holm over the variants is as without a race.

        Args:
            taken: name → how many looks the variant had in the race, ≥ 1.

        Source: Jennison & Turnbull 1989, Interim analyses: the repeated confidence interval approach, J. R. Stat. Soc. B 51.
        """
        sides = self._sides(baseline, variants, baselines, mode=mode, margin=margin)
        looks = {name: taken[name] - 1 for name in sides}
        samples = {
            name: Sample.of(*(_first(side, self.seeds[: self.looks[looks[name]]]) for side in sides[name]), mode=mode) for name in sides
        }

        def repeated(p_of: Callable[[Sample], float | None], tails: int) -> list[float | None]:
            found = {name: p_of(sample) for name, sample in samples.items()}
            # A one-sided p above a half stays: what it asks about is on the other side.
            return [
                p if p is None or p * 2 / tails >= 1 else self._repeated_p(p * 2 / tails, looks[name]) * tails / 2
                for name, p in found.items()
            ]

        settings = Settings(mode, self.level, margin, metric, against, len(variants), correction=CORRECTION, unit=unit)
        return verdicts.judged(
            samples,
            settings=settings,
            p=repeated(Sample.p_for_holm, 2),
            no_worse=repeated(lambda s: s.p_no_worse(margin), 1),
            no_gain=repeated(lambda s: s.p_no_gain(margin), 1),
            intervals={name: self._repeated_interval(sample, looks[name]) for name, sample in samples.items()},
            tested_at=lambda name, variants: float(self.levels(variants)[-1, looks[name]]),
        )

    def _repeated_interval(self, sample: Sample, look: int) -> tuple[float, float] | None:
        """Student's interval at the level of the look, so that those of all looks cover together."""
        return sample.interval(1 - float(self.levels(1)[0, look]))

    def _repeated_p(self, p: float, look: int) -> float:
        """The smallest error of a race that would have shown it at this look; at the last of one look, ``p`` itself."""
        times = tuple(n / len(self.seeds) for n in self.looks[: look + 1])

        def excess(log_alpha: float) -> float:
            return nominal_levels(times, math.exp(log_alpha), self.spending)[look] - p

        least, most = math.log(1e-9), math.log(_MOST_ALPHA)
        if excess(most) < 0:
            return 1.0
        found = math.exp(least if excess(least) > 0 else root_of(excess, least, most, tolerance=1e-4))
        return _agreeing(found, 1 - self.level, shown=p <= self.levels(1)[0, look])

    def _sides(
        self,
        baseline: Mapping[int, float | None],
        variants: Mapping[str, Mapping[int, float | None]],
        baselines: Mapping[str, Mapping[int, float | None]] | None,
        *,
        mode: Mode,
        margin: float | None,
    ) -> dict[str, tuple[Mapping[int, float | None], Mapping[int, float | None]]]:
        """Name → the values of what it is compared with, and its own."""
        verdicts.check_settings(mode, level=self.level, margin=margin)
        if not variants:
            raise ValueError("variants must name at least one variant; got none. The baseline alone has nothing to be compared with.")
        return {name: ((baselines or {}).get(name, baseline), values) for name, values in variants.items()}

    def _replay(
        self,
        sides: Mapping[str, tuple[Mapping[int, float | None], Mapping[int, float | None]]],
        *,
        mode: Mode,
        margin: float | None,
    ) -> _History:
        """The looks for which all results are there."""
        import numpy as np

        levels = self.levels(len(sides))
        samples: list[dict[str, Sample]] = []
        outcome: Outcome | None = None
        taken = dict.fromkeys(sides, 0)
        for look, n in enumerate(self.looks):
            due = self.seeds[:n]
            running = [name for i, name in enumerate(sides) if outcome is None or outcome.active[i]]
            lacking = {name: [s for s in due if any(s not in side for side in sides[name])] for name in running}
            wanted = {name: seeds for name, seeds in lacking.items() if seeds}
            if wanted or not running:
                return _History(levels, samples, outcome, taken, wanted, due)
            # A variant that is out keeps its last look, at which it is not judged again.
            of = {name: Sample.of(*(_first(side, due) for side in sides[name]), mode=mode) for name in running}
            samples.append(of if not samples else {**samples[-1], **of})
            taken |= dict.fromkeys(running, look + 1)
            table = [[row[name] for name in sides] for row in samples]
            outcome = replay(
                np.array([[s.p_for_holm() for s in row] for row in table]),
                np.array([[s.failed > 0 for s in row] for row in table]),
                no_gain=None if margin is None else np.array([[s.p_no_gain(margin) for s in row] for row in table], dtype=float),
                no_worse=None if margin is None else np.array([[s.p_no_worse(margin) for s in row] for row in table], dtype=float),
                levels=levels,
            )
        return _History(levels, samples, outcome, taken, {}, self.seeds)

    def _log(self, history: _History) -> Iterator[Look]:
        """What each look saw and decided."""
        outcome = history.outcome
        for look, samples in enumerate(history.samples):
            assert outcome is not None
            decided: dict[str, str] = {}
            for i, (name, taken) in enumerate(history.taken.items()):
                if taken < look + 1:
                    continue
                if outcome.differs.shown[i] and outcome.differs.look[i] == look:
                    decided[name] = "better" if samples[name].test.mean > 0 else "worse"
                elif samples[name].failed:
                    decided[name] = "diverged"
                elif outcome.no_gain is not None and outcome.no_gain.shown[i] and outcome.no_gain.look[i] == look:
                    decided[name] = "no gain"
            open_ = int(sum(not (s and k <= look) for s, k in zip(outcome.differs.shown, outcome.differs.look, strict=True)))
            yield Look(
                seeds=self.looks[look],
                spent=self.spent(len(history.taken), look),
                level=float(history.levels[max(1, open_) - 1, look]),
                p={name: samples[name].p_for_holm() for name, taken in history.taken.items() if taken > look},
                decided=decided,
            )

    def spent(self, variants: int, look: int) -> float:
        """The chance of any false verdict that all variants together may have spent by a look."""
        return variants * boundaries.spent(self.looks[look] / len(self.seeds), (1 - self.level) / variants, self.spending)

    def _verdicts(self, history: _History, settings: Settings) -> dict[str, Verdict]:
        outcome = history.outcome
        if outcome is None:
            return {}
        return {
            name: self._verdict(name, [row[name] for row in history.samples], outcome, i, settings) for i, name in enumerate(history.taken)
        }

    def _verdict(self, name: str, history: Sequence[Sample], outcome: Outcome, index: int, settings: Settings) -> Verdict:
        """The verdict on one variant at the look at which it was decided, or else at the last."""
        differs, no_gain, no_worse = outcome.differs, outcome.no_gain, outcome.no_worse
        look = int(differs.look[index])
        m = int(differs.open[index])
        path = self._path(history[: look + 1], m)
        last = history[look]
        still_open = max(1, differs.shown.size - int(differs.shown.sum()))
        alpha = 1 - self.level
        p = 2 * min(path.p_upper(0.0), 1 - path.p_upper(0.0)) if last.p_for_holm() < 1 else 1.0

        def one_sided(claim: Claim | None, p_of: Callable[[Sample], float | None]) -> float | None:
            if claim is None:
                return None
            then, count = int(claim.look[index]), int(claim.open[index])
            single = p_of(history[then])
            assert single is not None
            found = self._path(history[: then + 1], count).p_at_least(-z_of(single))
            return _agreeing(found * count, alpha / 2, shown=bool(claim.shown[index]))

        return verdicts.verdict(
            name,
            last,
            settings=settings,
            interval=path.interval(alpha) if last.failed == 0 else self._repeated_interval(last, look),
            p_holm=_agreeing(p * m, alpha, shown=bool(differs.shown[index])),
            no_worse_p=one_sided(no_worse, lambda s: s.p_no_worse(settings.margin)),
            no_gain_p=one_sided(no_gain, lambda s: s.p_no_gain(settings.margin)),
            tested_at=float(self.levels(still_open)[-1, -1]),
        )

    def _path(self, history: Sequence[Sample], m: int) -> Path:
        times = tuple(n / len(self.seeds) for n in self.looks)[: len(history)]
        return Path(times, tuple(self.levels(m)[m - 1, : len(history)]), tuple(history))


@dataclass(frozen=True)
class _History:
    """The looks of a race so far.

    Args:
        levels: of the t tests.
        samples: of each look, by variant.
        outcome: of these looks; None before the first.
        taken: name → looks that the variant had.
        wanted: name → seeds that the next look lacks.
        due: all seeds of the next look, or of the last one.
    """

    levels: NDArray[Any]
    samples: list[dict[str, Sample]]
    outcome: Outcome | None
    taken: dict[str, int]
    wanted: dict[str, list[int]]
    due: Sequence[int]


def _first(values: Mapping[int, float | None], seeds: Sequence[int]) -> dict[int, float | None]:
    return {seed: values[seed] for seed in seeds}


def _agreeing(p: float, threshold: float, *, shown: bool) -> float:
    """``p`` on the side of ``threshold`` on which the race has put it: both are integrals, and may differ in their last digits."""
    return min(p, threshold) if shown else min(1.0, max(p, math.nextafter(threshold, 1.0)))
