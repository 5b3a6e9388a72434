"""Timing several things side by side: each once a round, in a random order, compared within the round.

A machine whose speed drifts, or on which others work, then disturbs all alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

Measured = TypeVar("Measured")

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""Seconds that pass, and seconds that all threads of this process compute."""


def interleaved(candidates: Mapping[str, Callable[[], Measured]], rounds: Iterable[object]) -> dict[str, list[Measured]]:
    """What each of ``candidates`` returned in each of ``rounds``, in the same random orders every time."""
    order, shuffle = list(candidates), random.Random(0).shuffle
    found: dict[str, list[Measured]] = {name: [] for name in order}
    for _ in rounds:
        shuffle(order)
        for name in order:
            found[name].append(candidates[name]())
    return found


def lasting(seconds: float, *, least: int) -> Iterator[int]:
    """The numbers of the rounds that begin within ``seconds``, and of ``least`` rounds whatever they take."""
    start, done = time.perf_counter(), 0
    while done < least or time.perf_counter() - start < seconds:
        yield done
        done += 1


def ratio_quartiles(own: Sequence[float], unit: Sequence[float]) -> tuple[float, float, float]:
    """The quartiles, the median in the middle, of ``own`` / ``unit`` round by round."""
    low, middle, high = np.percentile(np.divide(own, unit), (25, 50, 75))
    return float(low), float(middle), float(high)
