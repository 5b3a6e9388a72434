"""LETS: a radius that is learned, by the gradient of the gap between held-out and training loss with respect to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from gradreg import checks
from gradreg.auto_radius import Guards, SelfSetRadius
from gradreg.schedules import register


class LetsState(NamedTuple):
    """What is carried from step to step, as scalars: the moments are those of Adam.

    Args:
        log_radius: the natural logarithm of the radius.
        mean: the exponentially weighted sum of the slopes.
        size: the root of that of their squares, which itself would underflow.
        weight: the weighted sum of 1, by which ``mean`` must be divided while there are few measurements.
        weight_squares: the same for the squares.
        steps: how many regularized steps have been done.
    """

    log_radius: Any
    mean: Any
    size: Any
    weight: Any
    weight_squares: Any
    steps: Any


class Slope(NamedTuple):
    """What a step measures, as a scalar.

    Args:
        slope: the derivative of half the squared gap after the step with respect to log ρ, over the learning rate: see ``LETS.slope``. ∞
            where the regularized gradient is not finite though the others are, NaN where nothing can be told.
    """

    slope: Any


@register("lets")
@dataclass(frozen=True, kw_only=True)
class LETS(SelfSetRadius):
    """In the place of a radius: learn it from held-out data, which ``backward(..., held_out=)`` then needs. ``sam(rho=LETS())``.

    The radius is to make the gap between held-out and training loss small: it follows the negative gradient of ½·(L_h − L)² after the
    step with respect to it. With h, g and G the held-out, the plain and the regularized gradient of the step, θ₊ = θ − lr·G, and
    ∂G/∂ρ ≈ (G − g) / ρ, which a step has without a further pass, the derivative with respect to log ρ is, to first order in lr::

        slope = −lr·(L_h − L)·⟨h − g, G − g⟩

    and log ρ follows it by Adam, which divides by the size of the last slopes, so that neither lr nor the scale of the losses matters::

        log ρ ← log ρ − rate · mean(slope) / √mean(slope²)

    kept between ``lower`` and ``upper``. So while the held-out loss is the larger one, the radius grows where the correction G − g points
    from the gradient of the training loss towards that of the held-out loss. Where the regularized gradient is not finite, and no
    gradient scaler is there to see it, the radius is halved.

    It asks whether the gap closes, not whether the held-out loss falls: a penalty that keeps a network from learning closes it too. What
    it does on our tasks, and what ``AutoRadius`` and ``HeldOut`` do there: ``docs/choosing.md``.

    Args:
        rate: how far log ρ moves in a measurement where all slopes agree, > 0.
        momentum: the decay of the mean of the slopes (β₁ of Adam), in [0, 1).
        memory: that of the mean of their squares (β₂), in [0, 1).
        start: the radius at first, > 0.
        lower: the smallest radius, > 0.
        upper: the largest radius, finite.
        every: regularized steps from one measurement to the next, ≥ 1.

    For penalties whose gradient tends to the plain one with the radius: ``sam``, ``gnp(r=LETS(), alpha=...)``, ``fgr(epsilon=LETS())``,
    ``gsam``, ``asam`` and their like; not with a strength of its own, a mixing that normalizes or clips, ``le_sam``, or a direction that
    needs no gradient. A ``HeldOut`` rule does not go with it. The held-out loss must be the same function as the training loss, on other
    data, and have its scale: what only the training loss has (weight decay in the loss, flooding, mixup) would be part of the gap.

    Cost: 1 / ``every`` of an evaluation of the held-out loss a step (1 in JAX where both sides of a ``cond`` are computed). Memory, at
    steps that measure: four copies of the gradients.
    Source: Wang et al. 2024, arXiv 2408.08222 (LETS).
    Differs from the paper: there losses and gradients are those at θ₊, on the same batch once more, which takes two evaluations at every
    step; here those at θ, where g is known (the difference is of the order of lr). The paper approximates the Hessian in ∂G/∂ρ by a
    diagonal; here it is the finite difference along the perturbation, exact where the loss is quadratic. Here log ρ is learned, which
    keeps ρ > 0 and lets it change by decades.

    >>> from gradreg import sam
    >>> str(sam(rho=LETS()))
    'SAM(rho [lets(rate 0.01)])'
    """

    rate: float = 0.01
    momentum: float = 0.9
    memory: float = 0.999
    every: int = 5

    takes_difference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rate", checks.positive("rate", self.rate, remedy="Use a number for a radius that stays."))
        for name in ("momentum", "memory"):
            object.__setattr__(self, name, checks.fraction(name, getattr(self, name)))

    @property
    def initial(self) -> LetsState:
        """The state before the first step, as Python numbers."""
        return LetsState(math.log(self.start), 0.0, 0.0, 0.0, 0.0, 0)

    def checked(self, state: Mapping[str, Any]) -> LetsState:
        log_radius, mean = (checks.real(name, state[name]) for name in ("log_radius", "mean"))
        sums = [checks.non_negative(name, state[name]) for name in ("size", "weight", "weight_squares")]
        return LetsState(log_radius, mean, *sums, steps=checks.whole("steps", state["steps"], minimum=0))

    @staticmethod
    def slope(held_out_loss: Any, loss: Any, product: Any) -> Any:
        """The derivative that is followed, over the learning rate.

        Args:
            held_out_loss: L_h at θ.
            loss: L at θ, in the same units.
            product: ⟨h − g, G − g⟩.
        """
        return -(held_out_loss - loss) * product

    def update(self, state: LetsState, measured: Slope, guards: Guards, ops: Any, *, scaled: bool = False) -> LetsState:
        known = ops.isfinite(measured.slope)
        slope = ops.where(known, measured.slope, 0.0)
        new = 1.0 - self.momentum, 1.0 - self.memory
        mean = self.momentum * state.mean + new[0] * slope
        weight, weight_squares = self.momentum * state.weight + new[0], self.memory * state.weight_squares + new[1]
        larger = ops.where(slope < 0.0, -slope, slope)
        larger = ops.where(state.size > larger, state.size, larger)
        unit = ops.where(larger > 0.0, larger, 1.0)  # squares are taken in units of the largest number, and do not underflow
        before, now = state.size / unit, slope / unit
        size = unit * ops.sqrt(self.memory * before * before + new[1] * now * now)
        typical = ops.where(size > 0.0, size, 1.0) / ops.sqrt(weight_squares)
        change = ops.where(known, -self.rate * (mean / weight) / typical, 0.0)
        if not scaled:
            change = ops.where(measured.slope == math.inf, -math.log(2.0), change)
        log_radius = ops.clip(state.log_radius + change, math.log(self.lower), math.log(self.upper))
        moments = zip((mean, size, weight, weight_squares), state[1:-1], strict=True)
        return LetsState(log_radius, *(ops.where(known, after, old) for after, old in moments), steps=state.steps + 1)

    def __str__(self) -> str:
        own = {"start": self.start, "every": self.every}
        default = {"start": type(self).start, "every": type(self).every}
        return "".join([f"lets(rate {self.rate:g}", *(f", {k} {v:g}" for k, v in own.items() if v != default[k]), ")"])
