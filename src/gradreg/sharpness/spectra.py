"""Eigenvalues, trace and spectral density of the Hessian or Gauss-Newton matrix of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.sharpness import lanczos
from gradreg.sharpness.function import LossFunction, Mode
from gradreg.sharpness.products import Curvature, Method, Products, products_of
from gradreg.sharpness.results import Eigenvalues, Spectrum, Trace
from gradreg.torch.closures import Closure


class LossOptions(TypedDict, total=False):
    """What every measurement takes beside the model and its closures.

    Keys:
        parameters: ``(name, parameter) -> bool``: which parameters are the coordinates; all trainable ones by default.
        sizes: the number of samples of each closure: the losses, each a mean over its batch, are averaged with these weights. Without it
            they are added up, as ``GradientRegularizer.backward`` does.
        mode: "train" or "eval" for the time of the measurement; by default the mode that the model is in.
    """

    parameters: Callable[[str, nn.Parameter], bool]
    sizes: Sequence[int] | None
    mode: Mode | None


class CurvatureOptions(LossOptions, total=False):
    """What every measurement of a matrix takes besides.

    Keys:
        curvature: "hessian" (default), or "gauss-newton", for which closures return ``(loss, outputs)``: the scalar loss and the tensor
            that it is computed from. Any loss works that is a twice differentiable function of that tensor (cross-entropy, squared error);
            for one that is convex in it the matrix has no negative eigenvalue. What a loss adds that does not come from the outputs
            (an L2 term) is left out.
        products: "auto" (default): exact where PyTorch can differentiate the model twice, differences of gradients elsewhere (fused
            attention, reentrant checkpointing, FSDP2, compiled models); "exact" or "differences" insist.
        step: of the differences, L2 norm over the measured parameters; chosen by default. A number chooses differences too.
        seed: of the random vectors, which are drawn apart from the global generators.
    """

    curvature: Curvature
    products: Method
    step: float | None
    seed: int


def largest_eigenvalues(
    model: nn.Module, closure: Closure | Sequence[Closure], *, k: int = 1, tolerance: float = 1e-4, **options: Unpack[CurvatureOptions]
) -> Tensor:
    """The k largest eigenvalues of the Hessian (or Gauss-Newton matrix): algebraic, in descending order, ``[k]`` in float64 on the CPU.

    ``eigenvalues`` takes the same arguments and returns their errors, their vectors, and what was done, too.
    """
    found, function = _eigenvalues(model, closure, k, "largest", tolerance, 1000, options)
    function.emit_warnings(2)
    return found.values


def eigenvalues(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    *,
    k: int = 1,
    which: Literal["largest", "smallest"] = "largest",
    tolerance: float = 1e-4,
    limit: int = 1000,
    **options: Unpack[CurvatureOptions],
) -> Eigenvalues:
    """The eigenvalues at one end of the spectrum, by the Lanczos iteration.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised.
        closure: runs a forward pass and returns the scalar loss; or a sequence of closures, which are evaluated one after the other.
        k: how many, ≥ 1.
        which: "largest" (descending) or "smallest" (ascending), by sign and not by size.
        tolerance: for the iteration's error, relative to the largest absolute eigenvalue.
        limit: products with the matrix at most.
        options: see ``CurvatureOptions``.

    Cost: usually 15 to 60 products for k = 1. A product costs two gradients, and one more for every closure where there are several.
    Memory: what the graph of a gradient takes, and the basis: up to a GiB, or 20 vectors of the parameters' size where that is more.

    Raises:
        ValueError: k above the number of coordinates; a loss, gradient or curvature that is not finite; a loss without second derivative.
    """
    found, function = _eigenvalues(model, closure, k, which, tolerance, limit, options)
    function.emit_warnings(2)
    return found


def _eigenvalues(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    k: int,
    which: Literal["largest", "smallest"],
    tolerance: float,
    limit: int,
    options: CurvatureOptions,
) -> tuple[Eigenvalues, LossFunction]:
    checks.whole("k", k, minimum=1)
    checks.choice("which", which, ("largest", "smallest"))
    checks.positive("tolerance", tolerance)
    checks.whole("limit", limit, minimum=1)
    function, curvature, method, step, seed = opened(model, closure, options)
    space = function.space
    if k > space.dimension:
        raise ValueError(f"k must be at most the number of coordinates, {space.dimension}; got {k}. Ask for fewer eigenvalues.")
    sign = 1.0 if which == "largest" else -1.0
    with function.measuring():
        start = space.signs(seed, 0)
        products, first = products_of(function, curvature, method, step, start, sharpen=True)
        found = lanczos.largest(
            space,
            lambda v: products(v).mul_(sign),
            start,
            first=None if first is None else first * sign,
            k=k,
            tolerance=tolerance,
            limit=limit,
            seed=seed,
        )
        errors = found.bounds + _product_errors(products, found, sign)
        products.drop()
        scale = max(abs(found.values[0]), abs(found.values[-1]))
        if not found.converged:
            function.warn(
                f"The iteration has not converged in {found.products} products: an eigenvalue is known to {errors.max():.1g}, and "
                f"{tolerance * scale:.1g} was asked for. Raise limit= or tolerance=."
            )
        asymmetry = None if math.isnan(found.asymmetry) or scale == 0 else found.asymmetry * space.dimension**0.5 / scale
        fields = _fields(function, curvature, products)
        if products.method == "exact":
            fields["product_error"] = asymmetry
        result = Eigenvalues(
            values=torch.from_numpy(found.values * sign),
            errors=torch.from_numpy(errors),
            vectors=tuple(space.whole(v) for v in found.vectors),
            shares=tuple(space.by_parameter(v, v) for v in found.vectors),
            products=found.products,
            converged=found.converged,
            **fields,
        )
    return result, function


def trace(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    *,
    samples: int = 20,
    **options: Unpack[CurvatureOptions],
) -> Trace:
    """The trace, by Hutchinson's estimator: the mean of vᵀHv over vectors v of random signs, with its standard error.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised.
        closure: one or several, as for ``eigenvalues``.
        samples: random vectors, ≥ 1; the standard error falls as 1/√samples and is not known for one.
        options: see ``CurvatureOptions``.

    Cost: one product for each sample.
    """
    checks.whole("samples", samples, minimum=1)
    function, curvature, method, step, seed = opened(model, closure, options)
    space = function.space
    with function.measuring():
        probe = space.signs(seed, 0)
        products, first = products_of(function, curvature, method, step, probe)
        parts: list[dict[str, float]] = []
        for i in range(samples):
            vector = probe if i == 0 else space.signs(seed, i)
            parts.append(space.by_parameter(vector, first if first is not None and i == 0 else products(vector)))
        products.drop()
        table = np.array([list(p.values()) for p in parts])
        sums = table.sum(axis=1)
        result = Trace(
            value=float(sums.mean()),
            standard_error=_standard_error(sums),
            samples=tuple(sums.tolist()),
            by_parameter=dict(zip(parts[0], table.mean(axis=0).tolist(), strict=True)),
            by_parameter_errors=dict(zip(parts[0], (_standard_error(column) for column in table.T), strict=True)),
            **_fields(function, curvature, products),
        )
    function.emit_warnings(2)
    return result


def spectrum(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    *,
    samples: int = 5,
    steps: int = 40,
    **options: Unpack[CurvatureOptions],
) -> Spectrum:
    """The spectral density, by stochastic Lanczos quadrature: see ``Spectrum`` for what can be asked of it.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised.
        closure: one or several, as for ``eigenvalues``.
        samples: random vectors, ≥ 1: more of them for smaller standard errors.
        steps: of the iteration from each, ≥ 2: more of them for finer detail. Moments up to the power 2·steps − 1 have no other error than
            that of the samples.
        options: see ``CurvatureOptions``.

    Cost: samples · steps products. Memory: steps vectors of the parameters' size.

    Source: Ghorbani, Krishnan & Xiao 2019, arXiv 1901.10159.
    """
    checks.whole("samples", samples, minimum=1)
    checks.whole("steps", steps, minimum=2)
    function, curvature, method, step, seed = opened(model, closure, options)
    space = function.space
    with function.measuring():
        probe = space.signs(seed, 0)
        products, first = products_of(function, curvature, method, step, probe)
        found = [
            lanczos.quadrature(space, products, probe if i == 0 else space.signs(seed, i), first=first if i == 0 else None, steps=steps)
            for i in range(samples)
        ]
        products.drop()
        longest = max(len(nodes) for nodes, _ in found)
        result = Spectrum(
            nodes=np.stack([np.pad(nodes, (0, longest - len(nodes)), mode="edge") for nodes, _ in found]),
            weights=np.stack([np.pad(weights, (0, longest - len(weights))) for _, weights in found]),
            **_fields(function, curvature, products),
        )
    function.emit_warnings(2)
    return result


def opened(
    model: nn.Module, closure: Closure | Sequence[Closure], options: CurvatureOptions
) -> tuple[LossFunction, Curvature, Method, float | None, int]:
    """The checked options of a measurement of a matrix."""
    own: dict[str, Any] = dict(options)
    curvature: Curvature = own.pop("curvature", "hessian")
    method: Method = own.pop("products", "auto")
    step, seed = own.pop("step", None), checks.seed(own.pop("seed", 0))
    checks.choice("curvature", curvature, ("hessian", "gauss-newton"))
    checks.choice("products", method, ("auto", "exact", "differences"))
    if step is not None:
        checks.positive("step", step)
        if method == "exact":
            raise ValueError(f"step must be left out with products='exact', which take none; got {step:g}. Use products='differences'.")
    return LossFunction(model, closure, **own), curvature, method, step, seed


def _fields(function: LossFunction, curvature: Curvature, products: Products) -> dict[str, Any]:
    return {
        "method": products.method,
        "mode": function.mode,
        "loss": function.point.loss,
        "gradient_norm": function.point.norm,
        "passes": function.passes.rounded(),
        "notes": tuple(function.notes),
        "curvature": curvature,
        "dimension": function.space.dimension,
        "step": products.step,
        "product_error": products.relative_error,
    }


def _product_errors(products: Products, found: lanczos.Ritz, sign: float) -> np.ndarray:
    """What the products' own error does to each eigenvalue."""
    space = products.function.space
    noise = 0.0 if math.isnan(found.asymmetry) else 2 * found.asymmetry
    if products.method == "exact":
        return np.full(len(found.values), noise)
    errors: list[float] = []
    for value, vector in zip(found.values, found.vectors, strict=True):
        again = space.dot(vector, products(vector)) * sign
        assert products.step is not None
        wider = space.dot(vector, products.with_step(2 * products.step)(vector)) * sign
        errors.append(abs(again - value) + abs(wider - again) / 3 + noise)
    return np.array(errors)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
