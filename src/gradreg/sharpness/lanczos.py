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
_BLOCK = 16
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
    """Orthonormal vectors, as rows of matrices that are allocated as they are needed.

    Args:
        space: their space.
        seed: of the random vectors that continue where a product lies in the span.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self.seed = seed
        self._blocks: list[Tensor] = []
        self._fresh = 0

    def __getitem__(self, i: int) -> Vector:
        return self._blocks[i // _BLOCK][i % _BLOCK]

    def __setitem__(self, i: int, vector: Vector) -> None:
        if i // _BLOCK == len(self._blocks):
            self._blocks.append(torch.empty(_BLOCK, self.space.size, dtype=self.space.dtype, device=self.space.device))
        self._blocks[i // _BLOCK][i % _BLOCK] = vector

    def first(self, count: int) -> list[Tensor]:
        """The first ``count`` rows, in blocks."""
        whole, rest = divmod(count, _BLOCK)
        return [*self._blocks[:whole], *([self._blocks[whole][:rest]] if rest else [])]

    def combined(self, weights: NDArray[np.float64]) -> Tensor:
        """The rows of ``weights`` times the first rows, as many as it has columns."""
        blocks = self.first(weights.shape[1])
        parts = torch.from_numpy(weights.copy()).to(self.space.device, self.space.dtype).split(_BLOCK, dim=1)
        total = parts[0] @ blocks[0]
        for part, block in zip(parts[1:], blocks[1:], strict=True):
            total.addmm_(part, block)
        return total

    def orthogonalized(self, vector: Vector, count: int) -> tuple[NDArray[np.float64], float]:
        """Subtract from ``vector``, in place, its components along the first ``count`` rows; they, and the length of what is left."""
        components = torch.zeros(count, dtype=self.space.dtype, device=self.space.device)
        for _ in range(2):  # twice is enough for orthogonality to working precision
            blocks = self.first(count)
            these = [self.space.dots(rows, vector) for rows in blocks]
            for rows, found in zip(blocks, these, strict=True):
                vector.addmv_(rows.T, found, alpha=-1)
            components += torch.cat(these)
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
    basis = _Basis(space, seed)
    projected = np.zeros((room, room))
    length = space.norm(start)
    basis[0] = start / length
    kept, products, squares = 0, 0, []
    j = 0
    while True:
        vector = first / length if first is not None and products == 0 else multiply(basis[j])
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
            vectors = basis.combined(inner[:, :found].T)
            asymmetry = float(np.sqrt(np.mean(squares))) if squares else float("nan")
            return Ritz(values[:found].copy(), bounds[:found].copy(), vectors, products, asymmetry, converged or complete)
        following = basis.fresh(j + 1) if exhausted else vector / beta
        if j + 1 < room:
            basis[j + 1] = following
            projected[j, j + 1] = projected[j + 1, j] = beta
            j += 1
            continue
        kept = min(k + max(4, (room - k) // 3), room - 2)
        for i, vector in enumerate(basis.combined(inner[:, :kept].T)):
            basis[i] = vector
        basis[kept] = following
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
    basis = _Basis(space, 0)
    length = space.norm(start)
    basis[0] = start / length
    diagonal, beside = [], []
    for j in range(count):
        vector = first / length if first is not None and j == 0 else multiply(basis[j])
        components, beta = basis.orthogonalized(vector, j + 1)
        diagonal.append(components[j])
        scale = max(map(abs, (*diagonal, *beside)))
        if j + 1 == count or beta <= 100 * float(torch.finfo(space.dtype).eps) * scale:
            break
        beside.append(beta)
        basis[j + 1] = vector / beta
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2
