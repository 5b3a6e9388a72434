"""The Lanczos iteration, with full reorthogonalization, over vectors that may be sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradreg.sharpness.space import Space, Vector

Multiply = Callable[[Vector], Vector]

_MEMORY = 1 << 30
"""Bytes that the basis of an iteration may take, unless it then holds too few vectors to converge."""
_FEWEST = 20
_MOST = 200


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenvalues and vectors.

    Args:
        values: the wanted ones, the wanted end first.
        bounds: the estimated error of each: its residual r, or r² / gap where other values lie further than r away.
        vectors: unit vectors, as rows.
        products: products made.
        asymmetry: root mean square of what should be zero in the projected matrix if it were symmetric; NaN if there was nothing to see.
        converged: whether all bounds are within the tolerance.
    """

    values: NDArray[np.float64]
    bounds: NDArray[np.float64]
    vectors: Tensor
    products: int
    asymmetry: float
    converged: bool


class _Basis:
    """Orthonormal vectors, as rows of one matrix.

    Args:
        space: their space.
        room: how many.
        seed: of the random vectors that continue where a product lies in the span.
    """

    def __init__(self, space: Space, room: int, seed: int) -> None:
        self.space = space
        self.rows = torch.empty(room, space.size, dtype=space.dtype, device=space.device)
        self.seed = seed
        self._fresh = 0

    def orthogonalized(self, vector: Vector, count: int) -> tuple[NDArray[np.float64], float]:
        """Subtract from ``vector``, in place, its components along the first ``count`` rows; they, and the length of what is left."""
        rows = self.rows[:count]
        components = torch.zeros(count, dtype=self.space.dtype, device=self.space.device)
        for _ in range(2):  # twice is enough for orthogonality to working precision
            these = self.space.dots(rows, vector)
            vector.addmv_(rows.T, these, alpha=-1)
            components += these
        return components.double().cpu().numpy(), self.space.norm(vector)

    def fresh(self, count: int) -> Vector:
        """A random unit vector orthogonal to the first ``count`` rows."""
        while True:
            self._fresh += 1
            vector = self.space.normal(self.seed, 1_000_000 + self._fresh)
            before = self.space.norm(vector)
            _, length = self.orthogonalized(vector, count)
            if length > 1e-3 * before / self.space.dimension**0.5:  # or it lies in the span but for rounding
                return vector / length


def largest(
    space: Space,
    multiply: Multiply,
    start: Vector,
    *,
    first: Vector | None = None,
    k: int,
    tolerance: float,
    limit: int,
    seed: int = 0,
) -> Ritz:
    """The k algebraically largest eigenvalues, by Lanczos with thick restarts (Wu & Simon 2000).

    Args:
        space: of the vectors.
        multiply: with a symmetric matrix.
        start: any vector with a component along what is wanted, such as a random one.
        first: the product of ``start``, if it is known.
        k: how many.
        tolerance: for the bounds, relative to the largest absolute Ritz value.
        limit: products at most.
        seed: of random vectors that continue a basis which is exhausted.
    """
    n = space.dimension
    bytes_each = max(1, space.size * (8 if space.dtype == torch.float64 else 4))
    room = min(n, max(2 * k + 8, _FEWEST, min(_MOST + 2 * k, _MEMORY // bytes_each)))
    basis = _Basis(space, min(room + 1, n), seed)
    projected = np.zeros((room, room))
    length = space.norm(start)
    basis.rows[0] = start / length
    kept, products, squares = 0, 0, []
    j = 0
    while True:
        vector = first / length if first is not None and products == 0 else multiply(basis.rows[j])
        products += 1
        components, beta = basis.orthogonalized(vector, j + 1)
        projected[j, j] = components[j]
        if j > kept:  # all that lies further from the diagonal than one is 0 for a symmetric matrix
            squares.extend(((components[:j] - projected[:j, j]) ** 2).tolist())
        values, inner = np.linalg.eigh(projected[: j + 1, : j + 1])
        values, inner = values[::-1], inner[:, ::-1]
        scale = max(abs(values[0]), abs(values[-1]), np.finfo(np.float64).tiny)
        exhausted = beta <= 10 * float(torch.finfo(space.dtype).eps) * scale * max(1.0, n**0.5 / 100)
        beta = 0.0 if exhausted else beta
        residuals = np.abs(beta * inner[-1])
        bounds = _bounds(values, residuals)[:k]
        complete = j + 1 == n
        converged = len(bounds) == k and bool((bounds <= tolerance * scale).all()) and (complete or exhausted or j >= min(n - 1, k + 1))
        if converged or complete or products >= limit:
            found = min(k, j + 1)
            vectors = torch.from_numpy(np.ascontiguousarray(inner[:, :found].T)).to(space.device, space.dtype) @ basis.rows[: j + 1]
            asymmetry = float(np.sqrt(np.mean(squares))) if squares else float("nan")
            return Ritz(values[:found].copy(), bounds[:found].copy(), vectors, products, asymmetry, converged or complete)
        following = basis.fresh(j + 1) if exhausted else vector / beta
        if j + 1 < room:
            basis.rows[j + 1] = following
            projected[j, j + 1] = projected[j + 1, j] = beta
            j += 1
            continue
        kept = min(k + max(4, (room - k) // 3), room - 2)
        turn = torch.from_numpy(np.ascontiguousarray(inner[:, :kept].T)).to(space.device, space.dtype)
        basis.rows[:kept] = turn @ basis.rows[:room]
        basis.rows[kept] = following
        projected = np.zeros((room, room))
        projected[range(kept), range(kept)] = values[:kept]
        projected[:kept, kept] = projected[kept, :kept] = beta * inner[-1, :kept]
        j = kept


def _bounds(values: NDArray[np.float64], residuals: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error of each Ritz value from its residual and its distance from the others."""
    if len(values) == 1:
        return residuals
    # What is not yet converged may come closer by its residual.
    apart = np.maximum(np.abs(np.diff(values)) - residuals[:-1] - residuals[1:], 0.0)
    gaps = np.minimum(np.append(apart, np.inf), np.insert(apart, 0, np.inf))
    return residuals * np.minimum(1.0, residuals / np.maximum(gaps, np.maximum(residuals, np.finfo(np.float64).tiny)))


def quadrature(
    space: Space, multiply: Multiply, start: Vector, *, first: Vector | None = None, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points and weights of the Gauss quadrature for the spectral measure of ``start``: as many as steps, fewer where it is exhausted.

    Source: Golub & Welsch 1969; Ghorbani, Krishnan & Xiao 2019, arXiv 1901.10159, algorithm 1.
    """
    count = min(steps, space.dimension)
    basis = _Basis(space, count, 0)
    length = space.norm(start)
    basis.rows[0] = start / length
    diagonal, beside = [], []
    for j in range(count):
        vector = first / length if first is not None and j == 0 else multiply(basis.rows[j])
        components, beta = basis.orthogonalized(vector, j + 1)
        diagonal.append(components[j])
        scale = max(map(abs, (*diagonal, *beside)))
        if j + 1 == count or beta <= 100 * float(torch.finfo(space.dtype).eps) * scale:
            break
        beside.append(beta)
        basis.rows[j + 1] = vector / beta
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2
