"""Perturbed parameters and sums of weighted gradients.

Leaves narrower than 32 bits (bfloat16, float16) are computed with in float32 and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradreg.jax.norms import Tree, widened
from gradreg.plan import vanishes


def perturbed(params: Tree, direction: Tree, distance: Any, selected: Sequence[bool]) -> Tree:
    """θ + ``distance``·``direction`` in the ``selected`` leaves, θ in the others; the dtypes of θ."""
    leaves, structure = jax.tree.flatten(params)
    vectors = jax.tree.leaves(direction)
    triples = zip(leaves, vectors, selected, strict=True)
    return structure.unflatten([_perturbed(leaf, vector, distance) if chosen else leaf for leaf, vector, chosen in triples])


def _perturbed(leaf: Any, vector: jax.Array, distance: Any) -> jax.Array:
    start = widened(leaf)
    return (start + jnp.asarray(distance, start.dtype) * widened(vector)).astype(jnp.result_type(leaf))


def weighted_sum(terms: Sequence[tuple[Any, Tree]]) -> Tree:
    """Σ weight·gradient over the pairs of ``terms``; a weight that is the number 0 leaves its gradient out, non-finite or not."""
    kept = [(weight, gradients) for weight, gradients in terms if not vanishes(weight)]
    weights = [weight for weight, _ in kept]

    def total(*leaves: jax.Array) -> jax.Array:
        wider = [widened(leaf) for leaf in leaves]
        # A weight of exactly 1 skips the multiplication, so that the plain gradient is returned bit for bit.
        parts = [w if isinstance(c, float) and c == 1.0 else jnp.asarray(c, w.dtype) * w for c, w in zip(weights, wider, strict=True)]
        return sum(parts[1:], start=parts[0]).astype(leaves[0].dtype)

    return jax.tree.map(total, *(gradients for _, gradients in kept))
