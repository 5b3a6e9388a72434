"""The Hessian and the Gauss-Newton matrix as SciPy linear operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import nn

from gradreg.sharpness.products import Curvature, Method, Products, products_of
from gradreg.sharpness.spectra import CurvatureOptions, opened
from gradreg.torch.closures import Closure


class CurvatureOperator(LinearOperator):
    """A curvature matrix of a loss, for any routine of SciPy that takes a linear operator (``eigsh``, ``cg``, ``svds``).

    Coordinates are the measured parameters' elements in the order of ``model.parameters()``. Each product leaves the model as it was.
    Inside ``with operator:`` the model is prepared and restored once for all products, and the graph of exact ones is kept. The matrix is
    that at the present parameters: build another after a training step.

    Attributes:
        method: "exact" or "differences"; None before the first product, which finds out.
        step: of differences.
        product_error: the estimated error of a product relative to its length.
        passes: made so far.
        notes: what a reader must know.
    """

    def __init__(self, model: nn.Module, closure: Closure | Sequence[Closure], **options: Unpack[CurvatureOptions]) -> None:
        self._function, curvature, method, self._step, self._seed = opened(model, closure, options)
        self._curvature: Curvature = curvature
        self._method: Method = method
        self._products: Products | None = None
        self._context: Any = None
        space = self._function.space
        super().__init__(np.dtype(str(space.dtype).removeprefix("torch.")), (space.dimension, space.dimension))

    @property
    def method(self) -> str | None:
        return None if self._products is None else self._products.method

    @property
    def step(self) -> float | None:
        return None if self._products is None else self._products.step

    @property
    def product_error(self) -> float | None:
        return None if self._products is None else self._products.relative_error

    @property
    def passes(self) -> Any:
        return self._function.passes.rounded()

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._function.notes)

    def __enter__(self) -> Self:
        self._context = self._function.measuring()
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        context, self._context = self._context, None
        if self._products is not None:
            self._products.drop()
        context.__exit__(*error)

    def _matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        function = self._function
        with function.measuring():
            vector = function.space.from_numpy(np.asarray(x).reshape(-1))
            if self._products is None:
                probe = function.space.signs(self._seed, 0)
                self._products, _ = products_of(function, self._curvature, self._method, self._step, probe, sharpen=True)
            product = function.space.to_numpy(self._products(vector))
            if self._context is None:
                self._products.drop()
        function.emit_warnings(5)
        return product

    def _adjoint(self) -> Any:
        return self

    _rmatvec = _matvec


def hessian(model: nn.Module, closure: Closure | Sequence[Closure], **options: Unpack[CurvatureOptions]) -> CurvatureOperator:
    """The Hessian of the loss as a SciPy linear operator.

    ::

        with sharpness.hessian(model, closure) as H:
            values, vectors = scipy.sparse.linalg.eigsh(H, k=3, which="LA")
    """
    return CurvatureOperator(model, closure, **{**options, "curvature": "hessian"})


def gauss_newton(model: nn.Module, closure: Closure | Sequence[Closure], **options: Unpack[CurvatureOptions]) -> CurvatureOperator:
    """The Gauss-Newton matrix as a SciPy linear operator; closures return ``(loss, outputs)``."""
    return CurvatureOperator(model, closure, **{**options, "curvature": "gauss-newton"})
