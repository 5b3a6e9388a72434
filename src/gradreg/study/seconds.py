"""The rival at equal seconds: how long a variant's epochs (or steps) take in units of plain training's, measured on this machine.

Short runs of plain training and of the variant alternate in one process, with no other run beside them. Each is taken at two lengths, and
what counts is the difference between them: imports, the loading of data and compilation drop out. The median over the rounds is fixed once,
stored in the study's ``plan.json``, and used whenever and wherever the study goes on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

ROUNDS = 5
ROUNDS_OF_LONG_RUNS = 3
LONG = 10.0
"""Seconds between the two lengths from which on there are fewer rounds."""
LEAST = 0.25
"""Seconds between the two lengths of plain training below which longer runs are taken, as long as a run of the study is not exceeded."""


@dataclass(frozen=True)
class Timed:
    """One short run: its seconds and gradient evaluations."""

    seconds: float
    evaluations: float


@dataclass(frozen=True)
class Side:
    """Plain training, or a variant.

    Args:
        run: takes a stretch of the run's length and times such a run; the error of one that is too short for the task.
        length: epochs, or else steps, of a run of the study.
        evaluations: gradient evaluations of it.
    """

    run: Callable[[Fraction], Timed | str]
    length: int
    evaluations: float

    def timed(self, length: int) -> Timed | str:
        """A run of so many epochs or steps."""
        return self.run(Fraction(length, self.length))


@dataclass(frozen=True)
class EqualSeconds:
    """What was measured of a variant.

    Args:
        ratio: seconds per epoch (or step) of the variant over those of plain training.
        length: epochs (or steps) of plain training that take as long as a run of the variant, rounded up.
        rounds: the ratio of each round.
        lengths: of the short runs.
    """

    ratio: float
    length: int
    rounds: tuple[float, ...]
    lengths: tuple[int, int]


def measure(plain: Side, variant: Side) -> EqualSeconds:
    """The ratio of a variant's seconds per epoch, or step, to plain training's, and how long plain training is at equal seconds.

    A penalty that rests for a part of the run (a warm-up, ``every``) is seen by lengthening the short runs until it works; where it works
    more, or less, in them than in a run of the study, its extra time is scaled by the extra gradient evaluations.

    Raises:
        ValueError: even runs as long as the study's give no metric, or take no time.
    """
    longest = max(1, min(plain.length, variant.length) // 2)
    extra = variant.evaluations / variant.length / (plain.evaluations / plain.length) - 1
    short, duration = 1, 0.0
    while True:
        lengths = (short, 2 * short)
        found = _round(plain, variant, lengths)  # the first warms up: imports, caches, compilation
        if not isinstance(found, str):
            duration, _, seen = found
            if short >= longest or (duration >= LEAST and (extra <= 0 or seen >= extra / 2)):
                break
        elif short >= longest:
            raise ValueError(
                f"a run of {lengths[0]} and of {lengths[1]} epochs or steps must be possible, to measure its seconds; got {found}. Leave "
                "'seconds' out of the rivals."
            )
        short = min(longest, 2 * short)
    rounds: list[float] = []
    for _ in range(ROUNDS_OF_LONG_RUNS if duration >= LONG else ROUNDS):
        found = _round(plain, variant, lengths)
        if isinstance(found, str) or found[0] <= 0 or found[1] <= 0:
            continue  # a clock too coarse, or a disturbance longer than the run
        duration, own, seen = found
        ratio = own / duration
        if extra > 0 and seen > 0:
            ratio = 1 + (ratio - 1) * extra / seen
        rounds.append(ratio)
    if not rounds or statistics.median(rounds) <= 0:
        raise ValueError(
            f"a run of {lengths[1]} epochs or steps must take longer than one of {lengths[0]}, or the ratio of seconds is not known; got "
            f"{duration:.2g} s more. Leave 'seconds' out of the rivals, or train longer."
        )
    ratio = statistics.median(rounds)
    # Rounding must not add an epoch to 20 epochs at a ratio of 2.
    return EqualSeconds(ratio, math.ceil(variant.length * ratio - 1e-9), tuple(rounds), lengths)


def _round(plain: Side, variant: Side, lengths: tuple[int, int]) -> tuple[float, float, float] | str:
    """Seconds between the two lengths of plain training and of the variant, and extra evaluations there; or an error."""
    first, second = lengths
    runs = [plain.timed(first), variant.timed(first), variant.timed(second), plain.timed(second)]
    for run in runs:
        if isinstance(run, str):
            return run
    before, own_before, own_after, after = (run for run in runs if not isinstance(run, str))
    evaluations = after.evaluations - before.evaluations
    extra = (own_after.evaluations - own_before.evaluations) / evaluations - 1 if evaluations else 0.0
    return after.seconds - before.seconds, own_after.seconds - own_before.seconds, extra
