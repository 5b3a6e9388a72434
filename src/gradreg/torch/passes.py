"""Which passes make up one step: where each is evaluated and with what weight it enters the gradient."""

from __future__ import annotations

from dataclasses import dataclass

from gradreg.penalties import GradientPenalty
from gradreg.stencils import stencil


@dataclass(frozen=True)
class Pass:
    """One evaluation of the closures at θ + place·radius·d whose gradient enters the result ``weight`` times."""

    place: int
    weight: float


@dataclass(frozen=True)
class Plan:
    """The passes of one step. The first, at θ, gives the direction; ``keeps_first``: its gradient is part of the result."""

    passes: tuple[Pass, ...]
    keeps_first: bool


def plan(penalty: GradientPenalty, coefficient: float, *, separate_ascent: bool) -> Plan:
    """The passes of a step with c = ``coefficient`` > 0 for a finite difference.

    With ``separate_ascent`` the direction comes from other closures: their pass gives nothing but the direction, and the plain gradient,
    where it has a weight at all, is evaluated last, so that no second gradient has to be held.
    """
    weights = stencil(penalty.difference, coefficient)
    moved = tuple(Pass(place, weight) for place, weight in weights.moved)
    if separate_ascent:
        plain = (Pass(0, weights.at_theta),) if weights.at_theta != 0.0 else ()
        return Plan(passes=(Pass(0, 1.0), *moved, *plain), keeps_first=False)
    if weights.at_theta == 0.0:
        return Plan(passes=(Pass(0, 1.0), *moved), keeps_first=False)
    # With unit mixing the norm of the plain gradient is needed to weigh it, so its weight is applied afterwards.
    first = Pass(0, 1.0 if penalty.mixing == "unit" else weights.at_theta)
    return Plan(passes=(first, *moved), keeps_first=True)
