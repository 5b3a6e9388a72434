"""Random numbers for the coordinates of parameters, from ``gradreg.hashing``: the same as PyTorch's for the same indices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gradreg.hashing import hashed


def signs(seed: int, counter: Any, index: int, like: jax.Array) -> jax.Array:
    """+1 or −1 for each coordinate of a leaf, in the dtype of ``like``: +1 where bit i mod 32 of word ⌊i/32⌋ is 1."""
    # Each coordinate hashes its own word, 32 times more hashing than needed: XLA fuses it into one pass over the leaf without
    # intermediate arrays, and each shard of a sharded leaf computes its part without communication.
    i = _coordinates(like)
    bit = (_words(seed, counter, index, i // 32) >> (i % 32)) & 1
    return jnp.where(bit, 1.0, -1.0).astype(like.dtype)


def chosen(share: float, seed: int, counter: Any, index: int, like: jax.Array) -> jax.Array:
    """Whether each coordinate of a leaf is chosen, independently with probability ``share``: where its own word is below share·2³²."""
    bound = round(share * 2**32)
    if bound == 2**32:  # does not fit into 32 bits
        return jnp.ones(like.shape, bool)
    return _words(seed, counter, index, _coordinates(like)) < jnp.uint32(bound)


def _coordinates(like: jax.Array) -> jax.Array:
    """The index of each coordinate in the flattened leaf."""
    return jax.lax.iota(jnp.uint32, like.size).reshape(like.shape)


def _words(seed: int, counter: Any, index: int, numbers: jax.Array) -> jax.Array:
    """32 random bits for each of ``numbers``, which depend on ``seed``, ``counter``, the leaf's index among all leaves and the number."""
    # Casts to uint32 reduce modulo 2³² at no cost, also of traced steps, where Python's ``& 0xFFFFFFFF`` would need 64-bit integers.
    uint32: Any = jnp.uint32
    return hashed(hashed(hashed(seed, counter, uint32), index, uint32), numbers, uint32)
