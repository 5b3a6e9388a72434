"""Which coordinates are moved: the leaves of normalization layers, or a share of all coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradreg.jax.draws import chosen
from gradreg.jax.perturbation import Tree, widened
from gradreg.masks import Sparse

Masks = list[jax.Array | None]
"""Leaf by leaf, whether each coordinate is moved; None for a leaf of which none is."""


def in_norm_layer(name: str) -> bool:
    """Whether a part of a leaf's path contains "norm" or begins with "bn", in any case: "LayerNorm_0/scale", "bn1/bias"."""
    return any("norm" in part or part.startswith("bn") for part in name.lower().split("/"))


def drawn(mask: Sparse, params: Tree, step: Any, selected: Sequence[bool]) -> Masks:
    """The random choice at ``step``, the same until the next refresh."""
    leaves = enumerate(zip(jax.tree.leaves(params), selected, strict=True))
    share = 1.0 - mask.sparsity
    return [
        chosen(share, mask.seed, step // mask.every, place, jnp.asarray(leaf)) if counted else None for place, (leaf, counted) in leaves
    ]


def largest(share: float, gradients: Tree, selected: Sequence[bool]) -> Masks:
    """Whether each element is among the ``share`` of largest magnitude of all ``selected`` leaves together; ties with the smallest are too.

    The bound is found bit by bit, for non-negative floats are ordered as the integers with the same bits: 31 or 63 counts, in place of a
    sort that would first gather all leaves, sharded or not, into one array.
    """
    leaves = [widened(leaf) if counted else None for leaf, counted in zip(jax.tree.leaves(gradients), selected, strict=True)]
    kept = [leaf for leaf in leaves if leaf is not None]
    dtype = jnp.result_type(*kept)
    integer, highest = (jnp.uint64, 62) if dtype == jnp.float64 else (jnp.uint32, 30)

    def ordered(leaf: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(jnp.abs(leaf).astype(dtype), integer)

    wanted = max(1, round(share * sum(leaf.size for leaf in kept)))

    def narrowed(i: Any, bound: jax.Array) -> jax.Array:
        candidate = bound | (jnp.ones((), integer) << (highest - i).astype(integer))
        count = sum(jnp.sum(ordered(leaf) >= candidate, dtype=jnp.uint32) for leaf in kept)
        return jnp.where(count >= wanted, candidate, bound)

    zero = sum(jnp.sum(ordered(leaf)) for leaf in kept) & 0  # of the leaves, so that shard_map marks it as varying where they are
    bound = jax.lax.fori_loop(0, highest + 1, narrowed, zero)
    return [None if leaf is None else ordered(leaf) >= bound for leaf in leaves]


def masked(vectors: Tree, masks: Masks) -> Tree:
    """``vectors`` with zeros where they are not to move anything."""
    leaves, structure = jax.tree.flatten(vectors)
    return structure.unflatten([leaf if mask is None else jnp.where(mask, leaf, 0) for leaf, mask in zip(leaves, masks, strict=True)])
