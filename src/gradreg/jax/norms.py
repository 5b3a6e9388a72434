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


def gradient_norm(gradients: Tree, selected: Sequence[bool]) -> jax.Array:
    """The L2 norm over all ``selected`` leaves of ``gradients`` together."""
    leaves = [widened(leaf) for leaf, counted in zip(jax.tree.leaves(gradients), selected, strict=True) if counted]
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), start=jnp.zeros((), leaves[0].dtype)))


def inner_product(first: Tree, second: Tree) -> jax.Array:
    """The inner product over all leaves together."""
    products: Any = jax.tree.map(lambda a, b: jnp.sum(widened(a) * widened(b)), first, second)
    return sum(jax.tree.leaves(products))  # type: ignore[return-value]  # there is a leaf


def safe_ratio(numerator: Any, denominator: Any) -> jax.Array:
    """``numerator / denominator``, and 0 where the denominator is 0, because a zero gradient has no direction."""
    positive = denominator > 0
    # The inner ``where`` keeps the division, and so its derivative, finite on the side that is not taken.
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)
