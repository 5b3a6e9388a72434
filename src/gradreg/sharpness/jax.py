"""Sharpness of a JAX loss: what is one function there. ``fun(params, *args)`` is any function that ``jax.grad`` takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gradreg import checks
from gradreg.extras import needing

with needing("gradreg.sharpness.jax", "jax"):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.flatten_util import ravel_pytree
    from numpy.typing import NDArray
    from scipy.sparse.linalg import LinearOperator, eigsh


class Estimate(NamedTuple):
    """A mean over random vectors, with its standard error (NaN for one)."""

    value: float
    standard_error: float


def hessian(fun: Callable[..., Any], params: Any, *args: Any) -> LinearOperator:
    """The Hessian of ``fun(params, *args)`` as a SciPy linear operator, by forward over reverse differentiation.

    Coordinates are those of ``jax.flatten_util.ravel_pytree(params)``. Cost of a product: about two gradients.
    """
    flat, product = _product(fun, params, args)

    def multiply(x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(product(jnp.asarray(np.reshape(x, -1), flat.dtype)))

    make: Any = LinearOperator
    return make((flat.size, flat.size), matvec=multiply, rmatvec=multiply, dtype=np.dtype(flat.dtype))


def largest_eigenvalues(
    fun: Callable[..., Any], params: Any, *args: Any, k: int = 1, tolerance: float = 1e-4, seed: int = 0
) -> NDArray[np.float64]:
    """The k largest eigenvalues of the Hessian: algebraic, in descending order, ``[k]``.

    Args:
        fun: the loss; its first argument is what it is differentiated by.
        params: any tree of real arrays.
        args: of ``fun`` beside the parameters.
        k: how many, ≥ 1 and below the number of coordinates.
        tolerance: relative, > 0.
        seed: of the start vector.

    Cost: usually 20 to 60 products, by SciPy's ``eigsh``.
    """
    checks.whole("k", k, minimum=1)
    checks.positive("tolerance", tolerance)
    operator = hessian(fun, params, *args)
    if k >= operator.shape[0]:
        raise ValueError(f"k must be below the number of coordinates, {operator.shape[0]}; got {k}. Ask for fewer eigenvalues.")
    start = np.random.default_rng(checks.seed(seed)).standard_normal(operator.shape[0]).astype(operator.dtype)
    _check_finite(operator @ start)
    solve: Any = eigsh  # whose types know whole tolerances only
    values = solve(operator, k=k, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return np.sort(np.asarray(values, dtype=np.float64))[::-1]


def trace(fun: Callable[..., Any], params: Any, *args: Any, samples: int = 20, seed: int = 0) -> Estimate:
    """The trace of the Hessian, by Hutchinson's estimator: the mean of vᵀHv over vectors of random signs.

    Args:
        fun: the loss; its first argument is what it is differentiated by.
        params: any tree of real arrays.
        args: of ``fun`` beside the parameters.
        samples: random vectors, ≥ 1.
        seed: of them.

    Cost: one product for each sample.
    """
    checks.whole("samples", samples, minimum=1)
    flat, product = _product(fun, params, args)
    keys = jax.random.split(jax.random.key(checks.seed(seed)), samples)
    found: list[float] = []
    for key in keys:
        vector = jax.random.rademacher(key, flat.shape, flat.dtype)
        found.append(float(vector @ product(vector)))
    _check_finite(np.array(found))
    error = float(np.std(found, ddof=1) / math.sqrt(samples)) if samples > 1 else math.nan
    return Estimate(float(np.mean(found)), error)


def sam_sharpness(fun: Callable[..., Any], params: Any, *args: Any, rho: Any) -> jax.Array:
    """SAM's sharpness L(θ + ρĝ) − L(θ); a pure function, which can be jitted and mapped over ``rho``. NaN where the gradient is zero.

    Cost: a gradient and an evaluation.

    Source: Foret et al. 2021, arXiv 2010.01412, equation 1.
    """
    loss, gradient = jax.value_and_grad(fun)(params, *args)
    norm = jnp.sqrt(sum(jnp.vdot(g, g).real for g in jax.tree.leaves(gradient)))
    return fun(jax.tree.map(lambda p, g: p + (rho / norm * g).astype(p.dtype), params, gradient), *args) - loss


def _product(fun: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The flat parameters, and the compiled product of the Hessian with a flat vector."""
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            raise TypeError(
                f"params must be a tree of real floating arrays; got one of {jnp.asarray(leaf).dtype}. Close over what is not trained: "
                "lambda params: fun(merge(params, others))."
            )
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def product(vector: jax.Array) -> jax.Array:
        return jax.jvp(lambda p: ravel_pytree(jax.grad(fun)(unravel(p), *args))[0], (flat,), (vector,))[1]

    return flat, product


def _check_finite(found: NDArray[Any]) -> None:
    if not np.isfinite(found).all():
        raise ValueError(
            "curvature must be finite; got NaN or infinity in a product of the Hessian. The parameters or data hold some, or the loss has "
            "no second derivative here (a square root or norm at 0)."
        )
