"""What measurements return: numbers with their errors, and how they were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Passes:
    """Passes over all closures together.

    Attributes:
        forward: forward passes.
        backward: backward passes.
        double: backward passes through a backward pass.
    """

    forward: float = 0.0
    backward: float = 0.0
    double: float = 0.0

    @property
    def gradients(self) -> float:
        """The cost in gradient evaluations: a forward pass is a third of one, a backward pass two thirds, a double backward pass two."""
        return self.forward / 3 + 2 * self.backward / 3 + 2 * self.double

    def rounded(self) -> Passes:
        """A copy, in which sums of shares are whole again."""
        return Passes(*(round(n) if abs(n - round(n)) < 1e-9 else n for n in (self.forward, self.backward, self.double)))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What all results say.

    Attributes:
        method: how curvature was found: "exact" (double backward) or "differences" (of gradients, or of outputs for Gauss-Newton);
            "losses" where only losses were compared.
        mode: "train", "eval" or "mixed": the mode of the model during the measurement.
        loss: the loss at the parameters as they are.
        gradient_norm: the L2 norm of its gradient; NaN where it was not needed.
        passes: what the measurement cost.
        notes: what a reader of the numbers must know, one sentence each.
    """

    method: str
    mode: str
    loss: float
    gradient_norm: float
    passes: Passes
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CurvatureMeasurement(Measurement):
    """Of a curvature matrix.

    Attributes:
        curvature: "hessian" or "gauss-newton".
        dimension: rows of the matrix: the number of measured parameters' elements.
        step: length of the differences' step, in the units of the parameters; None for exact products.
        product_error: the estimated error of a product relative to its length, where it was calibrated; for exact products what the
            computed matrix lacks in symmetry, or None where nothing tells.
    """

    curvature: str
    dimension: int
    step: float | None
    product_error: float | None


@dataclass(frozen=True, kw_only=True)
class Eigenvalues(CurvatureMeasurement):
    """Eigenvalues at one end of the spectrum.

    Attributes:
        values: ``[k]``, float64: algebraic, those at the asked end first (descending for "largest").
        errors: ``[k]``: the estimated error of each, from what the iteration has left and from the error of the products.
        vectors: unit eigenvectors, each as tensors by parameter name.
        shares: for each eigenvalue, the share of its vector's squared length that each parameter holds; sums to 1.
        products: products with the matrix.
        converged: whether every error of the iteration is within the tolerance.
    """

    values: Any
    errors: Any
    vectors: tuple[Mapping[str, Any], ...] = field(repr=False)
    shares: tuple[Mapping[str, float], ...] = field(repr=False)
    products: int
    converged: bool


@dataclass(frozen=True, kw_only=True)
class Trace(CurvatureMeasurement):
    """The trace, by Hutchinson's estimator.

    Attributes:
        value: the mean over random vectors v of vᵀHv.
        standard_error: of that mean; NaN for a single vector.
        samples: the vᵀHv.
        by_parameter: the part of each parameter (the trace of its diagonal block).
        by_parameter_errors: their standard errors.
    """

    value: float
    standard_error: float
    samples: tuple[float, ...] = field(repr=False)
    by_parameter: Mapping[str, float] = field(repr=False)
    by_parameter_errors: Mapping[str, float] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Spectrum(CurvatureMeasurement):
    """The spectral density, as points and weights of stochastic Lanczos quadrature.

    Attributes:
        nodes: ``[samples, steps]``: points on the axis of eigenvalues.
        weights: ``[samples, steps]``: the share of all eigenvalues that each stands for; each sample's sum to 1.
    """

    nodes: NDArray[np.float64] = field(repr=False)
    weights: NDArray[np.float64] = field(repr=False)

    @property
    def largest(self) -> float:
        """The largest point, an estimate from below of the largest eigenvalue."""
        return float(self.nodes[self.weights > 0].max())

    @property
    def smallest(self) -> float:
        """The smallest point."""
        return float(self.nodes[self.weights > 0].min())

    def grid(self, points: int = 400, *, width: float | None = None) -> NDArray[np.float64]:
        """Positions that cover the spectrum and four widths beyond it."""
        margin = 4 * (self.default_width if width is None else width)
        return np.linspace(self.smallest - margin, self.largest + margin, points)

    @property
    def default_width(self) -> float:
        """A hundredth of the range between smallest and largest."""
        return max((self.largest - self.smallest) / 100, 1e-12 * max(1.0, abs(self.largest)))

    def density(self, at: NDArray[np.float64], *, width: float | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The density of eigenvalues, smoothed by a Gaussian, and its standard error.

        Args:
            at: positions.
            width: standard deviation of the Gaussian; a hundredth of the range by default. What is finer than it cannot be seen.
        """
        sigma = self.default_width if width is None else width
        z = (np.asarray(at, dtype=np.float64)[:, None, None] - self.nodes) / sigma
        each = (self.weights * np.exp(-0.5 * z * z)).sum(axis=-1) / (sigma * np.sqrt(2 * np.pi))
        return _mean_and_error(each)

    def moment(self, power: int) -> tuple[float, float]:
        """The mean of eigenvalue^power over the spectrum, and its standard error: ``dimension * moment(1)`` is the trace."""
        mean, error = _mean_and_error((self.weights * self.nodes**power).sum(axis=-1)[None, :])
        return float(mean[0]), float(error[0])

    def share_below(self, bound: float) -> tuple[float, float]:
        """The share of eigenvalues below ``bound``, and its standard error (``share_below(0)``: negative curvature)."""
        mean, error = _mean_and_error((self.weights * (self.nodes < bound)).sum(axis=-1)[None, :])
        return float(mean[0]), float(error[0])


def _mean_and_error(each: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Over the last axis, of samples; the error of a single sample is not known."""
    count = each.shape[-1]
    error = each.std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else np.full(each.shape[:-1], np.nan)
    return each.mean(axis=-1), error


@dataclass(frozen=True, kw_only=True)
class Rise(Measurement):
    """How much the loss rises at a distance.

    Attributes:
        value: the rise L(θ + ρd) − L(θ): for SAM-sharpness along the gradient; the mean over random or over each closure's own directions.
        standard_error: of that mean; None where nothing was drawn.
        rounding: the rise that rounding of the loss alone may feign.
        rho: the distance, L2 norm over the measured parameters.
        samples: the rises that ``value`` is the mean of.
        worst: the largest of them.
        first_order: ρ‖g‖, the rise of a loss without curvature; NaN along directions other than the gradient.
        shares: the share of the perturbation's squared length that each parameter holds; empty where directions differ.
    """

    value: float
    standard_error: float | None
    rounding: float
    rho: float
    samples: tuple[float, ...] = field(repr=False)
    worst: float
    first_order: float
    shares: Mapping[str, float] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class CriticalSharpness(Measurement):
    """Where the loss along an update rises above its value at the start.

    Attributes:
        value: 2/η_c.
        learning_rate: η_c, the critical multiple of the update.
        bracket: learning rates at which the loss is below and above that at the start.
    """

    value: float
    learning_rate: float
    bracket: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Slice(Measurement):
    """The loss along a line through the parameters.

    Attributes:
        positions: multiples of the direction.
        losses: the loss at each.
        length: L2 norm of the direction.
        normalization: "filter", "parameter" or "none": how the direction was scaled.
    """

    positions: NDArray[np.float64]
    losses: NDArray[np.float64]
    length: float
    normalization: str


def by_layer(shares: Mapping[str, float], *, depth: int | None = None) -> dict[str, float]:
    """Shares or parts by parameter, added up for each module.

    Args:
        shares: by parameter name.
        depth: how many parts of a module's name count; None keeps all: ``blocks.0.attn.qkv.weight`` counts for ``blocks.0.attn.qkv``.

    >>> by_layer({"0.weight": 0.5, "0.bias": 0.125, "2.weight": 0.375})
    {'0': 0.625, '2': 0.375}
    """
    found: dict[str, float] = {}
    for name, share in shares.items():
        parts = name.split(".")
        module = ".".join(parts[:-1][:depth]) or name
        found[module] = found.get(module, 0.0) + share
    return found
