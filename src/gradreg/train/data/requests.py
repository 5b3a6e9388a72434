"""Which images of a batch a process needs, and who supplies them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradreg import checks


@dataclass(frozen=True)
class Request:
    """What is wanted of a batch: rows of it, by their place in the whole batch, so that any process draws the same numbers for a row.

    Args:
        epoch: counted from 1; 0 for evaluation.
        number: of the batch within the epoch, counted from 0.
        positions: (n,) int64, the images of the whole batch by their position in the set.
        rows: (m,) int64, the places in ``positions`` of the images that are wanted here.
        before: how many of the first rows are wanted for mixing alone, 0 or 1.
        share: of the batch that is this process's, 0 to 1.
        fewest: images that every process has at least, ≥ 1.
    """

    epoch: int
    number: int
    positions: Tensor
    rows: Tensor
    before: int
    share: float
    fewest: int


class Images(Protocol):
    """The images of one set: in memory, or decoded on the way."""

    def batches(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """The images of each request, (m, channels, height, width), uint8, on the device, as training or evaluation wants them."""
        ...


@dataclass(frozen=True)
class Processes:
    """This process among those that share every batch.

    Args:
        rank: of this process, 0 to ``count`` - 1.
        count: of processes, ≥ 1.
    """

    rank: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        checks.whole("processes", self.count, minimum=1)
        if checks.whole("rank", self.rank, minimum=0) >= self.count:
            raise ValueError(f"rank must be < processes, {self.count}; got {self.rank}. Ranks count from 0.")

    def part(self, epoch: int, number: int, positions: Tensor, *, mixing: bool) -> Request:
        """This process's part of a batch: a contiguous piece of it, the pieces differing by at most one image.

        Args:
            epoch: of the batch.
            number: of the batch in the epoch.
            positions: (n,), the whole batch.
            mixing: whether every image needs the one before it, the first the last.
        """
        n = len(positions)
        rows = torch.arange(self.rank * n // self.count, (self.rank + 1) * n // self.count)
        share = len(rows) / n
        if not len(rows):
            rows = torch.tensor([self.rank % n])
        before = int(mixing and len(rows) < n)
        if before:
            rows = torch.cat([(rows[:1] - 1) % n, rows])
        return Request(epoch, number, positions, rows, before, share, fewest=max(1, n // self.count))
