"""The vector along which the parameters are moved, and the one whose length a normalised move divides by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradreg.directions import Adaptive, Direction, Friendly, Random, Remembered
from gradreg.jax.draws import signs
from gradreg.jax.perturbation import Tree, widened


def ascent(
    direction: Direction, params: Tree, gradients: Tree | None, average: Sequence[Any], step: Any, selected: Sequence[bool]
) -> tuple[Tree, Tree]:
    """v and w of the table in ``gradreg.directions``, whose leaves mean nothing where they are not ``selected``.

    Args:
        direction: the specification.
        params: θ.
        gradients: g; None for a direction that needs none.
        average: the memory of ``Friendly``, with this step's gradient in it, or of ``Remembered``, leaf by leaf; else empty.
        step: the optimizer step.
        selected: for each leaf, whether it is moved.
    """
    leaves, structure = jax.tree.flatten(params)
    if isinstance(direction, Random):
        places = enumerate(zip(leaves, selected, strict=True))
        drawn = [signs(direction.seed, step, place, widened(leaf)) if moves else leaf for place, (leaf, moves) in places]
        vectors = structure.unflatten(drawn)
        return vectors, vectors
    if isinstance(direction, Remembered):
        pairs = zip(average, leaves, strict=True)
        vectors = structure.unflatten([leaf if m is None else -m if direction.ahead else m for m, leaf in pairs])
        return vectors, vectors
    if isinstance(direction, Adaptive):
        scales = structure.unflatten([_scale(direction, widened(leaf)) for leaf in leaves])
        measured = jax.tree.map(lambda t, g: t * widened(g), scales, gradients)
        return jax.tree.map(jnp.multiply, scales, measured), measured
    if isinstance(direction, Friendly):
        own = jax.tree.leaves(gradients)
        taken = [g if m is None else widened(g) - direction.sigma * m for g, m in zip(own, average, strict=True)]
        vectors = structure.unflatten(taken)
        return vectors, vectors
    return gradients, gradients


def _scale(direction: Adaptive, leaf: jax.Array) -> jax.Array:
    """T of one leaf."""
    if leaf.ndim <= 1 and not direction.one_dimensional:
        return jnp.ones((), leaf.dtype)
    length = jnp.abs(leaf) if direction.scale == "element" else jnp.sqrt(jnp.sum(jnp.square(leaf)))
    return length + direction.eta
