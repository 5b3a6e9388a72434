"""Norms and inner products over all leaves of a tree together, in float32 at least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Tree: TypeAlias = Any
"""A pytree of arrays."""


def wide(dtype: Any) -> Any:
    """The dtype used to compute with leaves of ``dtype``: itself, or float32 if it is narrower."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def widened(leaf: Any) -> jax.Array:
    """``leaf`` as an array of at least 32 bits."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(wide(leaf.dtype))


def gradient_norm(gradients: Tree, selected: Sequence[bool], shards: Sequence[tuple[str, ...]] = ()) -> jax.Array:
    """The L2 norm over all ``selected`` leaves of ``gradients`` together; ``shards``: the axes over which each leaf is divided."""
    leaves = jax.tree.leaves(gradients)
    kept = zip(leaves, shards or [()] * len(leaves), selected, strict=True)
    return jnp.sqrt(_summed([(jnp.sum(jnp.square(widened(leaf))), axes) for leaf, axes, counted in kept if counted]))


def inner_product(first: Tree, second: Tree, shards: Sequence[tuple[str, ...]] = ()) -> jax.Array:
    """The inner product over all leaves together; ``shards``: the axes over which each leaf is divided."""
    pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    axes = shards or [()] * len(pairs)
    return _summed([(jnp.sum(widened(a) * widened(b)), own) for (a, b), own in zip(pairs, axes, strict=True)])


def _summed(parts: Sequence[tuple[jax.Array, tuple[str, ...]]]) -> jax.Array:
    """The sum of scalars, each over the axes beside it, in the widest of their dtypes."""
    dtype = max((part.dtype for part, _ in parts), key=lambda dtype: jnp.finfo(dtype).bits)
    by_axes: dict[tuple[str, ...], jax.Array] = {}
    for part, axes in parts:
        by_axes[axes] = by_axes.get(axes, jnp.zeros((), dtype)) + part.astype(dtype)
    totals = [jax.lax.psum(total, axes) if axes else total for axes, total in by_axes.items()]
    return sum(totals[1:], start=totals[0])


def safe_ratio(numerator: Any, denominator: Any) -> jax.Array:
    """``numerator / denominator``, and 0 where the denominator is 0, because a zero gradient has no direction."""
    positive = denominator > 0
    # The inner ``where`` keeps the division, and so its derivative, finite on the side that is not taken.
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)
