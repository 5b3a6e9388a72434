"""Which curvatures gradient regularization keeps stable, which it traps at saddles, and how far from a minimum it settles.

On a quadratic every finite difference is exact, so one statement covers F-GR, B-GR, C-GR and DB. Along an eigenvector of curvature h:

- power 2 (γ): θ ← (1 − ηh(1 + γh))·θ. With heavy-ball momentum μ it is stable exactly when 0 < ηh(1 + γh) < 2(1 + μ). Negative
  curvature is escaped only if γ|h| < 1, and is a trap for larger γ.
- power 1 (strength λ; ρ for SAM, α·r for GNP): G = Aθ + λ·A(Aθ)/‖Aθ‖ does not vanish towards the minimum, and the iterates end in a
  two-cycle ±δ along the sharpest eigenvector, δ = ηhλ / (2(1 + μ) − ηh).

Source: Karakida et al. 2023, arXiv 2210.02720 (power 2); Bartlett, Long and Bousquet 2023, arXiv 2210.01513 (SAM's two-cycle).
Differs from the papers: momentum, GNP, and the verdicts at negative curvature are derived in docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradreg import checks
from gradreg.penalties import GradientPenalty
from gradreg.theory.sparse_regression import Array


class Fate(IntEnum):
    """What happens to a small displacement along an eigenvector."""

    SETTLES = 0
    """h ≥ 0 and it shrinks: a minimum that training can stay in."""
    DIVERGES = 1
    """h ≥ 0 and it grows: the step is too large for h, or γ is."""
    ESCAPES = 2
    """h < 0 and it grows: the saddle is left, as it should be."""
    TRAPPED = 3
    """h < 0 and it shrinks: the penalty holds the iterate at a saddle."""


def regularized_curvature(curvature: ArrayLike, gamma: ArrayLike) -> Array:
    """h(1 + γh): the curvature that a step sees under the penalty (γ/2)‖g‖².

    Args:
        curvature: h, eigenvalue(s) of the Hessian, any sign.
        gamma: strength γ ≥ 0; broadcast against ``curvature``.
    """
    h = np.asarray(curvature, dtype=np.float64)
    return h * (1.0 + np.asarray(gamma, dtype=np.float64) * h)


def fate(curvature: ArrayLike, gamma: ArrayLike, *, learning_rate: float, momentum: float = 0.0) -> NDArray[np.int64]:
    """The ``Fate`` of each curvature, by theory: shrinks exactly where 0 < ηh(1 + γh) < 2(1 + μ).

    Args:
        curvature: h, any shape.
        gamma: γ ≥ 0, broadcast against ``curvature``.
        learning_rate: η > 0.
        momentum: μ of heavy-ball momentum, 0 ≤ μ < 1.

    Returns:
        Values of ``Fate``, in the broadcast shape. h = 0, where nothing moves, counts as settled.

    >>> [Fate(f).name for f in fate([1.0, 3.0, -1.0, -3.0], 0.5, learning_rate=0.5)]
    ['SETTLES', 'DIVERGES', 'ESCAPES', 'TRAPPED']
    """
    rate, inertia = _checked_optimizer(learning_rate, momentum)
    _checked_gamma(gamma)
    pull = rate * regularized_curvature(curvature, gamma)
    negative = np.broadcast_to(np.asarray(curvature) < 0, pull.shape)
    shrinks = (pull > 0) & (pull < 2 * (1 + inertia))
    return _fates(negative, shrinks | (pull == 0) & ~negative)


def simulated_fate(
    curvature: ArrayLike, gamma: ArrayLike, *, learning_rate: float, momentum: float = 0.0, steps: int = 2000
) -> NDArray[np.int64]:
    """The same by running ``steps`` regularized steps from θ = 1: does |θ| end below or above 1? Independent of the formula.

    The gradient is g + γ·(∇L(θ + g) − g), the forward difference with ε = 1, which is exact on a quadratic.

    Args:
        curvature: h, any shape.
        gamma: γ ≥ 0, broadcast against ``curvature``.
        learning_rate: η > 0.
        momentum: μ, 0 ≤ μ < 1.
        steps: ≥ 1; curvatures closer to a border than about 1/steps are not decided.
    """
    rate, inertia = _checked_optimizer(learning_rate, momentum)
    _checked_gamma(gamma)
    h, strength = np.broadcast_arrays(np.asarray(curvature, dtype=np.float64), np.asarray(gamma, dtype=np.float64))
    place, speed = np.ones(h.shape), np.zeros(h.shape)
    for _ in range(checks.whole("steps", steps, minimum=1)):
        gradient = h * place
        speed = inertia * speed + gradient + strength * (h * (place + gradient) - gradient)
        place = np.clip(place - rate * speed, -1e12, 1e12)
        speed = np.clip(speed, -1e12, 1e12)
    return _fates(h < 0, np.abs(place) <= 1.0)


def largest_gamma(curvature: float, *, learning_rate: float, momentum: float = 0.0) -> float:
    """The γ at which curvature h stops being stable (h > 0) or starts to be a trap (h < 0).

    γ = (2(1 + μ)/(ηh) − 1)/h for h > 0 (negative where plain descent is already unstable), 1/|h| for h < 0, ∞ for h = 0.

    Args:
        curvature: h, of any sign.
        learning_rate: η > 0.
        momentum: μ, 0 ≤ μ < 1.

    >>> largest_gamma(1.0, learning_rate=0.5), largest_gamma(-4.0, learning_rate=0.5)
    (3.0, 0.25)
    """
    rate, inertia = _checked_optimizer(learning_rate, momentum)
    h = checks.real("curvature", curvature)
    if h == 0.0:
        return np.inf
    return -1.0 / h if h < 0 else (2 * (1 + inertia) / (rate * h) - 1.0) / h


def sharpest_stable_curvature(gamma: float, *, learning_rate: float, momentum: float = 0.0) -> float:
    """The curvature h* up to which minima are stable at strength γ: h*(1 + γh*) = 2(1 + μ)/η, and 2(1 + μ)/η for γ = 0.

    Training leaves minima sharper than h* for flatter ones. That is the effect of a penalty, not a sign that it is too strong.

    Args:
        gamma: γ ≥ 0.
        learning_rate: η > 0.
        momentum: μ, 0 ≤ μ < 1.

    >>> sharpest_stable_curvature(3.0, learning_rate=0.5), sharpest_stable_curvature(0.0, learning_rate=0.5)
    (1.0, 4.0)
    """
    rate, inertia = _checked_optimizer(learning_rate, momentum)
    strength, limit = checks.non_negative("gamma", gamma), 2 * (1 + inertia) / rate
    return 2 * limit / (1 + math.sqrt(1 + 4 * strength * limit))


def sam_edge(gradient_norm: float, strength: float, *, learning_rate: float, momentum: float = 0.0) -> float:
    """SAM's edge of stability: the curvature above which a step of SAM or GNP overshoots where the gradient has length ‖g‖.

    Along an eigenvector of curvature h the gradient h·θ and the perturbation strength·ĝ give the curvature h(1 + strength·h/‖g‖), so that
    power 1 acts as power 2 with γ = strength/‖g‖: the edge is h* with h*(1 + strength·h*/‖g‖) = 2(1 + μ)/η. It lies below gradient
    descent's 2(1 + μ)/η, and falls to 0 with ‖g‖.

    Args:
        gradient_norm: ‖g‖ ≥ 0.
        strength: λ ≥ 0: ρ for SAM, α·r for GNP; 0 gives the edge of gradient descent.
        learning_rate: η > 0.
        momentum: μ of heavy-ball momentum, 0 ≤ μ < 1.

    Source: Long and Bartlett 2023, arXiv 2309.12488, equation 3 (μ = 0): (‖g‖/2ρ)·(√(1 + 8ρ/(η‖g‖)) − 1).
    Differs from the paper: momentum, and GNP.

    >>> sam_edge(0.5, 1.0, learning_rate=0.5), sam_edge(0.5, 0.0, learning_rate=0.5)
    (1.1861406616345072, 4.0)
    """
    norm, strength = checks.non_negative("gradient_norm", gradient_norm), checks.non_negative("strength", strength)
    if strength > 0 and norm == 0:
        return 0.0
    return sharpest_stable_curvature(strength / norm if strength > 0 else 0.0, learning_rate=learning_rate, momentum=momentum)


def settling_distance(curvature: float, strength: float, *, learning_rate: float, momentum: float = 0.0) -> float:
    """How far from the minimum SAM and GNP settle: δ = ηhλ / (2(1 + μ) − ηh), h the largest curvature.

    The loss stays at least ½hδ² above the minimum's.

    Args:
        curvature: h > 0, the largest eigenvalue of the Hessian, with ηh < 2(1 + μ).
        strength: λ ≥ 0: ρ for SAM, α·r for GNP.
        learning_rate: η > 0.
        momentum: μ, 0 ≤ μ < 1.

    Raises:
        ValueError: also where plain gradient descent is unstable, and nothing settles.

    >>> settling_distance(1.0, 0.75, learning_rate=0.5)
    0.25
    """
    rate, inertia = _checked_optimizer(learning_rate, momentum)
    h, strength = checks.positive("curvature", curvature), checks.non_negative("strength", strength)
    room = 2 * (1 + inertia) - rate * h
    if room <= 0:
        raise ValueError(
            f"learning_rate times curvature must be below 2(1 + momentum) = {2 * (1 + inertia):g}; got {rate * h:g}, where descent "
            f"diverges even without a penalty. Take learning_rate below {2 * (1 + inertia) / h:.3g}."
        )
    return rate * h * strength / room


def trapping_curvature(largest_curvature: float, *, learning_rate: float, momentum: float = 0.0) -> float:
    """How negative a curvature must be for SAM and GNP to be trapped at its saddle: |h| above ηH² / (2(1 + μ) − ηH), whatever the strength.

    While iterates bounce along the sharpest direction H, ‖g‖ stays at Hδ, and the penalty adds λh²/‖g‖ to a negative curvature h. Only
    displacements much smaller than δ are trapped.

    Args:
        largest_curvature: H > 0, with ηH < 2(1 + μ).
        learning_rate: η > 0.
        momentum: μ, 0 ≤ μ < 1.

    >>> trapping_curvature(2.0, learning_rate=0.5)
    2.0
    """
    return largest_curvature * settling_distance(largest_curvature, 1.0, learning_rate=learning_rate, momentum=momentum)


@dataclass(frozen=True, eq=False)
class Settling:
    """Where SAM or GNP ended on a quadratic.

    Attributes:
        distance: ‖θ‖ after each step, shape (steps + 1,).
        alignment: |cos| of the angle between θ and the sharpest eigenvector, shape (steps + 1,).
        predicted: the two-cycle's distance δ.
    """

    distance: Array
    alignment: Array
    predicted: float


def settle(
    curvatures: ArrayLike, strength: float, *, learning_rate: float, momentum: float = 0.0, steps: int = 3000, seed: int = 0
) -> Settling:
    """Run G = ∇L(θ) + λ·A·ĝ with L = ½Σ h_i θ_i² from a random unit vector, and record how far from 0 it stays.

    Args:
        curvatures: h_i > 0, shape (d,).
        strength: λ ≥ 0: ρ for SAM, α·r for GNP.
        learning_rate: η > 0.
        momentum: μ, 0 ≤ μ < 1.
        steps: ≥ 1.
        seed: of the start, ≥ 0.
    """
    rate, inertia = _checked_optimizer(learning_rate, momentum)
    h = np.asarray(curvatures, dtype=np.float64)
    if h.ndim != 1 or h.size == 0 or not np.isfinite(h).all() or (h <= 0).any():
        raise ValueError(f"curvatures must be a non-empty list of finite numbers > 0; got {checks.describe(curvatures)}.")
    predicted = settling_distance(float(h.max()), strength, learning_rate=rate, momentum=inertia)
    place = np.random.default_rng(checks.whole("seed", seed, minimum=0)).standard_normal(h.size)
    place /= np.linalg.norm(place)
    speed = np.zeros(h.size)
    path = [place]
    for _ in range(checks.whole("steps", steps, minimum=1)):
        gradient = h * place
        norm = float(np.linalg.norm(gradient))
        speed = inertia * speed + gradient + (strength * h * gradient / norm if norm > 0 else 0.0)
        place = place - rate * speed
        path.append(place)
    points = np.array(path)
    distance = np.linalg.norm(points, axis=1)
    along = np.linalg.norm(points[:, h == h.max()], axis=1)
    alignment = np.divide(along, distance, out=np.zeros_like(along), where=distance > 0)
    return Settling(distance=distance, alignment=alignment, predicted=predicted)


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
    rate, inertia = _checked_optimizer(learning_rate, momentum)
    sharp, flat = checks.positive("largest_curvature", largest_curvature), checks.real("smallest_curvature", smallest_curvature)
    norm = None if gradient_norm is None else checks.non_negative("gradient_norm", gradient_norm)
    tolerated = np.inf if tolerated_distance is None else checks.positive("tolerated_distance", tolerated_distance)
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
    own = _power_one if penalty.power == 1 else _power_two
    found = own(penalty, strength, sharp, flat, rate, inertia, step=step, tolerated=tolerated, norm=norm)
    gamma = strength if penalty.power == 2 else None if not norm else strength / norm
    problems, disagreeing = _judged(found.problems, measured, gamma, limit)
    return replace(found, problems=problems, partings=(*partings, *found.partings, *disagreeing))


def _power_one(
    penalty: GradientPenalty,
    strength: float,
    sharp: float,
    flat: float,
    rate: float,
    inertia: float,
    *,
    step: int,
    tolerated: float,
    norm: float | None,
) -> Advice:
    """SAM and GNP: where they settle, what is a trap, and, where the gradient's norm is known, their edge of stability."""
    problems, notes, partings = list[str](), list[str](), list[str]()
    stable = sharp < 2 * (1 + inertia) / rate
    distance = settling_distance(sharp, strength, learning_rate=rate, momentum=inertia) if stable else math.inf
    largest = strength * tolerated / distance if 0 < distance < math.inf else math.inf if stable else 0.0
    if stable and distance > tolerated:
        problems.append(f"strength {strength:g} settles {distance:.3g} from the minimum, not {tolerated:g}; stay below {largest:.3g}.")
    bouncing = trapping_curvature(sharp, learning_rate=rate, momentum=inertia) if stable else math.inf
    if norm is None:
        if -flat > bouncing and strength > 0:
            notes.append(
                f"On a quadratic curvature {flat:g} is a trap while iterates bounce along curvature {sharp:g} at the minimum, as any below "
                f"{-bouncing:.3g} is, at any strength. A network's gradient is longer than that: give its norm (gradient_norm)."
            )
        return Advice(tuple(problems), largest, distance, stable_curvature=2 * (1 + inertia) / rate, notes=tuple(notes))
    edge = sam_edge(norm, strength, learning_rate=rate, momentum=inertia)
    trap = norm / strength if strength > 0 else math.inf
    if strength > 0 and sharp >= edge:
        notes.append(
            f"curvature {sharp:.3g} is at or above SAM's edge of stability, {edge:.3g} at a gradient of length {norm:.3g}, where training "
            "hovers or turns to flatter ones."
        )
    if -flat > trap:
        problems.append(
            f"strength {strength:g} turns curvature {flat:g} into a trap at a gradient of length {norm:.3g}; stay below {-norm / flat:.3g}."
        )
    elif -flat > bouncing and strength > 0:
        partings.append(
            f"On a quadratic, whose iterates bounce along curvature {sharp:.3g}, curvature {flat:.3g} is a trap at any strength. At the "
            f"measured gradient, {norm:.3g} long, only one below {-trap:.3g} is."
        )
    return Advice(tuple(problems), largest, distance, stable_curvature=edge, notes=tuple(notes), partings=tuple(partings))


def _power_two(
    penalty: GradientPenalty,
    strength: float,
    sharp: float,
    flat: float,
    rate: float,
    inertia: float,
    *,
    step: int,
    tolerated: float,
    norm: float | None,
) -> Advice:
    """F-GR, B-GR, C-GR and DB: what stays stable, what is a trap, and where the radius looks beyond the minimum."""
    problems, notes, radius = list[str](), list[str](), penalty.radius_at(step)
    stable = largest_gamma(sharp, learning_rate=rate, momentum=inertia)
    trap = largest_gamma(flat, learning_rate=rate, momentum=inertia) if flat < 0 else np.inf
    kept = sharpest_stable_curvature(strength, learning_rate=rate, momentum=inertia)
    if strength >= stable > 0:
        notes.append(
            f"gamma {strength:g} leaves minima stable up to curvature {kept:.3g} with learning rate {rate:g}, so training will leave one "
            f"of {sharp:g} for a flatter one; below gamma {stable:.3g} it could stay."
        )
    if strength >= trap:
        problems.append(f"gamma {strength:g} turns curvature {flat:g} into a trap; stay below {trap:.3g}.")
    there = min(sharp, kept)
    if radius is not None and strength > 0 and radius * there > 1:
        notes.append(
            f"epsilon {radius:g} looks {radius * there:.3g} times as far as the minimum of curvature {there:.3g} lies, where a quadratic "
            f"is a rough guide; below {1 / there:.3g} it is a closer one."
        )
    return Advice(tuple(problems), max(0.0, min(stable, trap)), 0.0, stable_curvature=kept, notes=tuple(notes))


def _judged(
    problems: Sequence[str], measured: Sequence[MeasuredCurvature], gamma: float | None, limit: float
) -> tuple[tuple[str, ...], list[str]]:
    """The problems that measurement leaves or adds, and where it and the theory part."""
    kept, partings = list(problems), list[str]()
    for one in measured:
        theory = None if gamma is None else float(regularized_curvature(one.curvature, gamma))
        said = "" if theory is None else f"{theory:.3g} on a quadratic, and "
        seen = f"{one.penalized:.3g} ± {one.error:.1g} as measured with the penalty's own gradient"
        if one.curvature < 0:
            trapped = one.penalized > one.error
            if not trapped and theory is not None and theory > 0:
                kept = [text for text in kept if "into a trap" not in text]
                partings.append(f"curvature {one.curvature:.3g} becomes {said}{seen}: it is no trap here.")
            elif trapped and (theory is None or theory <= 0):
                kept.append(
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
    return tuple(kept), partings


def _checked_optimizer(learning_rate: object, momentum: object) -> tuple[float, float]:
    rate, inertia = checks.positive("learning_rate", learning_rate), checks.non_negative("momentum", momentum)
    if inertia >= 1:
        raise ValueError(f"momentum must be below 1; got {inertia:g}, which forgets nothing. 0.9 is usual.")
    return rate, inertia


def _checked_gamma(gamma: ArrayLike) -> None:
    values = np.asarray(gamma, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"gamma must be finite and >= 0; got {checks.describe(gamma)}. A negative strength rewards large gradients.")


def _fates(negative: NDArray[np.bool_], shrinks: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.where(negative, np.where(shrinks, Fate.TRAPPED, Fate.ESCAPES), np.where(shrinks, Fate.SETTLES, Fate.DIVERGES))
