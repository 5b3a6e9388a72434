"""Random numbers that are a function of where they are used, not of what was drawn before: resuming, or more processes, change nothing."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What numbers are drawn for, so that no two purposes share theirs."""

    IMAGE = 0
    """Geometry and colours of one streamed image, by its position."""
    BATCH = 1
    """Geometry and colours of the images of a batch in memory, by its number, as for those that follow."""
    CUTTING = 2
    MIXING = 3


def generator(seed: int, epoch: int, number: int, purpose: Purpose) -> torch.Generator:
    """A generator on the CPU that starts at ``seed_of`` the same."""
    return torch.Generator().manual_seed(seed_of(seed, epoch, number, purpose))


def seed_of(seed: int, epoch: int, number: int, purpose: Purpose) -> int:
    """A seed of 63 bits; where one of the four numbers (each ≥ 0) differs, seeds have nothing to do with each other."""
    return int(np.random.SeedSequence((purpose, number, epoch, seed)).generate_state(1, np.uint64)[0]) >> 1


class EpochOrder:
    """The order of epoch e: the e-th ``torch.randperm(size)`` drawn in succession from one generator seeded with ``seed``.

    Asked for an earlier epoch than the last, it draws again from the start.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self._size, self._seed = size, seed
        self._rewind()

    def __call__(self, epoch: int) -> Tensor:
        """Positions (size,) in the order of ``epoch`` ≥ 1."""
        if epoch < self._drawn:
            self._rewind()
        while self._drawn < epoch:
            self._order = torch.randperm(self._size, generator=self._generator)
            self._drawn += 1
        return self._order

    def _rewind(self) -> None:
        self._generator = torch.Generator().manual_seed(self._seed)
        self._drawn = 0
        self._order = torch.empty(0, dtype=torch.int64)
