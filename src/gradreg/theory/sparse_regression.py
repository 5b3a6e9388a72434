"""Sparse linear regression with more features than samples: the data of the diagonal-network experiments, and checks of such data."""

from __future__ import annotations

from dataclasses import dataclass

from gradreg import checks
from gradreg.extras import needing

with needing("gradreg.theory.sparse_regression", "theory"):
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CONSISTENCY = 1e-8
"""The relative residual ‖Xβ − y‖ / ‖y‖ of least squares above which the data count as not interpolable."""


@dataclass(frozen=True, eq=False)
class SparseRegression:
    """A noiseless problem y = X β* with a sparse β*.

    Attributes:
        X: rows are samples, shape (samples, features).
        y: targets, shape (samples,).
        target: the sparse β*, shape (features,).
    """

    X: Array
    y: Array
    target: Array

    def recovery_error(self, beta: Array) -> float:
        """‖β − β*‖²."""
        return float(np.sum((beta - self.target) ** 2))


def sparse_regression(*, features: int = 60, samples: int = 30, nonzeros: int = 3, shift: float = 0.0, seed: int = 0) -> SparseRegression:
    """Draw rows x ~ N(shift·1, I) and set y = X β* with β* = 1/√k on the first k coordinates.

    Args:
        features: d, ≥ 1.
        samples: n, ≥ 1.
        nonzeros: k, the number of non-zero coordinates of β*, 1 ≤ k ≤ d.
        shift: μ, the mean of every feature; 0 gives centered data.
        seed: of ``numpy.random.default_rng``, ≥ 0.

    Raises:
        ValueError, TypeError: a value outside its range.

    >>> problem = sparse_regression(features=4, samples=2, nonzeros=1)
    >>> problem.X.shape, problem.target.tolist()
    ((2, 4), [1.0, 0.0, 0.0, 0.0])
    """
    d = checks.whole("features", features, minimum=1)
    n = checks.whole("samples", samples, minimum=1)
    k = checks.whole("nonzeros", nonzeros, minimum=1)
    if k > d:
        raise ValueError(f"nonzeros must be at most features; got {k} of {d}. Lower nonzeros or raise features.")
    mean = checks.real("shift", shift)
    X = mean + np.random.default_rng(checks.whole("seed", seed, minimum=0)).standard_normal((n, d))
    target = np.zeros(d)
    target[:k] = 1.0 / np.sqrt(k)
    return SparseRegression(X=X, y=X @ target, target=target)


def checked_data(X: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """``X`` (n, d) and ``y`` (n,) as float64 arrays; ``ValueError`` if their shapes disagree or values are not finite."""
    matrix, vector = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"X must be a non-empty matrix (samples, features); got shape {matrix.shape}. Stack the samples as rows.")
    if vector.shape != (matrix.shape[0],):
        raise ValueError(
            f"y must have one entry for each of X's {matrix.shape[0]} rows, shape ({matrix.shape[0]},); got shape {vector.shape}. "
            "Pass X as (samples, features) and y as (samples,)."
        )
    if not (np.isfinite(matrix).all() and np.isfinite(vector).all()):
        raise ValueError("X and y must be finite; got NaN or infinity. Remove the samples that hold them.")
    return matrix, vector


def require_interpolation(X: Array, y: Array) -> None:
    """``ValueError`` unless some β has Xβ = y, without which loss 0 cannot be reached."""
    solution = np.linalg.lstsq(X, y, rcond=None)[0]
    residual, size = float(np.linalg.norm(X @ solution - y)), float(np.linalg.norm(y))
    if residual > CONSISTENCY * max(size, np.finfo(np.float64).tiny):
        n, d = X.shape
        why = f"{n} samples but only {d} features" if n > d else f"{n} samples, some of them dependent"
        raise ValueError(
            f"y must be interpolated by some beta with X beta = y; got {why}, and the best beta leaves a residual of {residual:.3g}. "
            "Use at most as many independent samples as features, or make y = X beta without noise."
        )


def checked_scale(name: str, value: object, d: int) -> Array:
    """``value`` as d finite numbers > 0; a single number is repeated."""
    if np.ndim(value) == 0:  # type: ignore[arg-type]
        return np.full(d, checks.positive(name, value))
    scale = np.asarray(value, dtype=np.float64)
    if scale.shape != (d,):
        raise ValueError(f"{name} must be a number or have one entry for each of the {d} features; got shape {scale.shape}.")
    if not np.isfinite(scale).all() or (scale <= 0).any():
        raise ValueError(f"{name} must be finite and > 0 everywhere; got a smallest entry of {np.min(scale)}. A zero weight never moves.")
    return scale
