"""Data sets that come as bytes in one piece: scikit-learn's digits, and those that torchvision reads and downloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradreg.train.data import folders
from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.pools import Pixels, Source


def digits(config: DataConfig) -> Source:
    """scikit-learn's: 1,797 images of 8 x 8 pixels with 17 levels of grey."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.uint8).reshape(-1, 1, 8, 8)
    return Source(Pixels(pixels, torch.tensor(labels, dtype=torch.int64), largest=16), None, classes=10)


def mnist(config: DataConfig) -> Source:
    """MNIST: 60,000 and 10,000 images of handwritten digits, 28 x 28 pixels."""
    from torchvision.datasets import MNIST

    return _grey(config, MNIST, "MNIST", "MNIST/raw/train-images-idx3-ubyte")


def fashion_mnist(config: DataConfig) -> Source:
    """Fashion-MNIST: 60,000 and 10,000 images of clothes, 28 x 28 pixels."""
    from torchvision.datasets import FashionMNIST

    return _grey(config, FashionMNIST, "Fashion-MNIST", "FashionMNIST/raw/train-images-idx3-ubyte")


def cifar10(config: DataConfig) -> Source:
    """CIFAR-10: 50,000 and 10,000 photographs of 32 x 32 pixels; torchvision's files, or class folders."""
    from torchvision.datasets import CIFAR10

    return _cifar(config, CIFAR10, "CIFAR-10", "data_batch_1", classes=10)


def cifar100(config: DataConfig) -> Source:
    """CIFAR-100: 50,000 and 10,000 photographs of 32 x 32 pixels; torchvision's files, or class folders."""
    from torchvision.datasets import CIFAR100

    return _cifar(config, CIFAR100, "CIFAR-100", "train", classes=100)


def svhn(config: DataConfig) -> Source:
    """SVHN, cropped digits: 73,257 and 26,032 photographs of house numbers, 32 x 32 pixels."""
    from torchvision.datasets import SVHN

    def part(train: bool) -> Pixels:
        found = SVHN(config.root, split="train" if train else "test", download=config.download)
        return Pixels(torch.from_numpy(found.data), torch.from_numpy(found.labels))

    return _parts(config, part, "SVHN", "train_32x32.mat", classes=10)


def _grey(config: DataConfig, dataset: Any, title: str, example: str) -> Source:
    def part(train: bool) -> Pixels:
        found = dataset(config.root, train=train, download=config.download)
        return Pixels(found.data.unsqueeze(1), found.targets)

    return _parts(config, part, title, example, classes=10)


def _cifar(config: DataConfig, dataset: Any, title: str, example: str, *, classes: int) -> Source:
    inside = dataset.base_folder
    if not (Path(config.root) / inside).is_dir() and folders.named(config) is not None:
        return folders.named_set(config, classes=classes)

    def part(train: bool) -> Pixels:
        found = dataset(config.root, train=train, download=config.download)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return Pixels(images, torch.tensor(found.targets))

    return _parts(config, part, title, f"{inside}/{example}", classes=classes, folder=f"{config.name}/train/CLASS/*.png")


def _parts(
    config: DataConfig, part: Callable[[bool], Pixels], title: str, example: str, *, classes: int, folder: str | None = None
) -> Source:
    """The training and the test images, or an error that says where they are looked for."""
    try:
        return Source(part(True), part(False), classes=classes)
    except RuntimeError as error:
        or_folder = f" (or class folders as {config.root}/{folder})" if folder else ""
        raise ValueError(
            f"data.root must hold {title}, as {config.root}/{example} and the like{or_folder}; got {config.root!r}: {error}. "
            "Name the folder with --data.root, or let it be fetched with --data.download true."
        ) from error
