"""Micro-batches: a loss that is a mean over parts of the batch, evaluated and differentiated one part at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from gradreg import checks
from gradreg.jax.norms import Tree, widened
from gradreg.jax.program import convolves

MOST_UNROLLED = 32
"""The number of parts up to which a loop over convolutions on a CPU is unrolled without being asked to."""

InAxes = int | None | tuple[int | None, ...]


def microbatched(fun: Callable[..., Any], *, in_axes: InAxes = 0, has_aux: bool = False, unroll: bool | None = None) -> Callable[..., Any]:
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
        unroll: whether the parts follow one another in the program instead of in a loop, for more compilation. By default only for up to
            32 parts of a loss with convolutions where JAX's default backend is the CPU, on which they are slow inside a loop.

    Returns:
        A function of the same arguments giving the mean loss, or ``(loss, aux)`` with every leaf of ``aux`` stacked along a new first axis.
        It can be differentiated in reverse mode (and once more, as "exact" does): by ``params``, by all other arguments, and through
        ``aux``, which costs another pass over the parts. JAX raises if it is differentiated in forward mode.

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

    @functools.wraps(fun, assigned=(), updated=())  # a parameter named step is one of this function too
    def mean_of_parts(params: Tree, /, *args: Any, **kwargs: Any) -> Any:
        axes = _axes(in_axes, len(args))
        number = _number_of_parts(tuple(arg for arg, axis in zip(args, axes, strict=True) if axis == 0))
        inputs, structure = jax.tree.flatten((args, kwargs))
        is_divided = [axis == 0 for arg, axis in zip(args, axes, strict=True) for _ in jax.tree.leaves(arg)]
        is_divided += [False] * (len(inputs) - len(is_divided))
        # Arrays are arguments of the function with a derivative rule of its own, which must close over none that is being transformed.
        is_shared = [not own and isinstance(leaf, (jax.Array, np.ndarray)) for leaf, own in zip(inputs, is_divided, strict=True)]
        divided = [leaf for leaf, own in zip(inputs, is_divided, strict=True) if own]
        shared = [leaf for leaf, own in zip(inputs, is_shared, strict=True) if own]

        def on(at: Tree, part: list[Any], common: list[Any]) -> tuple[jax.Array, Any]:
            parts, commons = iter(part), iter(common)
            choices = zip(inputs, is_divided, is_shared, strict=True)
            own_args, own_kwargs = structure.unflatten([next(parts) if d else next(commons) if s else leaf for leaf, d, s in choices])
            result = fun(at, *own_args, **own_kwargs)
            return result if has_aux else (result, None)

        first = [jax.tree.map(lambda leaf: leaf[0], leaf) for leaf in divided]
        # So are those that fun closes over, if a derivative by them is taken.
        converted, closed = jax.closure_convert(on, params, first, shared)

        def closing(at: Tree, part: list[Any], common: list[Any]) -> tuple[jax.Array, Any]:
            return converted(at, part, common[: len(shared)], *common[len(shared) :])

        turns = _unrolled(unroll, number, on, params, first, shared)
        loss, aux = _mean(closing, number, turns)(params, divided, [*shared, *closed])
        return (loss, aux) if has_aux else loss

    mean_of_parts.divides_into_parts = True  # type: ignore[attr-defined]
    mean_of_parts.part = fun  # type: ignore[attr-defined]
    mean_of_parts.in_axes = in_axes  # type: ignore[attr-defined]
    return mean_of_parts


@dataclass(frozen=True, eq=False)
class EachPart:
    """A regularized function of one micro-batch, applied to each by itself: the mean of what it returns. Made by ``value_and_grad``.

    Args:
        of_part: from ``(params, *args, step=..., **kwargs)`` of one micro-batch to ``(value, gradients)``, without a state.
        in_axes: which arguments are divided: see ``microbatched``.
        has_aux: whether aux is among its values, which is stacked.
        with_metrics: whether metrics are, of which the means are taken.
    """

    of_part: Callable[..., Any]
    in_axes: InAxes
    has_aux: bool
    with_metrics: bool
    carries_state = False
    rule = None

    def __call__(self, params: Tree, /, *args: Any, **kwargs: Any) -> Any:
        axes = _axes(self.in_axes, len(args))
        number = _number_of_parts(tuple(arg for arg, axis in zip(args, axes, strict=True) if axis == 0))
        divided = [arg for arg, axis in zip(args, axes, strict=True) if axis == 0]

        def on(part: list[Any]) -> tuple[list[Any], Tree]:
            parts = iter(part)
            given = [next(parts) if axis == 0 else arg for arg, axis in zip(args, axes, strict=True)]
            values, gradients = self.of_part(params, *given, **kwargs)
            return list(values) if self.has_aux or self.with_metrics else [values], gradients

        def gather(total: Tree, part: list[Any]) -> tuple[Tree, list[Any]]:
            values, gradients = on(part)
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradients), values

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(widened(leaf)), params)
        first = [jax.tree.map(lambda leaf: leaf[0], arg) for arg in divided]
        turns = _unrolled(None, number, on, first)
        total, (losses, *more) = jax.lax.scan(gather, zeros, divided, unroll=turns)
        gradients = jax.tree.map(lambda t, leaf: (t / number).astype(jnp.result_type(leaf)), total, params)
        if self.with_metrics:
            more[-1] = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), more[-1])
        value = jnp.mean(losses)
        return ((value, *more) if more else value), gradients


def _unrolled(unroll: bool | None, number: int, *program: Any) -> int:
    """How many parts stand in one turn of the loop: 1, or all of them, so that there is no loop."""
    if unroll is None:
        # Convolutions inside control flow do not use the CPU's fast kernels (jax#12868). Many parts would take long to compile.
        unroll = number <= MOST_UNROLLED and jax.default_backend() == "cpu" and convolves(*program)
    return number if unroll else 1


def _mean(on: Callable[..., tuple[jax.Array, Any]], number: int, unroll: int) -> Callable[..., tuple[jax.Array, Any]]:
    """The mean of ``on`` over the parts, with the gradient taken part by part in the forward pass."""

    def scanned(primals: Any, wanted: list[bool], cotangents: Any = None) -> tuple[list[Any], Any, Any]:
        """Gradients by the wanted leaves of ``primals``, of the sum of losses or of ``cotangents`` times aux; and the losses and aux.

        Those by what all parts share are accumulated, at least 32 bits wide; those by divided arrays are stacked.
        """
        (at, divided, shared), structure = primals, jax.tree.structure(primals)
        leaves = jax.tree.leaves(primals)
        begin = len(jax.tree.leaves(at))
        own = [begin <= i < begin + len(divided) for i in range(len(leaves))]
        zeros = [jnp.zeros_like(widened(leaf)) for leaf, w, d in zip(leaves, wanted, own, strict=True) if w and not d]

        def gather(total: list[Any], part: Any) -> tuple[list[Any], Any]:
            inputs, cotangent = part
            here = jax.tree.leaves((at, inputs, shared))

            def loss(chosen: list[Any]) -> tuple[jax.Array, Any]:
                chosen_leaves = iter(chosen)
                given = [next(chosen_leaves) if w else leaf for leaf, w in zip(here, wanted, strict=True)]
                value, aux = on(*structure.unflatten(given))
                if cotangents is None:
                    return value, (value, aux)
                differentiable = [leaf for leaf in jax.tree.leaves(aux) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
                return sum((jnp.sum(leaf * c) for leaf, c in zip(differentiable, cotangent, strict=True)), start=0.0 * value), (value, aux)

            gradients, found = jax.grad(loss, has_aux=True)([leaf for leaf, w in zip(here, wanted, strict=True) if w])
            divides = [d for d, w in zip(own, wanted, strict=True) if w]
            common = [g for g, d in zip(gradients, divides, strict=True) if not d]
            total = [t + g.astype(t.dtype) for t, g in zip(total, common, strict=True)]
            return total, ([g for g, d in zip(gradients, divides, strict=True) if d], found)

        total, (stacked, found) = jax.lax.scan(gather, zeros, (divided, cotangents), unroll=unroll)
        totals, stacks = iter(total), iter(stacked)
        return [next(stacks) if d else next(totals) for d, w in zip(own, wanted, strict=True) if w], *found

    @jax.custom_vjp
    def mean(at: Tree, divided: list[Any], shared: list[Any]) -> tuple[jax.Array, Any]:
        _, (losses, aux) = jax.lax.scan(lambda _, part: (None, on(at, part, shared)), None, divided, unroll=unroll)
        return jnp.mean(losses), aux

    def forward(*given: Any) -> tuple[tuple[jax.Array, Any], Any]:
        leaves, structure = jax.tree.flatten(given, is_leaf=_is_primal)
        primals = structure.unflatten([leaf.value for leaf in leaves])
        # Only what is differentiated by: usually the parameters alone.
        wanted = [leaf.perturbed and jnp.issubdtype(jnp.result_type(leaf.value), jnp.inexact) for leaf in leaves]
        found, losses, aux = scanned(primals, wanted)
        kept = [leaf.value for leaf, w in zip(leaves, wanted, strict=True) if w]
        gradients = iter([(g / number).astype(jnp.result_type(leaf)) for g, leaf in zip(found, kept, strict=True)])
        # None stands for what is not wanted, so that the backward pass knows it from the structure.
        return (jnp.mean(losses), aux), (primals, [next(gradients) if w else None for w in wanted])

    def backward(kept: Any, cotangents: tuple[Any, Any]) -> Any:
        primals, gradients = kept
        of_loss, of_aux = cotangents
        scale = 0.0 if _is_zero(of_loss) else of_loss
        results = [None if g is None else jnp.asarray(scale, g.dtype) * g for g in gradients]
        of_aux = [leaf for leaf in jax.tree.leaves(of_aux, is_leaf=_is_zero) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if not all(map(_is_zero, of_aux)):  # a gradient through aux, which is known only now: each part once more
            of_aux = [jnp.zeros(leaf.shape, leaf.dtype) if _is_zero(leaf) else leaf for leaf in of_aux]
            more = iter(scanned(primals, [g is not None for g in gradients], of_aux)[0])
            results = [None if g is None else (g + next(more)).astype(g.dtype) for g in results]
        return jax.tree.structure(primals).unflatten(results)

    mean.defvjp(forward, backward, symbolic_zeros=True)
    return mean


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, CustomVJPPrimal)


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


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
