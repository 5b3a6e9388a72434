"""A radius that sets itself: it grows while the gradient at the perturbed point agrees with the plain one, and shrinks where it does not.

A ``SelfSetRadius`` stands in the place of a radius and holds the rule alone. The radius itself is state: each engine keeps it from step to
step, gives it to ``GradientPenalty.at(step, radius=...)``, measures the step, and asks ``update`` of the rule for the next. A rule is
written once: its arithmetic is that of ``torch`` or of ``jax.numpy``, on scalars that stay on the accelerator, or of Python.
``AutoRadius`` follows the alignment of a step's two gradients; ``gradreg.lets`` has a rule that follows held-out data.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

from gradreg import checks
from gradreg.schedules import Operations, Schedule, Value, inside, register

_MEMORY = 0.9
"""The decay of the share of steps at which the loss rises."""

_FEWEST_RISES = 0.25
"""The share of rising steps below which the radius shrinks: the loss of the perturbed point no longer follows the gradient."""

_LARGEST_NONLINEARITY = 1.0
"""ν above which the radius shrinks: the loss has risen by more than twice what the gradient predicts."""

_NORM_MEMORY = 0.8
"""The decay of the average norm of the plain gradient, so that one batch alone does not count as growth."""

_USUAL_FALLS, _USUAL_RISES = 0.05, 0.02
"""The shares by which the usual norm follows that average down and up in one step, at most."""

_LARGEST_GROWTH = 4.0
"""The average norm, over the usual one, above which the radius is halved: the steps themselves grow."""

_LEAST_OF_START = 0.1
"""The share of ``start`` below which that does not go."""


class RadiusState(NamedTuple):
    """What is carried from step to step, as scalars.

    Args:
        log_radius: the natural logarithm of the radius.
        rising: an average (0.9) of whether the loss rose with the perturbation, 1 at first.
        norm: an average (0.8) of the norm of the plain gradient; 0 before the first measurement.
        usual: what that average usually is: it follows it, by at most 5 % down and 2 % up in a step.
        steps: how many regularized steps have been done.
    """

    log_radius: Any
    rising: Any
    norm: Any
    usual: Any
    steps: Any


class Measurement(NamedTuple):
    """What a step measures, as scalars: of several ranks or micro-batches with perturbations of their own, the means.

    Args:
        plain: ⟨g, g⟩ of the gradient at θ.
        product: ⟨g, G⟩ with G the gradient at the perturbed parameters.
        perturbed: ⟨G, G⟩.
        rise: the loss at the perturbed parameters minus that at θ, with the opposite sign for a step backward. Not finite if it is not.
    """

    plain: Any
    product: Any
    perturbed: Any
    rise: Any


class Guards(NamedTuple):
    """What is known of the loss along a penalty's direction.

    Args:
        rises: whether it rises along it to first order.
        power: where the first-order rise follows from the norm of the gradient, ``radius·‖g‖^power``; else None.
        backward: whether the perturbed gradient is one at θ − δ, which is taken away in the result.
    """

    rises: bool
    power: int | None
    backward: bool = False


@dataclass(frozen=True, kw_only=True)
class SelfSetRadius(Schedule):
    """What the rules of radii that set themselves share.

    Args:
        start: the radius at first, > 0.
        lower: the smallest radius, > 0.
        upper: the largest radius, finite.
        every: regularized steps between two measurements, ≥ 1.
    """

    start: float = 0.05
    lower: float = 1e-4
    upper: float = 10.0
    every: int = 1

    needs_step: ClassVar[bool] = False
    takes_difference: ClassVar[bool] = False
    """Whether it takes what the penalty changes, over the radius, for the derivative with respect to that."""

    def __post_init__(self) -> None:
        for name in ("start", "lower", "upper"):
            object.__setattr__(self, name, checks.positive(name, getattr(self, name), remedy="Leave it out for the default."))
        object.__setattr__(self, "every", checks.whole("every", self.every, minimum=1))
        if not self.lower <= self.start <= self.upper:
            raise ValueError(
                f"start must lie between lower and upper; got {self.start:g} with lower {self.lower:g} and upper {self.upper:g}. "
                "Widen the bounds, or start inside of them."
            )

    def evaluate(self, step: Any, ops: Operations) -> Any:
        radius = getattr(ops, "auto_radius", None)
        if radius is None:
            raise ValueError(
                f"radius must be given where the penalty sets it itself; got {self} and none. It is state of the engine: read "
                "metrics.radius, or ask penalty.at(step, radius=...)."
            )
        return radius

    def bounds(self) -> tuple[float, float]:
        return self.lower, self.upper

    @property
    @abstractmethod
    def initial(self) -> Any:
        """The state before the first step, as Python numbers: a ``NamedTuple`` with ``log_radius`` and ``steps`` among its fields."""

    @abstractmethod
    def update(self, state: Any, measured: Any, guards: Guards, ops: Any, *, scaled: bool = False) -> Any:
        """The state after a regularized step that measured.

        Args:
            state: the state before it.
            measured: what it measured, a ``NamedTuple`` of scalars.
            guards: what can be expected of the loss.
            ops: ``torch``, ``jax.numpy`` or ``NUMBERS``; all numbers but this rule's own are its scalars.
            scaled: whether a gradient scaler is in use, which has its own way with a gradient that is not finite.
        """

    @abstractmethod
    def checked(self, state: Mapping[str, Any]) -> Any:
        """The state with the numbers of a checkpoint, whose keys are the fields of ``initial``.

        Raises:
            ValueError, TypeError: a number that such a state cannot hold.
        """


@register("auto")
@dataclass(frozen=True, kw_only=True)
class AutoRadius(SelfSetRadius):
    """In the place of a radius: let it set itself, by the alignment of the two gradients. ``sam(rho=AutoRadius())``.

    With a = cos(∇L(θ), ∇L(θ + δ)), measured on the step's own batch at no extra pass::

        log radius ← log radius + clip(gain·(a − target) / (1 − target), −gain, gain)

    and kept between ``lower`` and ``upper``. Two guards, which cost nothing, make it shrink by ``gain`` whatever the alignment: the loss
    has risen by more than twice what the gradient predicts (where the direction is the gradient), or at fewer than a quarter of the
    last steps (where it rises along the direction at all). If loss or gradient at the
    perturbed point is not finite, the radius is halved at once, and the step gives the plain gradient. (With a gradient scaler it gives the
    non-finite one, so that the scaler skips the step; only a non-finite loss halves the radius then.)
    The same is done where a step backward, as B-GR's, meets a gradient that is opposed to the plain one (a < 0): it has passed the
    valley, and the opposed gradient, which such a penalty takes away, would lengthen the step by more than the radius shrinks.
    Nor does the alignment see that the optimizer's own steps grow too long: along one direction of high curvature both gradients are
    parallel at any radius, and the longer one may lead beyond the edge of stability. Where the average norm of the plain gradient (of some
    five steps) is four times what it usually is, the radius is halved, down to a tenth of ``start``. What is usual rises by at most 2 % a
    step, so that a gradient which stays larger is usual soon.
    A step with a zero gradient, and one at which the strength is 0, leaves the radius as it is.

    The best fixed radius differs by ten between methods and by five between networks; the alignment there hardly differs (.88 to .95). It
    does not say whether a penalty helps: see ``docs/choosing.md``.

    Args:
        target: the alignment that is aimed at, in (0, 1). Smaller is a larger radius.
        start: the radius at first, > 0.
        lower: the smallest radius, > 0.
        upper: the largest radius, finite.
        gain: the largest change of the logarithm in one step, > 0.
        every: regularized steps between two measurements, ≥ 1. In between, the radius rests, and a non-finite gradient is not replaced.

    Cost: a few sweeps over the gradients, and up to three copies of them, at steps that measure; no gradient evaluation. Under
    ``DistributedDataParallel`` with local scope the gradients of such a step are averaged after its last pass instead of during it.
    Source: none known to us; LETS (arXiv 2408.08222; ``gradreg.LETS``) and LE-SAM (arXiv 2605.10183; ``gradreg.le_sam``) set the radius by
    other signals.

    >>> from gradreg import sam
    >>> str(sam(rho=AutoRadius()))
    'SAM(rho [auto(alignment 0.95)])'
    """

    target: float = 0.95
    gain: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target", "gain"):
            object.__setattr__(self, name, checks.positive(name, getattr(self, name), remedy="Leave it out for the default."))
        if self.target >= 1.0:
            raise ValueError(f"target must be a cosine < 1; got {self.target:g}. Two gradients agree fully only at radius 0: use 0.95.")

    @property
    def initial(self) -> RadiusState:
        """The state before the first step, as Python numbers."""
        return RadiusState(math.log(self.start), 1.0, 0.0, 0.0, 0)

    def checked(self, state: Mapping[str, Any]) -> RadiusState:
        log_radius = checks.real("log_radius", state["log_radius"])
        averages = [checks.non_negative(name, state[name]) for name in ("rising", "norm", "usual")]
        return RadiusState(log_radius, *averages, steps=checks.whole("steps", state["steps"], minimum=0))

    def update(self, state: RadiusState, measured: Measurement, guards: Guards, ops: Any, *, scaled: bool = False) -> RadiusState:
        cosine = self.cosine(measured, ops)
        fell = _MEMORY * state.rising
        rose = fell + (1.0 - _MEMORY)
        rising = ops.where(measured.rise < 0.0, fell, rose) if guards.rises else rose
        change = ops.clip(self.gain * (cosine - self.target) / (1.0 - self.target), -self.gain, self.gain)
        size = ops.sqrt(measured.plain)
        leaves = rising < _FEWEST_RISES
        if guards.power is not None:
            expected = ops.exp(state.log_radius) * (measured.plain if guards.power == 2 else size)
            leaves = leaves | (measured.rise > (1.0 + _LARGEST_NONLINEARITY) * expected)
        change = ops.where(leaves, -self.gain, change)
        if guards.backward:
            change = ops.where(cosine < 0.0, -math.log(2.0), change)
        norm, usual, grows = self._norms(state, size, ops)
        down = ops.clip(math.log(_LEAST_OF_START * self.start) - state.log_radius, -math.log(2.0), 0.0)
        change = ops.where(grows, down, change)
        gradients = ops.isfinite(cosine)
        change = ops.where(gradients, change, -self.gain if scaled else -math.log(2.0))
        change = ops.where(ops.isfinite(measured.rise), change, -math.log(2.0))
        moves = measured.plain > 0.0  # NaN, after a first pass that overflowed, does not
        log_radius = ops.clip(state.log_radius + change, math.log(self.lower), math.log(self.upper))
        known = moves & ops.isfinite(size)
        return RadiusState(
            ops.where(moves, log_radius, state.log_radius),
            ops.where(moves, rising, state.rising),
            ops.where(known, norm, state.norm),
            ops.where(known, usual, state.usual),
            state.steps + 1,
        )

    def _norms(self, state: RadiusState, size: Any, ops: Any) -> tuple[Any, Any, Any]:
        """The average norm of the plain gradient, the usual one, and whether the former has outgrown the latter."""
        seen = state.usual > 0.0
        norm = _NORM_MEMORY * ops.where(seen, state.norm, size) + (1.0 - _NORM_MEMORY) * size
        usual = ops.where(seen, state.usual, size)
        grows = norm > _LARGEST_GROWTH * usual
        return norm, ops.clip(norm, (1.0 - _USUAL_FALLS) * usual, (1.0 + _USUAL_RISES) * usual), grows

    def cosine(self, measured: Measurement, ops: Any) -> Any:
        """The alignment; NaN if a gradient is 0 or not finite."""
        return ops.divide(measured.product, ops.sqrt(measured.plain) * ops.sqrt(measured.perturbed))

    def usable(self, measured: Measurement, guards: Guards, ops: Any) -> Any:
        """Whether what was measured may be part of the result: finite, and for a step backward not opposed to the plain gradient."""
        finite = ops.isfinite(measured.product + measured.perturbed + measured.rise)
        return finite & (measured.product >= 0.0) if guards.backward else finite

    def __str__(self) -> str:
        return f"auto(alignment {self.target:g})"


class _Numbers:
    """What the rule needs of ``torch`` or ``jax.numpy``, for Python's floats."""

    exp = staticmethod(math.exp)
    sqrt = staticmethod(math.sqrt)
    isfinite = staticmethod(math.isfinite)

    @staticmethod
    def divide(a: float, b: float) -> float:
        return a / b if b else math.nan

    @staticmethod
    def where(condition: bool, if_true: float, if_false: float) -> float:
        return if_true if condition else if_false

    @staticmethod
    def clip(value: float, low: float, high: float) -> float:
        return low if value < low else high if value > high else value


NUMBERS = _Numbers()
"""Arithmetic on Python's floats, for ``AutoRadius.update``."""


class _WithRadius:
    def __init__(self, ops: Operations, auto_radius: Any) -> None:
        self._ops = ops
        self.auto_radius = auto_radius

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


def with_radius(ops: Operations, radius: Any) -> Operations:
    """``ops`` that know what a radius that sets itself is worth at this step."""
    return cast("Operations", _WithRadius(ops, radius))


def self_set_radius_in(value: Value | None) -> SelfSetRadius | None:
    """The radius that sets itself that ``value`` is or is a multiple of; None if there is none."""
    if isinstance(value, float) or not isinstance(value, Schedule):  # asking an abstract class takes longer
        return None
    return next((s for s in inside(value) if isinstance(s, SelfSetRadius)), None)
