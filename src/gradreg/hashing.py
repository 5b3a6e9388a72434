"""Random numbers without a generator: a 32-bit hash of a seed and a counter, the same for Python integers and arrays of any framework.

A draw depends only on its arguments, not on earlier draws, so a resumed run and every rank of a parallel one agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_LARGEST = 0xFFFFFFFF

ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""What ``mixed`` does: for each pair, fold x onto itself shifted right by the first number, then multiply by the second."""
LAST_SHIFT = 16
"""The shift of the fold that comes after them."""


def masked(value: Any) -> Any:
    """``value`` modulo 2³²: for Python integers and 64-bit integer tensors, whose products may overflow but keep their lowest 32 bits."""
    return value & _LARGEST


def hashed(seed: int, counter: Any, uint32: Callable[[Any], Any] = masked) -> Any:
    """32 bits that depend on ``seed`` and ``counter``: an integer from 0 to 2³² − 1, or an array of them, one for each counter.

    Args:
        seed: a whole number ≥ 0.
        counter: a whole number ≥ 0 or an array of them.
        uint32: reduces modulo 2³²: ``masked``, or a cast to an unsigned type of 32 bits (``jax.numpy.uint32``).

    Source: ``mixed``, applied to the seed, then to its sum with the counter.

    >>> hashed(0, 1) == hashed(0, 1), hashed(0, 1) == hashed(1, 1)
    (True, False)
    """
    return mixed(uint32(mixed(uint32(seed), uint32) + uint32(counter)), uint32)


def mixed(x: Any, uint32: Callable[[Any], Any] = masked) -> Any:
    """A bijection of 0 to 2³² − 1 in which every bit of the result depends on all bits of ``x``.

    Source: the finalizer "lowbias32" of Wellons 2018 (a hash of 32 bits found by search).
    """
    for shift, factor in ROUNDS:
        x = uint32((x ^ (x >> shift)) * uint32(factor))
    return x ^ (x >> LAST_SHIFT)
