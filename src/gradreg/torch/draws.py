"""Random numbers for the coordinates of parameters, from ``gradreg.hashing``: the same for whoever holds a coordinate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradreg.hashing import hashed
from gradreg.torch.parallel import element_indices


def bits(seed: int, counter: int, parameters: Iterable[tuple[int, Tensor]]) -> list[Tensor]:
    """32 random bits for each coordinate, int64, of pairs of a parameter's place in the model and the parameter: this rank's shards.

    They depend on ``seed``, ``counter``, the place and the coordinate. About a dozen operations a tensor.
    """
    return [hashed(hashed(hashed(seed, counter), place), element_indices(p)) for place, p in parameters]


def signs(seed: int, counter: int, parameters: Iterable[tuple[int, Tensor]]) -> list[Tensor]:
    """+1 or −1 for each coordinate, in the dtype of the parameter."""
    pairs = list(parameters)
    return [(2 * (b & 1) - 1).to(p.dtype) for b, (_, p) in zip(bits(seed, counter, pairs), pairs, strict=True)]


def chosen(share: float, seed: int, counter: int, parameters: Iterable[tuple[int, Tensor]]) -> list[Tensor]:
    """Whether each coordinate is chosen, each for itself with probability ``share``."""
    return [torch.lt(b, round(share * 2**32)) for b in bits(seed, counter, parameters)]
