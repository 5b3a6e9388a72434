"""Is a strength or radius too large for these curvatures? By the theory of quadratics, and by what was measured on a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gradreg import checks
from gradreg.penalties import GradientPenalty
from gradreg.theory.stability import (
    checked_optimizer,
    largest_gamma,
    regularized_curvature,
    sam_edge,
    settling_distance,
    sharpest_stable_curvature,
    trapping_curvature,
)


@dataclass(frozen=True)
class MeasuredCurvature:
    """What ``gradreg.sharpness.penalized_curvature`` found along an eigenvector of a network's Hessian.

    Attributes:
        curvature: h, the eigenvalue.
        penalized: the curvature that a step sees under the penalty; h(1 + γh) on a quadratic.
        error: of ``penalized``.
    """

    curvature: float
    penalized: float
    error: float = 0.0


@dataclass(frozen=True)
class Advice:
    """The analysis of a penalty at these curvatures: by the theory of quadratics, and by measurement where there is one.

    Attributes:
        problems: one sentence each, with a value that is small enough; empty if there are none.
        largest_strength: of power 2, the largest that keeps a minimum of ``largest_curvature`` stable and makes no trap of
            ``smallest_curvature``; of power 1, the one that settles at ``tolerated_distance`` (∞ without).
        settling_distance: of power 1; 0 for power 2, which converges.
        stable_curvature: the curvature of the sharpest minima that stay stable; of power 1 ``sam_edge`` where the gradient's norm is known.
        notes: what the penalty does at these curvatures, one sentence each; nothing to mend.
        partings: where the theory of quadratics and what was measured part, one sentence each; the measurement is to be believed.
    """

    problems: tuple[str, ...]
    largest_strength: float
    settling_distance: float
    stable_curvature: float
    notes: tuple[str, ...] = ()
    partings: tuple[str, ...] = ()


def advise(
    penalty: GradientPenalty,
    *,
    learning_rate: float,
    largest_curvature: float,
    smallest_curvature: float = 0.0,
    momentum: float = 0.0,
    tolerated_distance: float | None = None,
    step: int = 0,
    gradient_norm: float | None = None,
    measured: Sequence[MeasuredCurvature] = (),
) -> Advice:
    """Is this strength or radius too large for these curvatures?

    A quadratic answers for the curvatures alone. Networks train at the edge of stability, and see another curvature a perturbation away:
    with ``gradient_norm`` and ``measured``, taken on the network itself, what was seen goes before what a quadratic would do.

    Args:
        penalty: any penalty; its strength and radius are taken at ``step``.
        learning_rate: η > 0.
        largest_curvature: largest eigenvalue of the Hessian, > 0.
        smallest_curvature: smallest eigenvalue; negative values ask whether the penalty turns that direction into a trap.
        momentum: μ, 0 ≤ μ < 1.
        tolerated_distance: for power 1, how far from the minimum iterates may settle, > 0; None sets no limit.
        step: optimizer step at which schedules are evaluated, ≥ 0.
        gradient_norm: ‖g‖ where the curvatures were measured, ≥ 0, while training went on; None if they are thought up.
        measured: of the largest and the smallest eigenvalue, or others, what the penalty made of them there.

    Returns:
        Advice. A strength of power 2 that makes ``largest_curvature`` unstable is not too large: training leaves such minima for flatter
        ones, and a note says how flat. On a quadratic the radius of power 2 has no effect; a note says where ε·h > 1, so that the second
        gradient is evaluated beyond the minimum and the quadratic is a rough guide.
    """
    rate, inertia = checked_optimizer(learning_rate, momentum)
    sharp, flat = checks.positive("largest_curvature", largest_curvature), checks.real("smallest_curvature", smallest_curvature)
    norm = None if gradient_norm is None else checks.non_negative("gradient_norm", gradient_norm)
    tolerated = math.inf if tolerated_distance is None else checks.positive("tolerated_distance", tolerated_distance)
    strength, limit = penalty.strength_at(step), 2 * (1 + inertia) / rate
    partings: list[str] = []
    if sharp >= limit:
        if norm is None:
            return Advice(
                (f"learning rate {rate:g} is unstable at curvature {sharp:g} without any penalty; stay below {limit / sharp * rate:.3g}.",),
                largest_strength=0.0,
                settling_distance=0.0,
                stable_curvature=limit,
                notes=("This is a quadratic's answer. A network that is trained hovers around this edge: gradreg lab edge.",),
            )
        partings.append(
            f"On a quadratic learning rate {rate:g} diverges at the measured curvature {sharp:.3g}, above {limit:.3g}. Training goes on "
            "there: it hovers at the edge of stability, which is no fault of the learning rate or the penalty."
        )
    case = _Case(
        penalty=penalty, strength=strength, sharp=sharp, flat=flat, rate=rate, inertia=inertia, step=step, tolerated=tolerated, norm=norm
    )
    found, trap = _power_one(case) if penalty.power == 1 else _power_two(case)
    gamma = strength if penalty.power == 2 else None if not norm else strength / norm
    traps, disagreeing = _judged(trap, measured, gamma, limit)
    return replace(found, problems=(*found.problems, *traps), partings=(*partings, *found.partings, *disagreeing))


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is asked: the arguments of ``advise``, checked, with the strength at the step."""

    penalty: GradientPenalty
    strength: float
    sharp: float
    flat: float
    rate: float
    inertia: float
    step: int
    tolerated: float
    norm: float | None

    @property
    def optimizer(self) -> dict[str, float]:
        return {"learning_rate": self.rate, "momentum": self.inertia}


def _power_one(case: _Case) -> tuple[Advice, str | None]:
    """SAM and GNP: where they settle and, where the gradient's norm is known, their edge of stability; and what is a trap, if it is one."""
    strength, sharp, flat, norm = case.strength, case.sharp, case.flat, case.norm
    problems, notes, partings = list[str](), list[str](), list[str]()
    limit = 2 * (1 + case.inertia) / case.rate
    stable = sharp < limit
    distance = settling_distance(sharp, strength, **case.optimizer) if stable else math.inf
    largest = strength * case.tolerated / distance if 0 < distance < math.inf else math.inf if stable else 0.0
    if stable and distance > case.tolerated:
        problems.append(f"strength {strength:g} settles {distance:.3g} from the minimum, not {case.tolerated:g}; stay below {largest:.3g}.")
    bouncing = trapping_curvature(sharp, **case.optimizer) if stable else math.inf
    if norm is None:
        if -flat > bouncing and strength > 0:
            notes.append(
                f"On a quadratic curvature {flat:g} is a trap while iterates bounce along curvature {sharp:g} at the minimum, as any below "
                f"{-bouncing:.3g} is, at any strength. A network's gradient is longer than that: give its norm (gradient_norm)."
            )
        return Advice(tuple(problems), largest, distance, stable_curvature=limit, notes=tuple(notes)), None
    edge = sam_edge(norm, strength, **case.optimizer)
    trapping = norm / strength if strength > 0 else math.inf
    if strength > 0 and sharp >= edge:
        notes.append(
            f"curvature {sharp:.3g} is at or above SAM's edge of stability, {edge:.3g} at a gradient of length {norm:.3g}, where training "
            "hovers or turns to flatter ones."
        )
    trap = None
    if -flat > trapping:
        trap = (
            f"strength {strength:g} turns curvature {flat:g} into a trap at a gradient of length {norm:.3g}; stay below {-norm / flat:.3g}."
        )
    elif -flat > bouncing and strength > 0:
        partings.append(
            f"On a quadratic, whose iterates bounce along curvature {sharp:.3g}, curvature {flat:.3g} is a trap at any strength. At the "
            f"measured gradient, {norm:.3g} long, only one below {-trapping:.3g} is."
        )
    return Advice(tuple(problems), largest, distance, stable_curvature=edge, notes=tuple(notes), partings=tuple(partings)), trap


def _power_two(case: _Case) -> tuple[Advice, str | None]:
    """F-GR, B-GR, C-GR and DB: what stays stable, and where the radius looks beyond the minimum; and what is a trap, if it is one."""
    strength, sharp, flat = case.strength, case.sharp, case.flat
    notes, radius = list[str](), case.penalty.radius_at(case.step)
    stable = largest_gamma(sharp, **case.optimizer)
    trapping = largest_gamma(flat, **case.optimizer) if flat < 0 else math.inf
    kept = sharpest_stable_curvature(strength, **case.optimizer)
    if strength >= stable > 0:
        notes.append(
            f"gamma {strength:g} leaves minima stable up to curvature {kept:.3g} with learning rate {case.rate:g}, so training will leave "
            f"one of {sharp:g} for a flatter one; below gamma {stable:.3g} it could stay."
        )
    there = min(sharp, kept)
    if radius is not None and strength > 0 and radius * there > 1:
        notes.append(
            f"epsilon {radius:g} looks {radius * there:.3g} times as far as the minimum of curvature {there:.3g} lies, where a quadratic "
            f"is a rough guide; below {1 / there:.3g} it is a closer one."
        )
    trap = f"gamma {strength:g} turns curvature {flat:g} into a trap; stay below {trapping:.3g}." if strength >= trapping else None
    return Advice((), max(0.0, min(stable, trapping)), 0.0, stable_curvature=kept, notes=tuple(notes)), trap


def _judged(
    trap: str | None, measured: Sequence[MeasuredCurvature], gamma: float | None, limit: float
) -> tuple[tuple[str, ...], list[str]]:
    """The traps that measurement leaves or adds to the one of a quadratic, and where it and the theory part."""
    traps, partings = [] if trap is None else [trap], list[str]()
    for one in measured:
        theory = None if gamma is None else float(regularized_curvature(one.curvature, gamma))
        said = "" if theory is None else f"{theory:.3g} on a quadratic, and "
        seen = f"{one.penalized:.3g} ± {one.error:.1g} as measured with the penalty's own gradient"
        if one.curvature < 0:
            trapped = one.penalized > one.error
            if not trapped and theory is not None and theory > 0:
                traps = [one for one in traps if one != trap]
                partings.append(f"curvature {one.curvature:.3g} becomes {said}{seen}: it is no trap here.")
            elif trapped and (theory is None or theory <= 0):
                traps.append(
                    f"curvature {one.curvature:.3g} becomes {said}{seen}: a trap, though not on a quadratic; take a smaller strength."
                )
            continue
        if theory is not None and (theory < limit) != (one.penalized < limit):
            verdict = (
                "a step of this learning rate is stable there" if one.penalized < limit else "a step of this learning rate overshoots there"
            )
            partings.append(f"curvature {one.curvature:.3g} becomes {said}{seen}, with the limit at {limit:.3g}: {verdict}.")
        elif theory is not None and abs(theory - one.penalized) > max(2 * one.error, 0.25 * abs(theory)):
            partings.append(f"curvature {one.curvature:.3g} becomes {said}{seen}: the same verdict, from another number.")
    return tuple(traps), partings
