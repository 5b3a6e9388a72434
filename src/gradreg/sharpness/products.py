"""Products of curvature matrices with vectors: exactly where the model can be differentiated twice, else by differences.

- Hessian, exact: H·v is the gradient of ⟨∇L, v⟩ (double backward).
- Hessian, differences: H·v ≈ (∇L(θ + hv) − ∇L(θ − hv)) / 2h, two gradients, for unit v.
- Gauss-Newton, exact: G·v = Jᵀ·(∂²L/∂o²)·J·v with the Jacobian J of the outputs o; J·v by double backward through a linear function.
- Gauss-Newton, differences: J·v ≈ (o(θ + hv) − o(θ − hv)) / 2h, two forward passes; the rest from one pass at θ.

The step of a difference is chosen, and its error estimated, by ``gradreg.sharpness.ladder``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from gradreg import checks
from gradreg.sharpness.function import LossFunction
from gradreg.sharpness.ladder import RATIO, UNSETTLED, Ladder
from gradreg.sharpness.space import Vector

Curvature: TypeAlias = Literal["hessian", "gauss-newton"]
Method: TypeAlias = Literal["auto", "exact", "differences"]


class NoSecondDerivative(RuntimeError):
    """PyTorch cannot differentiate this model twice."""


class Products(Protocol):
    """Multiplies vectors with a curvature matrix."""

    function: LossFunction

    @property
    def method(self) -> str: ...
    @property
    def step(self) -> float | None: ...
    @property
    def relative_error(self) -> float | None: ...
    @property
    def error(self) -> float:
        """The estimated length of the error of the product with a unit vector."""
        ...

    def __call__(self, vector: Vector) -> Vector: ...
    def calibrate(self, direction: Vector) -> None:
        """Choose the step of differences for vectors like ``direction``, and estimate their error; nothing to do where exact."""
        ...

    def with_step(self, step: float) -> Products:
        """The same products with another step."""
        ...

    def drop(self) -> None:
        """Drop what is held between products; nothing that is held may be used after the parameters changed."""
        ...


def products_of(
    function: LossFunction, curvature: Curvature, method: Method, step: float | None, probe: Vector, *, sharpen: bool = False
) -> tuple[Products, Vector | None]:
    """The products that are asked for, tried on ``probe``; "auto" takes exact ones where the model allows them.

    To be called inside of ``function.measuring()``.

    Args:
        function: the loss.
        curvature: which matrix.
        method: which way.
        step: of differences; None chooses one, and with it "auto" takes exact products where it can.
        probe: a random vector like those to come.
        sharpen: choose the step of differences for the product of ``probe`` instead, which lies along large eigenvalues.

    Returns:
        The products, and that of ``probe`` where it is known already.

    Raises:
        RuntimeError: "exact" for a model that cannot be differentiated twice.
        ValueError: a loss without a second derivative.
    """
    exact, differences = {"hessian": (ExactHessian, HessianDifferences), "gauss-newton": (ExactGaussNewton, GaussNewtonDifferences)}[
        curvature
    ]
    if method != "differences" and (method == "exact" or step is None):
        try:
            found = exact(function)
            found.check()
            product = found(probe)
            _check_curved(function, product)
            return found, product
        except NoSecondDerivative as error:
            if method == "exact":
                raise RuntimeError(f"products='exact' {error}. Use products='differences', or leave it out.") from error
            function.notes.append(f"Products are differences of gradients, because exact ones {error}.")
    found = differences(function, step)
    if sharpen:
        sharp = found.rough(probe)
        _check_curved(function, sharp)
        found.calibrate(sharp if function.space.norm(sharp) > 0 else probe)
    else:
        found.calibrate(probe)
    return found, None


def _check_curved(function: LossFunction, product: Vector) -> None:
    largest = function.space.largest(product)
    if largest == 0 and function.point.norm > 0:
        raise ValueError(_PIECEWISE_LINEAR)
    if not math.isfinite(largest):
        raise ValueError(
            "curvature must be finite; got a product of the curvature matrix with NaN or infinity in it, where loss and gradient are "
            "finite. A square root, norm or power at 0 has no second derivative: add a small number inside of it, or "
            "use products='differences'."
        )


class _Exact(ABC):
    """What exact products share: they may keep the graph of a single closure, which costs no more memory than making it."""

    method = "exact"
    step = None
    relative_error: float | None = None
    error: float = 0.0

    def __init__(self, function: LossFunction) -> None:
        self.function = function
        self._kept: Any = None

    def calibrate(self, direction: Vector) -> None:  # noqa: B027  # differences have a step to choose
        """Nothing to choose."""

    def with_step(self, step: float) -> Products:
        return self

    def drop(self) -> None:
        self._kept = None

    def check(self) -> None:
        """Raise where the kind of parameters rules exact products out."""
        if self.function.space.is_sharded:
            raise NoSecondDerivative("need whole parameters, because the graph of a backward pass does not reach shards")

    def __call__(self, vector: Vector) -> Vector:
        vectors = self.function.space.split(vector)
        space, count = self.function.space, len(self.function.closures)
        # By the number of the closure, because the first sweep of a measurement may be repeated.
        parts: dict[int, list[Tensor | None]] = {}
        self.function.point  # noqa: B018  # which finds out what forward passes write, and which parameters they reach
        with _explaining():
            if count == 1:
                if self._kept is None:
                    self.function.sweep(self._keep)
                parts[0] = self._product(0, self._kept, vectors, last=False)
            else:

                def multiply(i: int, loss: Tensor, outputs: Any) -> None:
                    parts[i] = self._product(i, self._graph(loss, outputs), vectors, last=True)

                self.function.sweep(multiply)
        total = space.zeros()
        for i, part in parts.items():
            total.add_(space.flatten(part), alpha=self.function.weights[i])
        return self.function.mean(total)

    def _keep(self, i: int, loss: Tensor, outputs: Any) -> None:
        self._kept = self._graph(loss, outputs)

    @abstractmethod
    def _graph(self, loss: Tensor, outputs: Any) -> Any: ...

    @abstractmethod
    def _product(self, i: int, graph: Any, vectors: list[Tensor], *, last: bool) -> list[Tensor | None]: ...

    def _reached(self, gradients: tuple[Tensor | None, ...]) -> None:
        missing = [p for p, g in zip(self.function.space.parameters, gradients, strict=True) if g is None]
        if len(self.function.closures) == 1 and any(p in self.function.point.reached for p in missing):
            raise NoSecondDerivative(_ONLY_BACKWARD)


class ExactHessian(_Exact):
    """By double backward."""

    def _graph(self, loss: Tensor, outputs: Any) -> Any:
        gradients = torch.autograd.grad(loss, self.function.space.parameters, create_graph=True, allow_unused=True)
        self.function.passes.backward += self.function.share
        self._reached(gradients)
        return gradients

    def _product(self, i: int, graph: Any, vectors: list[Tensor], *, last: bool) -> list[Tensor | None]:
        pairs = [(g, v.to(g.dtype)) for g, v in zip(graph, vectors, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            raise ValueError(_PIECEWISE_LINEAR)
        found = torch.autograd.grad(
            [g for g, _ in pairs],
            self.function.space.parameters,
            [v for _, v in pairs],
            retain_graph=not last,
            allow_unused=True,
        )
        self.function.passes.double += self.function.share
        return list(found)


class ExactGaussNewton(_Exact):
    """By a double backward through the outputs' Jacobian, which is linear in what it multiplies."""

    def _graph(self, loss: Tensor, outputs: Any) -> Any:
        outputs = checked_outputs(outputs)
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, self.function.space.parameters, dummy, create_graph=True, allow_unused=True)
        self.function.passes.backward += self.function.share
        self._reached(pulled)
        return outputs, dummy, pulled, slope_of(loss, outputs)

    def _product(self, i: int, graph: Any, vectors: list[Tensor], *, last: bool) -> list[Tensor | None]:
        outputs, dummy, pulled, slope = graph
        pairs = [(g, v.to(g.dtype)) for g, v in zip(pulled, vectors, strict=True) if g is not None and g.requires_grad]
        (pushed,) = torch.autograd.grad([g for g, _ in pairs], [dummy], [v for _, v in pairs], retain_graph=True)
        self.function.passes.double += self.function.share
        curved = curved_by(slope, outputs, pushed)
        found = torch.autograd.grad(outputs, self.function.space.parameters, curved, retain_graph=not last, allow_unused=True)
        self.function.passes.backward += self.function.share
        return list(found)


class _Differences(ABC):
    """What differences share: the step, and its calibration."""

    method = "differences"

    def __init__(self, function: LossFunction, step: float | None) -> None:
        self.function = function
        self.step: float | None = step
        self.relative_error: float | None = None
        self.error: float = 0.0
        self._fixed = step is not None

    def with_step(self, step: float) -> Products:
        return type(self)(self.function, step)

    def drop(self) -> None:  # noqa: B027  # exact products hold a graph
        """Nothing is held."""

    def rough(self, vector: Vector) -> Vector:
        """A product before the step is calibrated."""
        length = self.function.space.norm(vector)
        return self._checked(self._difference(vector / length, self._first_step()).mul_(length), self._first_step())

    def _first_step(self) -> float:
        """A guess: where truncation and rounding balance if all derivatives were of one size."""
        space = self.function.space
        return self.step or max(space.precision ** (1 / 3), 1e-6) * (space.norm(space.values()) or 1.0) / 10

    def __call__(self, vector: Vector) -> Vector:
        length = self.function.space.norm(vector)
        if length == 0:
            return self.function.space.zeros()
        if self.step is None:
            self.calibrate(vector)
        assert self.step is not None
        return self._checked(self._difference(vector / length, self.step).mul_(length), self.step)

    @abstractmethod
    def _difference(self, unit: Vector, step: float) -> Vector: ...

    def _checked(self, product: Vector, step: float) -> Vector:
        if not math.isfinite(self.function.space.largest(product)):
            raise ValueError(
                f"curvature must be finite; got NaN or infinity {step:.2g} away from the parameters. The loss is not defined all "
                "around them: pass a smaller step=, or measure in float32 or float64."
            )
        return product

    def calibrate(self, direction: Vector) -> None:
        space, unit = self.function.space, direction / self.function.space.norm(direction)
        size = space.norm(space.values()) or 1.0
        if self._fixed:
            assert self.step is not None
            steps = [self.step * RATIO**0.5, self.step / RATIO**0.5]
            first, second = (self._difference(unit, h) for h in steps)
            length, apart = space.norm(second), space.norm(first - second)
            self.error = apart / 2  # both parts at once; a single pair does not tell them apart
            self._judge(length)
            return
        ladder = Ladder(lambda h: self._difference(unit, h), space.norm, self._first_step(), limit=size)
        ladder.climb()
        a, b = ladder.parts()
        self.step = ladder.best(a, b)
        self.error = math.hypot(a * self.step**2, b / self.step)
        self._judge(ladder.length)

    def _judge(self, length: float) -> None:
        """Set the relative error, and say where differences mean nothing."""
        if not math.isfinite(self.error):
            raise ValueError(
                "curvature must be finite; got gradients around the parameters that are NaN or infinite at every step tried. The loss is "
                "not defined all around them: pass a smaller step=, or measure in float32 or float64."
            )
        if length == 0:
            if self.function.point.norm > 0:
                raise ValueError(_PIECEWISE_LINEAR)
            self.relative_error = None  # of a product that is exactly zero
            return
        self.relative_error = self.error / length
        if self.relative_error > UNSETTLED:
            text = (
                f"Differences do not settle as their step changes (relative error {self.relative_error:.1g} at {self.step:.2g}): the loss "
                "may have no second derivative here (kinks of a piecewise linear loss), be random, or its gradient be too coarse (16 "
                "bits). sam_sharpness and critical_sharpness need none."
            )
            self.function.warn(text)


class HessianDifferences(_Differences):
    """Central differences of gradients."""

    def _difference(self, unit: Vector, step: float) -> Vector:
        function = self.function
        function.point  # noqa: B018  # whose checks say more than a NaN would
        with function.around(unit, step) as mirror:
            _, ahead = function.gradient()
            mirror()
            _, behind = function.gradient()
        return ahead.sub_(behind).div_(2 * step)


class GaussNewtonDifferences(_Differences):
    """Central differences of outputs, and one gradient at θ."""

    def _difference(self, unit: Vector, step: float) -> Vector:
        function = self.function
        function.point  # noqa: B018
        pushed: dict[int, Tensor] = {}
        ahead: dict[int, Tensor] = {}

        def look_ahead(i: int, _: Tensor, outputs: Any) -> None:
            ahead[i] = checked_outputs(outputs).detach().clone()

        def look_behind(i: int, _: Tensor, outputs: Any) -> None:
            pushed[i] = (ahead[i] - outputs.detach()) / (2 * step)

        def pull(i: int, loss: Tensor, outputs: Any) -> None:
            curved = curved_by(slope_of(loss, outputs), outputs, pushed[i])
            torch.autograd.backward(outputs, curved * function.weights[i])
            function.passes.backward += function.share

        with function.around(unit, step) as mirror:
            function.sweep(look_ahead)
            mirror()
            function.sweep(look_behind)
        function.sweep(pull)
        return function.collected()


def checked_outputs(outputs: Any) -> Tensor:
    """The outputs that a closure returned beside the loss."""
    if not isinstance(outputs, Tensor) or not outputs.requires_grad:
        raise ValueError(
            "closure must return (loss, outputs) for Gauss-Newton: the scalar loss and the tensor, not detached, that it was computed "
            f"from; got {checks.describe(type(outputs).__name__ if outputs is not None else None)} for the outputs. Write: "
            "outputs = model(x); return criterion(outputs, y), outputs."
        )
    return outputs


def slope_of(loss: Tensor, outputs: Tensor) -> Tensor:
    """∂L/∂o, with its graph."""
    (slope,) = torch.autograd.grad(loss, [outputs], create_graph=True, allow_unused=True)
    if slope is None:
        raise ValueError(
            "closure must compute its loss from the outputs that it returns; got outputs that the loss does not depend on. Return the "
            "tensor that the criterion receives: outputs = model(x); return criterion(outputs, y), outputs."
        )
    if not slope.requires_grad:
        raise ValueError(
            "the loss must have a second derivative with respect to the outputs for Gauss-Newton; got one that is linear in them wherever "
            "it is smooth (an absolute or hinge loss). Use a smooth loss (cross-entropy, squared error, Huber), or curvature='hessian'."
        )
    return slope


def curved_by(slope: Tensor, outputs: Tensor, pushed: Tensor) -> Tensor:
    """(∂²L/∂o²)·pushed."""
    (curved,) = torch.autograd.grad(slope, [outputs], pushed.to(slope.dtype), retain_graph=True)
    return curved


_ONLY_BACKWARD = (
    "need the gradient as a function of every parameter, and some are reached by loss.backward() alone, as inside torch.utils.checkpoint "
    "with use_reentrant=True"
)
_PIECEWISE_LINEAR = (
    "the loss has no second derivative to measure; its gradient does not change with the parameters (it is linear, or piecewise linear "
    "with curvature only in its kinks). Use sam_sharpness or critical_sharpness, which compare losses at a distance."
)


@contextmanager
def _explaining():
    """Turn what PyTorch says of models that cannot be differentiated twice into ``NoSecondDerivative``."""
    try:
        yield
    except NoSecondDerivative:
        raise
    except RuntimeError as error:
        text = str(error)
        if any(words in text for words in ("derivative for", "double backward", "differentiate twice", "use_reentrant", "Double backward")):
            reason = text.splitlines()[0].rstrip(".")
            raise NoSecondDerivative(f"need a model that PyTorch can differentiate twice, and it says: {reason}") from error
        raise
