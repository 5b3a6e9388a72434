"""Data sets by name: their images as bytes and their labels, read from files or from a package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradreg import checks
from gradreg.train.data.configuration import DataConfig


@dataclass(frozen=True)
class Pixels:
    """Labelled images in memory: (n, channels, height, width), uint8, and their classes (n,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """A data set as it is kept.

    Args:
        train: images to train on.
        test: images to test on; None where the set has none of its own.
        classes: how many.
        largest: the byte that is white.
    """

    train: Pixels
    test: Pixels | None
    classes: int
    largest: int = 255


def read(config: DataConfig) -> Source:
    """The data set that ``config.name`` names.

    Raises:
        ValueError: an unknown data set, or files that are not there.
    """
    if config.name not in _SOURCES:
        raise ValueError(checks.unknown("data set", config.name, _SOURCES))
    return _SOURCES[config.name](config)


def _digits(config: DataConfig) -> Source:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.uint8).reshape(-1, 1, 8, 8)
    return Source(Pixels(pixels, torch.tensor(labels, dtype=torch.int64)), None, classes=10, largest=16)


def _mnist(config: DataConfig) -> Source:
    from torchvision.datasets import MNIST

    try:
        parts = [MNIST(config.root, train=train, download=config.download) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"data.root must hold MNIST, as {config.root}/MNIST/raw/train-images-idx3-ubyte and the like; got {config.root!r}: {error} "
            "Name the folder with --data.root, or let it be fetched with --data.download true."
        ) from error
    train, test = (Pixels(part.data.unsqueeze(1), part.targets) for part in parts)
    return Source(train, test, classes=10)


def _cifar10(config: DataConfig) -> Source:
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(config.root, train=train, download=config.download) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"data.root must hold CIFAR-10, as {config.root}/cifar-10-batches-py/data_batch_1 and the like; got {config.root!r}: {error} "
            "Name the folder with --data.root, or let it be fetched with --data.download true."
        ) from error
    train, test = (Pixels(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts)
    return Source(train, test, classes=10)


_SOURCES = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}
