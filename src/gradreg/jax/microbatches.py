"""Micro-batches: a loss that is a mean over parts of the batch, evaluated and differentiated one part at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradreg import checks
from gradreg.jax.norms import Tree, widened

InAxes = int | None | tuple[int | None, ...]


def microbatched(fun: Callable[..., Any], *, in_axes: InAxes = 0, has_aux: bool = False) -> Callable[..., Any]:
    """``fun`` averaged over micro-batches, with the activations of only one of them in memory at a time.

    ``L(θ) = (1/n)·Σ fun(θ, part_i)``. Its gradient is accumulated part by part inside a ``jax.lax.scan``, so ``value_and_grad`` of it
    makes one perturbation from the whole accumulated gradient, as for the undivided batch. With parts of equal size and a loss that is a
    mean over examples the two agree to rounding. (``optax.MultiSteps`` around a regularized gradient perturbs by each part's gradient.)

    Args:
        fun: ``(params, *args, **kwargs) -> loss``, or ``-> (loss, aux)`` with ``has_aux``.
        in_axes: as in ``jax.vmap``, for the arguments after ``params``: 0 if all leaves of that argument hold the micro-batches along their
            first axis (``x.reshape(n, -1, *x.shape[1:])``, ``jax.random.split(key, n)``), None if the argument is the same for all. One
            value for all arguments, or a tuple with one for each. Keyword arguments are the same for all.
        has_aux: whether ``fun`` returns ``(loss, aux)``.

    Returns:
        A function of the same arguments giving the mean loss, or ``(loss, aux)`` with every leaf of ``aux`` stacked along a new first axis.
        It can be differentiated by ``params`` only, in reverse mode (and once more, as "exact" does).

    Cost: that of ``fun`` on all parts, one after another; memory for one part's activations and one more gradient. An "exact" penalty keeps
    the activations of all parts, so it saves no memory.

    Raises:
        TypeError, ValueError: ``in_axes`` of another form or length, nothing to divide, or parts that differ in number; when called.

    >>> import jax, jax.numpy as jnp
    >>> loss = lambda theta, x: jnp.mean((theta * x) ** 2)
    >>> jax.value_and_grad(microbatched(loss))(jnp.array(1.0), jnp.array([[1.0, 1.0], [2.0, 2.0]]))
    (Array(2.5, dtype=float32), Array(5., dtype=float32))
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable; got {checks.describe(fun)}. Pass the loss function, not its value.")

    def mean_of_parts(params: Tree, /, *args: Any, **kwargs: Any) -> Any:
        axes = _axes(in_axes, len(args))
        parts = tuple(arg for arg, axis in zip(args, axes, strict=True) if axis == 0)
        number = _number_of_parts(parts)

        def on(at: Tree, part: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            rest = iter(part)
            result = fun(at, *(next(rest) if axis == 0 else arg for arg, axis in zip(args, axes, strict=True)), **kwargs)
            return result if has_aux else (result, None)

        @jax.custom_vjp
        def mean(at: Tree, parts: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            _, (losses, aux) = jax.lax.scan(lambda _, part: (None, on(at, part)), None, parts)
            return jnp.mean(losses), aux

        def forward(at: Tree, parts: tuple[Any, ...]) -> tuple[tuple[jax.Array, Any], Tree]:
            def gather(total: Tree, part: tuple[Any, ...]) -> tuple[Tree, tuple[jax.Array, Any]]:
                evaluated, gradients = jax.value_and_grad(on, has_aux=True)(at, part)
                return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradients), evaluated

            zeros = jax.tree.map(lambda leaf: jnp.zeros_like(widened(leaf)), at)
            total, (losses, aux) = jax.lax.scan(gather, zeros, parts)
            return (jnp.mean(losses), aux), jax.tree.map(lambda t, leaf: (t / number).astype(jnp.result_type(leaf)), total, at)

        def backward(gradients: Tree, cotangents: tuple[jax.Array, Any]) -> tuple[Tree, None]:
            return jax.tree.map(lambda g: cotangents[0].astype(g.dtype) * g, gradients), None

        mean.defvjp(forward, backward)
        loss, aux = mean(params, parts)
        return (loss, aux) if has_aux else loss

    return mean_of_parts


def _axes(in_axes: InAxes, number: int) -> tuple[int | None, ...]:
    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * number
    if any(isinstance(axis, bool) or axis not in (0, None) for axis in axes):
        raise ValueError(f"in_axes must be 0, None or a tuple of them; got {in_axes}. Move the micro-batches to the first axis.")
    if len(axes) != number:
        raise ValueError(f"in_axes must have one entry for each argument after params; got {len(axes)} for {number}.")
    return axes


def _number_of_parts(parts: tuple[Any, ...]) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(parts)]
    numbers = {shape[0] if shape else 0 for shape in shapes}
    if len(numbers) != 1 or numbers == {0}:
        raise ValueError(
            f"micro-batches must lie along the first axis of every divided argument, in equal number; got the shapes {shapes}. "
            "Reshape with x.reshape(n, -1, *x.shape[1:]), and give in_axes=None to what is the same for all."
        )
    return numbers.pop()
