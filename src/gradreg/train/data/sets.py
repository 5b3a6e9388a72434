"""The sets that a run trains and evaluates on: which images make up each batch, and which of them are this process's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradreg import checks
from gradreg.train.data.colours import ColourScale
from gradreg.train.data.draws import EpochOrder
from gradreg.train.data.finishing import Finish
from gradreg.train.data.requests import Images, Processes


@dataclass(frozen=True)
class Batch:
    """One process's part of a batch.

    Args:
        images: (n, channels, height, width), float32, augmented and normalised.
        targets: (n,), int64 classes, or (n, classes) float32 where images are mixed.
        labels: (n,), int64 classes.
        share: n over the images of the whole batch in all processes, 0 to 1; the shares of all processes add up to 1.
        fewest: images that every process has at least, ≥ 1 and the same on all.
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    share: float
    fewest: int


class TrainingSet:
    """Images to train on, in a new order every epoch.

    Args:
        images: where they come from, augmented one by one.
        labels: (n,) int64, their classes.
        finish: what makes floats of a batch, and all that mixes its images.
        seed: of the order.
        device: where batches are wanted.
        processes: which part of each batch is this process's.
    """

    def __init__(self, images: Images, labels: Tensor, finish: Finish, *, seed: int, device: torch.device, processes: Processes) -> None:
        self._images, self._labels, self._finish = images, labels, finish
        self._order = EpochOrder(len(labels), seed=seed)
        self._device, self._processes = device, processes

    def __len__(self) -> int:
        """Images in an epoch, over all processes."""
        return len(self._labels)

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
        mixing = self._finish.mixes
        requests = [self._processes.part(epoch, number, part, mixing=mixing) for number, part in enumerate(parts, start)]
        for request, pixels in zip(requests, self._images.batches(requests), strict=True):
            labels = self._labels[request.positions[request.rows]].to(self._device, non_blocking=True)
            images, targets = self._finish(pixels, labels, request)
            mine = slice(request.before, None)
            yield Batch(images[mine], targets[mine], labels[mine], request.share, request.fewest)


class EvaluationSet:
    """Images to evaluate on, in a fixed order and as they are.

    Args:
        images: where they come from.
        labels: (n,) int64, their classes.
        scale: what makes floats of them.
        device: where batches are wanted.
        processes: which part of each batch is this process's.
    """

    def __init__(self, images: Images, labels: Tensor, scale: ColourScale, *, device: torch.device, processes: Processes) -> None:
        self._images, self._labels, self._scale = images, labels, scale
        self._device, self._processes = device, processes

    def __len__(self) -> int:
        """Images over all processes."""
        return len(self._labels)

    def batches(self, size: int) -> Iterator[Batch]:
        """This process's part of the batches: over all processes every image exactly once.

        Args:
            size: images of a whole batch over all processes, ≥ 1; the last may be smaller, and leave this process without a part.
        """
        parts = torch.arange(len(self)).split(checks.whole("size", size, minimum=1))
        requests = [self._processes.part(0, number, part, mixing=False) for number, part in enumerate(parts)]
        requests = [request for request in requests if request.share]
        for request, pixels in zip(requests, self._images.batches(requests), strict=True):
            labels = self._labels[request.positions[request.rows]].to(self._device, non_blocking=True)
            yield Batch(self._scale(pixels), labels, labels, request.share, request.fewest)
