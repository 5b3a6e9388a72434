"""What losses alone say of sharpness: how much the loss rises at a distance, and along lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.sharpness.function import LossFunction
from gradreg.sharpness.results import CriticalSharpness, Rise, Slice
from gradreg.sharpness.space import Space, Vector
from gradreg.sharpness.spectra import LossOptions
from gradreg.torch.closures import Closure
from gradreg.torch.draws import held_rows

Direction: TypeAlias = Mapping[str, Tensor] | Sequence[Tensor]
"""Tensors by parameter name (missing ones are zero), or one for each measured parameter in the model's order."""


def sam_sharpness(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    *,
    rho: float,
    perturb: Literal["all", "each"] = "all",
    **options: Unpack[LossOptions],
) -> Rise:
    """SAM's sharpness: L(θ + ρĝ) − L(θ) with ĝ = ∇L/‖∇L‖.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised.
        closure: one or several, as for ``eigenvalues``.
        rho: the radius, L2 norm over all measured parameters, > 0.
        perturb: "all": one perturbation from the gradient of all closures. "each": every closure gets its own, from its own gradient, and
            its own rise: the m-sharpness of closures of m samples each, averaged with the weights of ``sizes`` (else added up).
        options: see ``LossOptions``.

    Cost: a gradient and a forward pass; with "each" another gradient for several closures.

    Raises:
        ValueError: the gradient is zero, so that there is no direction.

    Source: Foret et al. 2021, arXiv 2010.01412, equation 1 and section 4.
    """
    checks.positive("rho", rho)
    checks.choice("perturb", perturb, ("all", "each"))
    function = LossFunction(model, closure, **options)
    space = function.space
    with function.measuring():
        point = function.point
        shares: dict[str, float] = {}
        if perturb == "all":
            if point.norm == 0:
                raise ValueError(
                    "the gradient must not be zero, because SAM's perturbation has its direction; got one of length 0. Measure along "
                    "random directions: random_sharpness(model, closure, rho=...)."
                )
            unit = point.gradient / point.norm
            with function.at(unit, rho):
                samples = [function.loss() - point.loss]
            weighted, error, first_order = samples, None, rho * point.norm
            shares = space.by_parameter(unit, unit)
        else:
            samples, norms = _rises_of_each(function, rho)
            weighted = [w * s for w, s in zip(function.weights, samples, strict=True)]
            first_order = rho * sum(w * n for w, n in zip(function.weights, norms, strict=True))
            error = _error_of_weighted_sum(function.weights, samples)
        result = Rise(
            value=sum(weighted),
            standard_error=error,
            rho=rho,
            samples=tuple(samples),
            worst=max(samples),
            first_order=first_order,
            shares=shares,
            rounding=_rounding(space, point.loss),
            **_fields(function),
        )
    function.emit_warnings(2)
    return result


def _rises_of_each(function: LossFunction, rho: float) -> tuple[list[float], list[float]]:
    """The rise of each closure along its own gradient, averaged over ranks, and the gradients' norms."""
    rises: list[float] = []
    norms: list[float] = []
    space = function.space
    for i in range(len(function.closures)):
        before, gradient = function.gradient(only=i, averaged=False)
        norm = space.norm(gradient)
        if norm == 0:
            function.warn("A closure's gradient is exactly zero, which gives no direction: its rise counts as 0.")
            rises.append(function.averaged(0.0))
        else:
            with function.at(gradient / norm, rho):
                rises.append(function.averaged(function.loss(only=i, averaged=False) - before))
        norms.append(function.averaged(norm))
    return rises, norms


def random_sharpness(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    *,
    rho: float,
    samples: int = 10,
    seed: int = 0,
    **options: Unpack[LossOptions],
) -> Rise:
    """The rise L(θ + ρu) − L(θ) along random unit vectors u: their mean with its standard error, and the worst.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised.
        closure: one or several, as for ``eigenvalues``.
        rho: the distance, L2 norm over all measured parameters, > 0.
        samples: directions, uniform on the sphere, ≥ 1.
        seed: of the directions, which are drawn apart from the global generators.
        options: see ``LossOptions``.

    To second order the mean is ρ²/2 · trace / dimension. Cost: a gradient, and a forward pass for each sample.
    """
    checks.positive("rho", rho)
    checks.whole("samples", samples, minimum=1)
    checks.seed(seed)
    function = LossFunction(model, closure, **options)
    space = function.space
    with function.measuring():
        point = function.point
        found: list[float] = []
        for i in range(samples):
            direction = space.normal(seed, i)
            with function.at(direction, rho / space.norm(direction)):
                found.append(function.loss() - point.loss)
        result = _rise(function, found, rho, float(np.std(found, ddof=1) / math.sqrt(samples)) if samples > 1 else math.nan)
    function.emit_warnings(2)
    return result


def directional_sharpness(
    model: nn.Module, closure: Closure | Sequence[Closure], *, direction: Direction, rho: float, **options: Unpack[LossOptions]
) -> Rise:
    """The rise L(θ ± ρd̂) − L(θ) along a given direction: ``samples`` are both, ``value`` their mean, in which the slope cancels.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised.
        closure: one or several, as for ``eigenvalues``.
        direction: tensors by parameter name or in the model's order; its length does not matter. An eigenvector of ``eigenvalues``, say.
        rho: the distance, L2 norm over all measured parameters, > 0.
        options: see ``LossOptions``.

    To second order ``value`` is ρ²/2 · d̂ᵀHd̂. Cost: a gradient and two forward passes.
    """
    checks.positive("rho", rho)
    function = LossFunction(model, closure, **options)
    space = function.space
    vector = space.given("direction", direction)
    length = space.norm(vector)
    if not 0 < length < math.inf:
        raise ValueError(f"direction must be finite and not zero; got one of length {length:g}.")
    with function.measuring():
        point = function.point
        with function.around(vector, rho / length) as mirror:
            found = [function.loss() - point.loss]
            mirror()
            found.append(function.loss() - point.loss)
        result = _rise(function, found, rho, None, shares=space.by_parameter(vector / length, vector / length))
    function.emit_warnings(2)
    return result


def critical_sharpness(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    update: Direction | None = None,
    *,
    start: float | None = None,
    tolerance: float = 0.05,
    limit: int = 40,
    **options: Unpack[LossOptions],
) -> CriticalSharpness:
    """2/η_c, where η_c is the smallest found learning rate at which a step of η·update raises the loss above that at the start.

    On a quadratic it is uᵀHu / −⟨∇L, u⟩ for the update u: with u = −∇L the curvature along the gradient.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised.
        closure: one or several, as for ``eigenvalues``.
        update: what the optimizer adds to the parameters at a learning rate of 1 (for SGD minus the gradient, which is the default; for
            Adam −m̂/(√v̂ + ε)): tensors by parameter name or in the model's order.
        start: the learning rate to begin at: that of the training, or the η_c of an earlier measurement, which saves passes.
        tolerance: the relative width of the final bracket, > 0.
        limit: forward passes at most.
        options: see ``LossOptions``.

    Cost: a gradient, and usually 5 or 6 forward passes. Loss along the update may rise and fall again: between the learning rates that are
    tried, each two to ten times the last until it rises, a smaller η_c can be missed.

    Raises:
        ValueError: the update does not descend to first order; or the loss did not rise, or not fall, at any learning rate tried.

    Source: Kalra et al. 2026, arXiv 2601.16979, section 2.

    Differs from the paper: the bracket is narrowed by the secant of (L(η) − L(0))/η, which is straight for a quadratic, not by bisection.
    """
    checks.positive("tolerance", tolerance)
    checks.whole("limit", limit, minimum=2)
    if start is not None:
        checks.positive("start", start)
    function = LossFunction(model, closure, **options)
    space = function.space
    given = None if update is None else space.given("update", update)
    with function.measuring():
        point = function.point
        direction = point.gradient.neg() if given is None else given
        length = space.norm(direction)
        slope = space.dot(point.gradient, direction)
        if not 0 < length < math.inf:
            raise ValueError(f"update must be finite and not zero; got one of length {length:g}, with a gradient of length {point.norm:g}.")
        if slope >= 0:
            raise ValueError(
                f"update must decrease the loss to first order; got one with ⟨gradient, update⟩ = {slope:.3g}. Pass what is added to the "
                "parameters: minus the gradient, not the gradient."
            )
        search = _LineSearch(slope, start if start is not None else 0.1 * (space.norm(space.values()) or 1.0) / length, tolerance)
        for _ in range(limit):
            with function.at(direction, search.next):
                search.tell(function.loss() - point.loss)
            if search.done:
                break
        low, high = search.low, search.high
        if math.isinf(high):
            raise ValueError(
                f"the loss must rise somewhere along the update; got none up to a learning rate of {low:.3g} in {limit} forward passes. "
                "The loss falls without bound there, as that of separable data does; raise limit= to look further."
            )
        if low == 0:
            raise ValueError(
                f"the loss must fall somewhere along the update; got a rise even at a learning rate of {high:.3g}, in {limit} forward "
                "passes. Rounding of the loss hides the descent: measure in float64, or away from a stationary point."
            )
        rate = search.estimate
        result = CriticalSharpness(value=2 / rate, learning_rate=rate, bracket=(low, high), **_fields(function))
    function.emit_warnings(2)
    return result


class _LineSearch:
    """A search for the root of f(η) = (L(η) − L(0))/η, of which f(0) is the slope.

    Args:
        slope: < 0.
        start: the first learning rate.
        tolerance: relative width of the bracket at the end.
    """

    def __init__(self, slope: float, start: float, tolerance: float) -> None:
        self.low, self.high = 0.0, math.inf
        self._slope = self._low_value = slope
        self._high_value = math.inf
        self._tolerance = tolerance
        self._tried = 0
        self.next = start

    @property
    def done(self) -> bool:
        return self.low > 0 and self.high <= self.low * (1 + self._tolerance) * (1 + 1e-9)  # as both are products of such factors

    @property
    def estimate(self) -> float:
        """The root of the secant through the ends of the bracket."""
        if not math.isfinite(self._high_value):
            return (self.low * self.high) ** 0.5
        return self.low + (self.high - self.low) * self._low_value / (self._low_value - self._high_value)

    def tell(self, rise: float) -> None:
        """Take the rise of the loss at ``next``, and choose the next learning rate."""
        value = rise / self.next
        if rise > 0 or math.isnan(rise):
            self.high, self._high_value = self.next, math.inf if math.isnan(value) else value
        else:
            self.low, self._low_value = self.next, value
        self.next = self._following()

    def _following(self) -> float:
        if math.isinf(self.high):  # where the secant from 0 crosses, but at least twice and at most ten times as far
            bend = self._low_value - self._slope
            root = -self._slope * self.low / bend if bend > 0 else math.inf
            return min(max(root * (1 + 0.4 * self._tolerance), 2 * self.low), 10 * self.low)
        if self.low == 0 and not math.isfinite(self._high_value):
            return self.high / 10
        root = self.estimate
        if self.low == 0:
            return min(max(root, self.high / 100), self.high / (1 + self._tolerance))
        self._tried += 1
        wide = 1 + self._tolerance
        if self._tried % 3 == 0:  # whatever the shape of the loss, the bracket halves
            return (self.low * self.high) ** 0.5
        if self.high <= root * wide:  # the root is near one end: try the point that would close the bracket from the other side
            wanted = self.high / wide
        elif self.low * wide >= root:
            wanted = self.low * wide
        else:
            wanted = root
        return wanted if self.low < wanted < self.high else (self.low * self.high) ** 0.5


def slice_1d(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    *,
    direction: Direction | None = None,
    normalization: Literal["filter", "parameter", "none"] = "filter",
    extent: float = 1.0,
    points: int = 21,
    seed: int = 0,
    **options: Unpack[LossOptions],
) -> Slice:
    """The loss at θ + t·d for evenly spaced t.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised.
        closure: one or several, as for ``eigenvalues``.
        direction: d before it is scaled, as tensors by parameter name or in the model's order; random numbers by default.
        normalization: "filter": each filter (row of the first dimension) of d gets the length of the parameters' own, and parameters of
            fewer than two dimensions (biases, scales of norms) are not changed, so that slices of networks whose weights differ in scale
            can be compared; "parameter": each tensor does; "none".
        extent: t runs from −extent to extent, > 0.
        points: how many, ≥ 3; an odd number includes t = 0.
        seed: of the random direction, which is drawn apart from the global generators.
        options: see ``LossOptions``.

    Cost: a gradient, and a forward pass for each point.

    Source: Li et al. 2018, arXiv 1712.09913, section 4.
    """
    checks.positive("extent", extent)
    checks.whole("points", points, minimum=3)
    checks.seed(seed)
    checks.choice("normalization", normalization, ("filter", "parameter", "none"))
    function = LossFunction(model, closure, **options)
    space = function.space
    with function.measuring():
        positions = np.linspace(-extent, extent, points)
        losses: list[float] = []
        point = function.point
        vector = space.normal(seed, 0) if direction is None else space.given("direction", direction)
        vector = vector if normalization == "none" else _normalized(space, vector, normalization)
        length = space.norm(vector)
        if not 0 < length < math.inf:
            raise ValueError(
                f"direction must be finite and not zero after normalization {normalization!r}; got one of length {length:g}. Use "
                "normalization='parameter' or 'none' where only biases and scales are measured."
            )
        for t in positions:
            if t == 0:
                losses.append(point.loss)
                continue
            with function.at(vector, float(t)):
                losses.append(function.loss())
        result = Slice(positions=positions, losses=np.array(losses), length=length, normalization=normalization, **_fields(function))
    function.emit_warnings(2)
    return result


def _normalized(space: Space, vector: Vector, normalization: str) -> Vector:
    """The vector with the lengths of the parameters, filter by filter or tensor by tensor."""
    scaled: list[Tensor | None] = []
    values = space.split(space.values())
    for p, v, own in zip(space.parameters, space.split(vector), values, strict=True):
        rows = held_rows(p)
        whole = tuple(own.shape[1:]) == tuple(p.shape[1:]) and len(rows.shape) == p.dim()
        if not whole or (normalization == "parameter" and own.numel() != p.numel()):
            raise ValueError(
                f"normalization={normalization!r} needs every filter whole on one rank; got a parameter of shape {tuple(p.shape)} sharded "
                "otherwise. Use normalization='filter' under FSDP2, which shards by rows, or 'none'."
            )
        if normalization == "filter" and p.dim() < 2:
            scaled.append(None)
            continue
        flat, held = (t.reshape(len(t), -1) if normalization == "filter" else t.reshape(1, -1) for t in (v, own))
        lengths = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        factor = torch.linalg.vector_norm(held, dim=1, keepdim=True) / lengths.clamp_min(torch.finfo(flat.dtype).tiny)
        scaled.append((flat * factor).reshape(v.shape))
    return space.flatten(scaled)


def _rise(function: LossFunction, found: list[float], rho: float, error: float | None, shares: Mapping[str, float] | None = None) -> Rise:
    return Rise(
        value=float(np.mean(found)),
        standard_error=error,
        rho=rho,
        samples=tuple(found),
        worst=max(found),
        first_order=math.nan,
        shares=shares or {},
        rounding=_rounding(function.space, function.point.loss),
        **_fields(function),
    )


def _fields(function: LossFunction) -> dict[str, Any]:
    return {
        "method": "losses",
        "mode": function.mode,
        "loss": function.point.loss,
        "gradient_norm": function.point.norm,
        "passes": function.passes.rounded(),
        "notes": tuple(function.notes),
    }


def _rounding(space: Space, loss: float) -> float:
    """A few spacings of the numbers around the loss, in float32 or better, which losses are computed in."""
    return 4 * abs(loss) * float(torch.finfo(space.dtype).eps)


def _error_of_weighted_sum(weights: Sequence[float], samples: Sequence[float]) -> float:
    """The standard error of Σ w·s if the samples are independent draws."""
    if len(samples) < 2:
        return math.nan
    return float(np.std(samples, ddof=1)) * math.sqrt(sum(w * w for w in weights))
