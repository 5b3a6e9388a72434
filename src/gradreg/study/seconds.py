"""The rival at equal seconds: how long a variant's epochs (or steps) take in units of plain training's, measured on this machine.

Short runs of plain training and of the variant alternate in one process, with no other run beside them. What counts is the time between
the end of an early epoch and that of the last: imports, the loading of data and compilation drop out. Of runs that log in fewer than two
epochs (or steps), two lengths are taken, and the difference between their times counts; compilation then drops out on average only. The
median over the rounds is fixed once, stored in the study's ``plan.json``, and used whenever and wherever the study resumes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

ROUNDS = 5
MOST_ROUNDS = 15
"""Rounds are added up to so many while they do not agree."""
AGREE = 1.2
"""The quotient of the third quartile to the first from which on rounds do not agree."""
ROUNDS_OF_LONG_RUNS = 3
LONG = 10.0
"""Seconds between the two lengths from which on there are fewer rounds."""
LEAST = 0.25
"""Seconds between the two lengths of plain training below which longer runs are taken, as long as a run of the study is not exceeded."""


@dataclass(frozen=True)
class Timed:
    """One short run.

    Args:
        seconds: of the whole run.
        evaluations: gradient evaluations of it.
        marks: epochs (or steps) done, seconds and gradient evaluations until then, wherever it logged; in order.
    """

    seconds: float
    evaluations: float
    marks: tuple[tuple[float, float, float], ...] = ()

    def since(self, length: int) -> tuple[float, float, float] | None:
        """Epochs, seconds and evaluations from the first mark at ``length`` or later to the last mark; None without two marks."""
        marks = [mark for mark in self.marks if mark[0] >= length]
        if len(marks) < 2:
            return None
        first, last = marks[0], marks[-1]
        return last[0] - first[0], last[1] - first[1], last[2] - first[2]


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
        lengths: of the short runs: from where to where they were timed.
    """

    ratio: float
    length: int
    rounds: tuple[float, ...]
    lengths: tuple[int, int]

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the rounds."""
        return _quartiles(self.rounds)

    @property
    def agrees(self) -> bool:
        """Whether the rounds tell the ratio: at least three, whose quartiles differ by less than ``AGREE``."""
        return _agree(self.rounds)


def _quartiles(rounds: Sequence[float]) -> tuple[float, float]:
    if len(rounds) < 2:
        return rounds[0], rounds[0]
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return low, high


def _agree(rounds: Sequence[float]) -> bool:
    low, high = _quartiles(rounds)
    return len(rounds) >= ROUNDS_OF_LONG_RUNS and high < AGREE * low


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
    enough, most = (ROUNDS_OF_LONG_RUNS, ROUNDS_OF_LONG_RUNS) if duration >= LONG else (ROUNDS, MOST_ROUNDS)
    for tried in range(most):
        if tried >= enough and rounds and _agree(rounds):
            break
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
    """Seconds from the first length to the second of plain training and of the variant, and extra evaluations there; or an error.

    Both are given per epoch (or step) that was timed, where the two log at different ones.
    """
    first, second = lengths
    long, own_long = plain.timed(second), variant.timed(second)
    if isinstance(long, str) or isinstance(own_long, str):
        return long if isinstance(long, str) else str(own_long)
    within, own_within = long.since(first), own_long.since(first)
    if within is not None and own_within is not None:
        scale = within[0] / own_within[0]
        seconds, own_seconds = within[1], own_within[1] * scale
        evaluations, own_evaluations = within[2], own_within[2] * scale
    else:
        own_short, short = variant.timed(first), plain.timed(first)
        if isinstance(short, str) or isinstance(own_short, str):
            return short if isinstance(short, str) else str(own_short)
        seconds, own_seconds = long.seconds - short.seconds, own_long.seconds - own_short.seconds
        evaluations, own_evaluations = long.evaluations - short.evaluations, own_long.evaluations - own_short.evaluations
    return seconds, own_seconds, own_evaluations / evaluations - 1 if evaluations else 0.0
