"""Which passes make up one step: where each is evaluated, with what weight it enters the gradient, and what becomes of the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradreg.mixing import GradientMixing
from gradreg.penalties import GradientPenalty
from gradreg.stencils import stencil


@dataclass(frozen=True)
class Pass:
    """One evaluation of the closures at θ + place·radius·d whose gradient enters the result ``weight`` times."""

    place: int
    weight: float


@dataclass(frozen=True)
class Plan:
    """The passes of one step.

    Args:
        first: the pass at θ before anything moves; None if neither the direction nor the result needs it.
        keeps_first: what becomes of its gradient: "none" of it is part of the result; "accumulated", it stays in ``.grad`` as it arrived;
            "aside", it is held whole, for a mixing that needs it beside the others.
        ascent_steps: how many steps lead to the first moved place; all but the first begin with a pass of their own.
        moved: the others; the last may be at θ again.
        at_theta: the weight of the gradient at θ in the result, if it is held aside.
    """

    first: Pass | None
    keeps_first: Literal["none", "accumulated", "aside"]
    ascent_steps: int
    moved: tuple[Pass, ...]
    at_theta: float = 0.0


def plan(penalty: GradientPenalty, coefficient: float, *, separate_ascent: bool) -> Plan:
    """The passes of a step with c = ``coefficient`` > 0 for a finite difference.

    With ``separate_ascent`` the direction comes from other closures: their pass gives nothing but the direction, and the plain gradient,
    where it has a weight at all, is evaluated last, so that no second gradient has to be held.
    """
    weights, steps = stencil(penalty.difference, coefficient), penalty.ascent_steps
    moved = tuple(Pass(place, weight) for place, weight in weights.moved)
    if separate_ascent:
        plain = (Pass(0, weights.at_theta),) if weights.at_theta != 0.0 else ()
        return Plan(Pass(0, 1.0), "none", steps, (*moved, *plain))
    if isinstance(penalty.mixing, GradientMixing):
        return Plan(Pass(0, 1.0), "aside", steps, moved, weights.at_theta)
    if weights.at_theta == 0.0:
        return Plan(Pass(0, 1.0) if penalty.direction.needs_gradient else None, "none", steps, moved)
    # With unit mixing the norm of the plain gradient is needed to weigh it, so its weight is applied afterwards.
    return Plan(Pass(0, 1.0 if penalty.mixing == "unit" else weights.at_theta), "accumulated", steps, moved)
