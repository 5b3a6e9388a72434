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
    """A training and a test split, how many classes there are, and a split to validate on if one was asked for."""

    train: Split
    test: Split
    classes: int
    validation: Split | None = None

    def to(self, device: torch.device) -> Data:
        validation = None if self.validation is None else self.validation.to(device)
        return Data(self.train.to(device), self.test.to(device), self.classes, validation)


def load(config: DataConfig, *, seed: int) -> Data:
    """The data that ``config`` describes, split and made noisy by ``config.split_seed``, or by ``seed`` where that is null.

    Raises:
        ValueError: an unknown data set, files that are not there, or no image left to test on.
    """
    if config.name not in _SOURCES:
        raise ValueError(checks.unknown("data set", config.name, _SOURCES))
    pool, test = _SOURCES[config.name](config)
    size = len(pool) if config.train_size is None else config.train_size
    if size > len(pool) - (test is None):
        raise ValueError(
            f"data.train_size must be {'<' if test is None else '<='} {len(pool)}, the images of {config.name!r}; got {size}."
            + (" Leave some to test on." if test is None else "")
        )
    classes = int(pool.labels.max()) + 1
    generator = torch.Generator().manual_seed(seed if config.split_seed is None else config.split_seed)
    order = torch.randperm(len(pool), generator=generator)
    chosen, rest = order[:size], order[size:]
    noisy = with_label_noise(pool.labels[chosen], config.label_noise, classes, generator)
    # Drawn at random already, so that its last images are as good a sample as any.
    train, validation = chosen.split([size - (held := config.validation_images(size)), held])
    return Data(
        train=Split(pool.images[train], noisy[: len(train)]),
        test=Split(pool.images[rest], pool.labels[rest]) if test is None else test,
        classes=classes,
        validation=Split(pool.images[validation], noisy[len(train) :]) if held else None,
    )


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


def _digits(config: DataConfig) -> tuple[Split, Split | None]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Split(torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels, dtype=torch.int64)), None


def _mnist(config: DataConfig) -> tuple[Split, Split | None]:
    from torchvision.datasets import MNIST

    try:
        parts = [MNIST(config.root, train=train, download=config.download) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"data.root must hold MNIST, as {config.root}/MNIST/raw/train-images-idx3-ubyte and the like; got {config.root!r}: {error} "
            "Name the folder with --data.root, or let it be fetched with --data.download true."
        ) from error
    train, test = (Split(part.data.unsqueeze(1).to(torch.float32) / 255.0, part.targets) for part in parts)
    return train, test


_SOURCES = {"digits": _digits, "mnist": _mnist}
"""Data set -> function of its configuration: the images to train on, and a test set where there is one."""
