"""Adam on one number, as its paper has it, for the rules that follow a slope by it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class LogRadius:
    """log ρ, which follows slopes by Adam with the decays 0.8 and 0.9 and no ε: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1."""

    log_radius: float
    rate: float
    m: float = 0.0
    v: float = 0.0
    t: int = 0

    @property
    def radius(self) -> float:
        return math.exp(self.log_radius)

    def follow(self, slope: float) -> None:
        self.t += 1
        self.m = 0.8 * self.m + 0.2 * slope
        self.v = 0.9 * self.v + 0.1 * slope**2
        self.log_radius -= self.rate * (self.m / (1 - 0.8**self.t)) / math.sqrt(self.v / (1 - 0.9**self.t))
