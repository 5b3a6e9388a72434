"""The sets that a run trains and evaluates on: which images make up each batch, and which of them are this process's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradreg import checks
from gradreg.train.data.draws import EpochOrder


@dataclass(frozen=True)
class Batch:
    """One process's part of a batch.

    Args:
        images: (n, channels, height, width), float32, augmented and normalised.
        targets: (n,), int64 classes, or (n, classes) float32 where images are mixed.
        labels: (n,), int64 classes.
        share: n over the images of the whole batch in all processes, 0 to 1; the shares of all processes add up to 1.
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    share: float


@dataclass(frozen=True)
class Request:
    """What is wanted of a batch: rows of it, by their place in the whole batch, so that any process draws the same numbers for a row.

    Args:
        epoch: counted from 1.
        number: of the batch within the epoch, counted from 0.
        positions: (n,) int64, the images of the whole batch by their position among all images.
        rows: (m,) int64, the places in ``positions`` of the images that are wanted here.
    """

    epoch: int
    number: int
    positions: Tensor
    rows: Tensor


class Images(Protocol):
    """Where images come from, and what becomes of them on the way: memory or files."""

    def for_training(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """Augmented images (m, channels, height, width), float32, on the device, for each request."""
        ...

    def for_evaluation(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """The same without augmentation."""
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

    def rows(self, size: int) -> Tensor:
        """This process's places in a batch of ``size``: one contiguous piece. Sizes differ by at most one; some may be empty."""
        return torch.arange(self.rank * size // self.count, (self.rank + 1) * size // self.count)


class TrainingSet:
    """Images to train on, in a new order every epoch.

    Args:
        images: where they come from.
        positions: (n,) int64, which of ``images`` belong to the set.
        labels: (n,) int64, their classes.
        seed: of the order.
        device: where batches are wanted.
        processes: which part of each batch is this process's.
    """

    def __init__(self, images: Images, positions: Tensor, labels: Tensor, *, seed: int, device: torch.device, processes: Processes) -> None:
        self._images, self._positions, self._labels = images, positions, labels
        self._order = EpochOrder(len(positions), seed=seed)
        self._device, self._processes = device, processes

    def __len__(self) -> int:
        """Images in an epoch, over all processes."""
        return len(self._positions)

    def batches(self, epoch: int, size: int, *, start: int = 0) -> Iterator[Batch]:
        """This process's part of the batches of ``epoch``, once through the set in random order; the last batch may be smaller.

        Args:
            epoch: counted from 1; the same epoch gives the same batches, whatever was asked for before.
            size: images of a whole batch over all processes, ≥ 1. A process whose part of a small batch is empty gets an image of
                it with ``share`` 0, so that all processes take as many steps.
            start: the first batch wanted, ≥ 0; those before it are not loaded.
        """
        checks.whole("epoch", epoch, minimum=1)
        parts = self._order(epoch).split(checks.whole("size", size, minimum=1))[checks.whole("start", start, minimum=0) :]
        requests: list[Request] = []
        shares: list[float] = []
        for number, part in enumerate(parts, start):
            rows = self._processes.rows(len(part))
            shares.append(len(rows) / len(part))
            rows = rows if len(rows) else torch.tensor([self._processes.rank % len(part)])
            requests.append(Request(epoch, number, self._positions[part], rows))
        images = self._images.for_training(requests)
        for part, request, share, pixels in zip(parts, requests, shares, images, strict=True):
            labels = self._labels[part[request.rows]].to(self._device, non_blocking=True)
            yield Batch(pixels, labels, labels, share)


class EvaluationSet:
    """Images to evaluate on, in a fixed order and as they are.

    Args:
        images: where they come from.
        positions: (n,) int64, which of ``images`` belong to the set.
        labels: (n,) int64, their classes.
        device: where batches are wanted.
        processes: which part of each batch is this process's.
    """

    def __init__(self, images: Images, positions: Tensor, labels: Tensor, *, device: torch.device, processes: Processes) -> None:
        self._images, self._positions, self._labels = images, positions, labels
        self._device, self._processes = device, processes

    def __len__(self) -> int:
        """Images over all processes."""
        return len(self._positions)

    def batches(self, size: int) -> Iterator[Batch]:
        """This process's part of the batches: over all processes every image exactly once.

        Args:
            size: images of a whole batch over all processes, ≥ 1; the last may be smaller, and leave this process without a part.
        """
        parts = torch.arange(len(self)).split(checks.whole("size", size, minimum=1))
        rows = [self._processes.rows(len(part)) for part in parts]
        mine = [(number, part, here) for number, (part, here) in enumerate(zip(parts, rows, strict=True)) if len(here)]
        requests = [Request(1, number, self._positions[part], here) for number, part, here in mine]
        for (_, part, here), pixels in zip(mine, self._images.for_evaluation(requests), strict=True):
            labels = self._labels[part[here]].to(self._device, non_blocking=True)
            yield Batch(pixels, labels, labels, len(here) / len(part))
