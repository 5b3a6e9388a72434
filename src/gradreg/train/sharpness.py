"""The block ``sharpness`` of a recipe: whether the curvature of the training loss is measured, when, and on how much."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradreg import checks
from gradreg.sharpness.measures import DEFAULT, MEASURES


@dataclass
class SharpnessConfig:
    """Sharpness, measured during the run, which it does not change.

    Args:
        every: epochs from one measurement to the next, >= 1; the last epoch is measured too. null measures none.
        samples: how many training samples, not augmented and the same at every measurement, >= 1; fewer if there are no more.
        batch: samples at a time, >= 1, which are also the m of m_sharpness.
        rho: radius of the rises, L2 norm over all parameters, > 0.
        vectors: random vectors of the trace, >= 2.
        measures: which of largest_eigenvalue, smallest_eigenvalue, trace, sam_sharpness, m_sharpness and critical_sharpness.
    """

    every: int | None = None
    samples: int = 1000
    batch: int = 100
    rho: float = 0.05
    vectors: int = 10
    measures: list[str] = field(default_factory=lambda: list(DEFAULT))

    def __post_init__(self) -> None:
        if self.every is not None:
            checks.whole("sharpness.every", self.every, minimum=1, remedy="Use null for none.")
        checks.whole("sharpness.samples", self.samples, minimum=1)
        checks.whole("sharpness.batch", self.batch, minimum=1)
        checks.positive("sharpness.rho", self.rho)
        checks.whole("sharpness.vectors", self.vectors, minimum=2, remedy="A standard error needs two.")
        if not self.measures:
            raise ValueError(f"sharpness.measures must name some of {', '.join(MEASURES)}; got none. Use sharpness.every: null for none.")
        for name in self.measures:
            checks.choice("sharpness.measures", name, tuple(MEASURES))

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether the run is measured after ``epoch`` of ``epochs``."""
        return self.every is not None and (epoch % self.every == 0 or epoch == epochs)
