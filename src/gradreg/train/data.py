"""Data sets held in memory: loaded, split, their labels made noisy, and dealt out in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradreg import checks
from gradreg.train.configuration import DataConfig


@dataclass(frozen=True)
class Split:
    """Images (n, channels, height, width), float32, and their classes (n,), int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A training and a test split, and how many classes there are."""

    train: Split
    test: Split
    classes: int

    def to(self, device: torch.device) -> Data:
        return Data(self.train.to(device), self.test.to(device), self.classes)


def load(config: DataConfig, *, seed: int) -> Data:
    """The data that ``config`` describes, split and made noisy by ``config.split_seed``, or by ``seed`` where that is null.

    Raises:
        ValueError: an unknown data set, or no image left to test on.
    """
    if config.name not in _SOURCES:
        raise ValueError(checks.unknown("data set", config.name, _SOURCES))
    images, labels = _SOURCES[config.name]()
    if config.train_size >= len(labels):
        raise ValueError(
            f"data.train_size must be < {len(labels)}, the images of {config.name!r}; got {config.train_size}. Leave some to test on."
        )
    classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed if config.split_seed is None else config.split_seed)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[: config.train_size], order[config.train_size :]
    noisy = with_label_noise(labels[train], config.label_noise, classes, generator)
    return Data(train=Split(images[train], noisy), test=Split(images[test], labels[test]), classes=classes)


def with_label_noise(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """``labels`` (n,) with ``round(share · n)`` of them replaced by a class drawn evenly from all, the true one included."""
    noisy = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return noisy


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The split once through in random order, in batches of ``size``; the last may be smaller. The generator lives on the CPU."""
    order = torch.randperm(len(split), generator=generator).to(split.labels.device)
    for part in order.split(size):
        yield split.images[part], split.labels[part]


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels, dtype=torch.int64)


_SOURCES = {"digits": _digits}
