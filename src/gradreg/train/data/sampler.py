"""Which images make up a batch, which of them are this process's, and the seeds of their random numbers.

Random numbers depend on where they are used, not on earlier draws: resuming a run, or dividing it among more processes or
workers, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from gradreg import checks


class Purpose(IntEnum):
    """The purpose of random numbers, so that different purposes have independent ones."""

    IMAGE = 0
    """Geometry and colors of one streamed image, by its position."""
    BATCH = 1
    """Geometry and colors of the images of a batch in memory, by its number, as for those that follow."""
    ERASING = 2
    MIXING = 3


def seed_of(seed: int, epoch: int, number: int, purpose: Purpose) -> int:
    """A seed of 63 bits; seeds for which one of the four numbers (each ≥ 0) differs are independent of each other."""
    return int(np.random.SeedSequence((purpose, number, epoch, seed)).generate_state(1, np.uint64)[0]) >> 1


@dataclass(frozen=True)
class BatchIndices:
    """The images of a batch that one process needs.

    They are rows of the whole batch, so that every process draws the same random numbers for a row.

    Args:
        epoch: counted from 1; 0 for evaluation.
        number: of the batch within the epoch, counted from 0.
        positions: (n,) int64, the images of the whole batch by their position in the set.
        rows: (m,) int64, the rows of ``positions`` that this process needs.
        neighbors: how many of the first rows are needed for mixing alone, 0 or 1.
        share: of the batch that is this process's, 0 to 1.
        fewest: images that every process has at least, ≥ 1.
    """

    epoch: int
    number: int
    positions: Tensor
    rows: Tensor
    neighbors: int
    share: float
    fewest: int

    @property
    def selected(self) -> Tensor:
        """(m,) int64: the positions in the set of the images that this process needs."""
        return self.positions[self.rows]

    def seed(self, seed: int, purpose: Purpose) -> int:
        """The seed of this batch's random numbers for ``purpose``, in a run with ``seed``."""
        return seed_of(seed, self.epoch, self.number, purpose)

    def generator(self, seed: int, purpose: Purpose) -> torch.Generator:
        """A new generator on the CPU with that seed."""
        return torch.Generator().manual_seed(self.seed(seed, purpose))


class EpochOrder:
    """The order of epoch e: the e-th ``torch.randperm(size)`` drawn in succession from one generator seeded with ``seed``.

    For an earlier epoch than the last one, it draws again from the start.
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


@dataclass(frozen=True)
class BatchSampler:
    """Divides an order of images into batches, and takes this process's part of each.

    Args:
        rank: of this process, 0 to ``processes`` - 1.
        processes: how many share every batch, ≥ 1.
    """

    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        checks.whole("processes", self.processes, minimum=1)
        if checks.whole("rank", self.rank, minimum=0) >= self.processes:
            raise ValueError(f"rank must be < processes, {self.processes}; got {self.rank}. Ranks count from 0.")

    def batches(self, order: Tensor, size: int, *, epoch: int, start: int = 0, mixing: bool = False) -> list[BatchIndices]:
        """This process's part of every batch of an epoch.

        Args:
            order: (n,) int64, the positions of the images in the order of the epoch.
            size: images of a whole batch, ≥ 1; the last batch may be smaller.
            epoch: counted from 1; 0 for evaluation.
            start: the first batch, ≥ 0.
            mixing: whether every image needs the one before it, the first the last.
        """
        batches = order.split(checks.whole("size", size, minimum=1))[checks.whole("start", start, minimum=0) :]
        return [self.part(epoch, number, positions, mixing=mixing) for number, positions in enumerate(batches, start)]

    def part(self, epoch: int, number: int, positions: Tensor, *, mixing: bool = False) -> BatchIndices:
        """This process's part of one batch: a contiguous piece of it, the pieces differing by at most one image.

        Args:
            epoch: of the batch.
            number: of the batch in the epoch.
            positions: (n,), the whole batch.
            mixing: as in ``batches``.
        """
        n = len(positions)
        rows = torch.arange(self.rank * n // self.processes, (self.rank + 1) * n // self.processes)
        share = len(rows) / n
        if not len(rows):
            # All processes must take the same number of steps, so one without a part computes an image with share 0.
            rows = torch.tensor([self.rank % n])
        neighbors = int(mixing and len(rows) < n)
        if neighbors:
            rows = torch.cat([(rows[:1] - 1) % n, rows])
        return BatchIndices(epoch, number, positions, rows, neighbors, share, fewest=max(1, n // self.processes))
