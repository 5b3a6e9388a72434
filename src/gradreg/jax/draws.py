"""Random numbers for the coordinates of parameters, from ``gradreg.hashing``: the same as PyTorch's for the same indices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gradreg.hashing import hashed


def signs(seed: int, counter: Any, index: int, like: jax.Array) -> jax.Array:
    """+1 or −1 for each coordinate of a leaf, in the dtype of ``like``: +1 where bit i mod 32 of word ⌊i/32⌋ is 1.

    Every coordinate hashes the number of its word: XLA fuses that into one pass over the leaf, which may be sharded in any way.
    """
    i = _coordinates(like)
    bit = (_words(seed, counter, index, i // 32) >> (i % 32)) & 1
    return jnp.where(bit, 1.0, -1.0).astype(like.dtype)


def chosen(share: float, seed: int, counter: Any, index: int, like: jax.Array) -> jax.Array:
    """Whether each coordinate of a leaf is chosen, each for itself with probability ``share``: where its own word is below share·2³²."""
    bound = round(share * 2**32)
    if bound == 2**32:  # which does not fit into 32 bits
        return jnp.ones(like.shape, bool)
    return _words(seed, counter, index, _coordinates(like)) < jnp.uint32(bound)


def _coordinates(like: jax.Array) -> jax.Array:
    """The index of each coordinate in the flattened leaf."""
    return jax.lax.iota(jnp.uint32, like.size).reshape(like.shape)


def _words(seed: int, counter: Any, index: int, numbers: jax.Array) -> jax.Array:
    """32 random bits for each of ``numbers``, which depend on ``seed``, ``counter``, the leaf's index among all leaves and the number."""
    uint32: Any = jnp.uint32
    return hashed(hashed(hashed(seed, counter, uint32), index, uint32), numbers, uint32)
