"""The curvature that a step sees under a penalty: measured with the engine's own gradient, not by the theory of quadratics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from torch import Tensor, nn

from gradreg import checks
from gradreg.penalties import GradientPenalty
from gradreg.sharpness.function import LossFunction
from gradreg.sharpness.products import HessianDifferences
from gradreg.sharpness.results import Measurement
from gradreg.sharpness.rises import Direction
from gradreg.sharpness.spectra import LossOptions
from gradreg.torch.closures import Closure
from gradreg.torch.regularizer import GradientRegularizer

_MOVE = 5e-4
"""The move, as a share of the parameters' norm."""


@dataclass(frozen=True, kw_only=True)
class PenalizedCurvature(Measurement):
    """vᵀ(∂G/∂θ)v of the regularized gradient G along a unit vector v.

    Attributes:
        value: with the penalty: h(1 + γh) on a quadratic.
        plain: without: vᵀHv.
        error: of ``value``, from how much it changes with twice the step.
        perturbation: the length of the perturbation at θ.
        gamma: γ for power 2; for power 1 the strength over the gradient's norm at θ, as which it acts there.
    """

    value: float
    plain: float
    error: float
    perturbation: float
    gamma: float


def penalized_curvature(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    penalty: GradientPenalty,
    direction: Direction,
    *,
    at: int = 0,
    move: float | None = None,
    **options: Unpack[LossOptions],
) -> PenalizedCurvature:
    """The curvature along a direction under a penalty: how the regularized gradient changes with a small move.

    On a quadratic it is h(1 + γh) for a power of 2, whatever the radius. On a network the second gradient is taken a whole perturbation
    away, where the curvature is another. A power of 1 (SAM, GNP) is measured with the gradient's norm held: as the power of 2 that has the
    same perturbation and correction at θ, γ = strength/‖g‖.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised. In one process.
        closure: one or several, as for ``eigenvalues``.
        penalty: any; its values are those at ``at``. Memories of parts that have one are empty.
        direction: tensors by parameter name, or in the model's order, such as an eigenvector; of any length but 0.
        at: the optimizer step whose strength and radius are taken, ≥ 0.
        move: how far θ is moved either way, L2 norm, > 0; 5e-4 of the parameters' norm by default. It is long enough to average over the
            kinks of ReLU networks, whose Hessian does not see them.
        options: see ``LossOptions``.

    Cost: four regularized gradients and three plain ones.

    Raises:
        ValueError: a penalty that does not act at that step; a gradient of zero with a power of 1; several processes; no direction.
    """
    checks.whole("at", at, minimum=0)
    if move is not None:
        checks.positive("move", move)
    function = LossFunction(model, closure, **options)
    space = function.space
    if function.parallelism.averages or space.is_sharded:
        raise ValueError(
            "penalized_curvature must run in one process, with whole parameters; got several or shards. Measure on one of them."
        )
    with function.measuring():
        point = function.point
        vector = space.given("direction", direction)
        length = space.norm(vector)
        if length == 0:
            raise ValueError("direction must not be zero; got one of length 0. Pass an eigenvector.")
        unit = vector / length
        held, gamma, radius = _held(penalty, at, point.norm)
        step = _MOVE * (space.norm(space.values()) or 1.0) if move is None else move
        plain = space.dot(unit, HessianDifferences(function, step)(unit))
        regularizer = GradientRegularizer(model, held, parameters=options.get("parameters"))

        def along(size: float) -> float:
            slopes: list[float] = []
            for sign in (1.0, -1.0):
                with function.at(unit, sign * size):
                    function.rewind()
                    regularizer.backward([_scaled(c, w) for c, w in zip(function.closures, function.weights, strict=True)], step=at)
                    slopes.append(space.dot(unit, function.collected()))
            return (slopes[0] - slopes[1]) / (2 * size)

        value, wider = along(step), along(2 * step)
        result = PenalizedCurvature(
            value=value,
            plain=plain,
            error=abs(wider - value),
            perturbation=0.0 if radius is None else radius * point.norm,
            gamma=gamma,
            method="differences",
            mode=function.mode,
            loss=point.loss,
            gradient_norm=point.norm,
            passes=function.passes.rounded(),
            notes=tuple(function.notes),
        )
    function.emit_warnings(2)
    return result


def _held(penalty: GradientPenalty, at: int, norm: float) -> tuple[GradientPenalty, float, float | None]:
    """The penalty with the gradient's norm held, its γ, and its radius in units of the gradient."""
    values = penalty.at(at)
    strength, radius = penalty.strength_at(at), penalty.radius_at(at)
    if strength == 0 or values.acts is False:
        raise ValueError(f"penalty must act at step {at}; got {penalty}, whose strength is 0 there. Take a later step: at=.")
    if penalty.power == 2:
        return penalty, strength, radius
    if norm == 0:
        raise ValueError("the gradient must not be zero for a power of 1, which divides by its norm; got one of length 0.")
    gamma, relative = strength / norm, None if radius is None else radius / norm
    return dataclasses.replace(penalty, power=2, strength=gamma, radius=relative), gamma, relative


def _scaled(closure: Closure, weight: float) -> Callable[[], Tensor]:
    def scaled() -> Tensor:
        returned: Any = closure()
        loss = returned[0] if isinstance(returned, tuple) else returned
        return loss * weight

    return scaled
