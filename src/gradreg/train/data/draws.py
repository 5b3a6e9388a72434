"""Random numbers that are a function of where they are used, not of what was drawn before: resuming, or more processes, change nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def generator(*key: int) -> torch.Generator:
    """A generator on the CPU seeded by the whole ``key`` (each ≥ 0): seed, epoch, number of the batch, say."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    """A seed of 63 bits for ``key``; keys that differ in one number give seeds that have nothing to do with each other."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


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
