"""The step h of a central difference: where its two errors together are least, A·h² from third derivatives and B/h from rounding.

The difference is taken at several h, a factor apart. Both errors are read from how far neighbouring results lie apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from gradreg.sharpness.space import Vector

RATIO = 3.0
"""Between neighbouring steps of the ladder."""
_RUNGS = 12
"""Steps that a calibration tries at most."""
UNSETTLED = 0.3
"""The relative error from which a difference says nothing."""


class Ladder:
    """Differences at steps of a geometric ladder, and how far neighbours lie apart.

    Args:
        difference: at a step.
        norm: of a vector.
        start: the first step.
        limit: the largest.
    """

    def __init__(self, difference: Callable[[float], Vector], norm: Callable[[Vector], float], start: float, limit: float) -> None:
        self._difference = difference
        self._norm = norm
        self._limit = limit
        self.length: float = 0.0
        self.steps: list[float] = [start]
        self._apart: dict[float, float] = {}
        """Larger step of a pair -> the distance of its difference from that of the next smaller step."""
        self._lengths: dict[float, float] = {}
        self._ends = [difference(start)] * 2
        self._lengths[start] = norm(self._ends[0])

    def climb(self) -> None:
        """Go down while neighbours come closer, then up, until both sides of the least distance are known."""
        self._down()
        self._down()
        while len(self.steps) < _RUNGS:
            pairs = self._relative()
            least = self._least()
            if pairs[least] == 0.0:
                break
            # Two signs that the steps are too large for any expansion: nothing agrees, and yet neighbours point the same way. (Where all is
            # rounding they do not, and are further apart than either is long.)
            too_large = pairs[least] > UNSETTLED and pairs[-1] < 0.9
            if least == len(pairs) - 1 or too_large:
                self._down()
            elif least == 0 and self.steps[0] * RATIO <= self._limit:
                self._up()
            else:
                break

    def _relative(self) -> list[float]:
        """The distances relative to the longer of each pair; infinite where one is not finite."""
        found: list[float] = []
        for larger, smaller in pairwise(self.steps):
            length = max(self._lengths[larger], self._lengths[smaller])
            apart = self._apart[larger]
            found.append(math.inf if not math.isfinite(apart) else apart / length if length > 0 else 0.0)
        return found

    def _least(self) -> int:
        pairs = self._relative()
        return min(range(len(pairs)), key=pairs.__getitem__)

    def _down(self) -> None:
        """One smaller step."""
        larger, step = self.steps[-1], self.steps[-1] / RATIO
        new = self._difference(step)
        self._apart[larger] = self._norm(self._ends[1] - new)
        self._lengths[step] = self._norm(new)
        self.steps.append(step)
        self._ends[1] = new

    def _up(self) -> None:
        """One larger step."""
        step = self.steps[0] * RATIO
        new = self._difference(step)
        self._apart[step] = self._norm(new - self._ends[0])
        self._lengths[step] = self._norm(new)
        self.steps.insert(0, step)
        self._ends[0] = new

    def parts(self) -> tuple[float, float]:
        """A and B of an error √((A·h²)² + (B/h)²), from the distances at the two ends of the ladder.

        Neighbours h and h/r are apart by the difference of their truncation, A·h²(1 − 1/r²), and by both roundings, B·√(1 + r²)/h.
        """
        pairs, least = self._relative(), self._least()
        if not math.isfinite(pairs[least]):
            return math.inf, math.inf
        # The neighbours of the closest pair: further away there may be other powers of h.
        large = self.steps[least - 1 if least > 0 and math.isfinite(pairs[least - 1]) else least]
        small = self.steps[least + 1 if least + 1 < len(pairs) and math.isfinite(pairs[least + 1]) else least]
        t, n = 1 - RATIO**-2, (1 + RATIO**2) ** 0.5
        if large == small:
            return self._apart[large] / (t * large * large), 0.0
        # Two equations in A² and B². Where the solution is negative, that part is not seen at this end, and 0.
        rows = torch.tensor([[(t * h * h) ** 2, (n / h) ** 2] for h in (large, small)], dtype=torch.float64)
        sides = torch.tensor([self._apart[h] ** 2 for h in (large, small)], dtype=torch.float64)
        # Scaled so that the entries of a row, which lie many orders apart, keep their digits.
        scale = rows.amax(dim=0)
        a2, b2 = (torch.linalg.solve(rows / scale, sides) / scale).tolist()
        a2 = a2 if a2 > 0 else 0.0
        b2 = b2 if b2 > 0 else 0.0
        return a2**0.5, b2**0.5

    def best(self, a: float, b: float) -> float:
        """The step of the least error, within a rung of those tried."""
        wanted = self.steps[0] if a == 0 else self.steps[-1] if b == 0 else (b * b / (2 * a * a)) ** (1 / 6)
        step = min(max(wanted, self.steps[-1]), self.steps[0])
        nearest = min(self._lengths, key=lambda h: abs(math.log(h / step)))
        self.length = self._lengths[nearest]
        return step
