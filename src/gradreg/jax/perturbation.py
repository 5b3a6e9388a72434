"""Arithmetic over trees of parameters and gradients: the norm, θ + distance·d, and sums of weighted gradients.

Leaves narrower than 32 bits (bfloat16, float16) are computed with in float32 and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Tree: TypeAlias = Any
"""A pytree of arrays."""


def wide(dtype: Any) -> Any:
    """The dtype in which leaves of ``dtype`` are computed with: itself, or float32 if it is narrower."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def widened(leaf: Any) -> jax.Array:
    """``leaf`` as an array of at least 32 bits."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(wide(leaf.dtype))


def gradient_norm(gradients: Tree, selected: Sequence[bool]) -> jax.Array:
    """The L2 norm over all ``selected`` leaves of ``gradients`` together."""
    leaves = [widened(leaf) for leaf, counted in zip(jax.tree.leaves(gradients), selected, strict=True) if counted]
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), start=jnp.zeros((), leaves[0].dtype)))


def safe_ratio(numerator: Any, denominator: Any) -> jax.Array:
    """``numerator / denominator``, and 0 where the denominator is 0: a zero gradient has no direction, and is not perturbed."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)


def moved(params: Tree, direction: Tree, distance: Any, selected: Sequence[bool]) -> Tree:
    """θ + ``distance``·``direction`` in the ``selected`` leaves, θ in the others; the dtypes of θ."""
    leaves, structure = jax.tree.flatten(params)
    steps = zip(leaves, jax.tree.leaves(direction), selected, strict=True)
    return structure.unflatten([_moved(leaf, step, distance) if chosen else leaf for leaf, step, chosen in steps])


def _moved(leaf: Any, step: jax.Array, distance: Any) -> jax.Array:
    start = widened(leaf)
    return (start + jnp.asarray(distance, start.dtype) * widened(step)).astype(jnp.result_type(leaf))


def vanishes(weight: Any) -> bool:
    """Whether ``weight`` is known to be 0 when tracing."""
    return isinstance(weight, float) and weight == 0.0


def combined(terms: Sequence[tuple[Any, Tree]]) -> Tree:
    """Σ weight·gradient over the pairs of ``terms``; a weight that is the number 0 leaves its gradient out, non-finite or not."""
    kept = [(weight, gradients) for weight, gradients in terms if not vanishes(weight)]
    weights = [weight for weight, _ in kept]

    def total(*leaves: jax.Array) -> jax.Array:
        wider = [widened(leaf) for leaf in leaves]
        parts = [w if isinstance(c, float) and c == 1.0 else jnp.asarray(c, w.dtype) * w for c, w in zip(weights, wider, strict=True)]
        return sum(parts[1:], start=parts[0]).astype(leaves[0].dtype)

    return jax.tree.map(total, *(gradients for _, gradients in kept))
