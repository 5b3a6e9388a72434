"""Random numbers for the coordinates of parameters, from ``gradreg.hashing``: those of PyTorch at the same places."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gradreg.hashing import hashed


def signs(seed: int, counter: Any, place: int, like: jax.Array) -> jax.Array:
    """+1 or −1 for each coordinate of a leaf, in the dtype of ``like``."""
    return jnp.where(_bits(seed, counter, place, like) & 1, 1.0, -1.0).astype(like.dtype)


def chosen(share: float, seed: int, counter: Any, place: int, like: jax.Array) -> jax.Array:
    """Whether each coordinate of a leaf is chosen, each for itself with probability ``share``."""
    bound = round(share * 2**32)
    if bound == 2**32:  # which does not fit into 32 bits
        return jnp.ones(like.shape, bool)
    return _bits(seed, counter, place, like) < jnp.uint32(bound)


def _bits(seed: int, counter: Any, place: int, like: jax.Array) -> jax.Array:
    """32 random bits for each coordinate, which depend on ``seed``, ``counter``, the leaf's place among all leaves and the coordinate."""
    uint32: Any = jnp.uint32
    coordinates = jax.lax.iota(uint32, like.size).reshape(like.shape)
    return hashed(hashed(hashed(seed, counter, uint32), place, uint32), coordinates, uint32)
