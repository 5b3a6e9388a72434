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
from dataclasses import dataclass
from enum import IntEnum

from gradreg import checks
from gradreg.extras import needing

with needing("gradreg.theory.stability", "theory"):
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

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
    rate, inertia = checked_optimizer(learning_rate, momentum)
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
    rate, inertia = checked_optimizer(learning_rate, momentum)
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
    rate, inertia = checked_optimizer(learning_rate, momentum)
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
    rate, inertia = checked_optimizer(learning_rate, momentum)
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
    rate, inertia = checked_optimizer(learning_rate, momentum)
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
    rate, inertia = checked_optimizer(learning_rate, momentum)
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


def checked_optimizer(learning_rate: object, momentum: object) -> tuple[float, float]:
    """η > 0 and 0 ≤ μ < 1, or the error that says so."""
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
