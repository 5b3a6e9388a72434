"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable

from gradreg.train.data import folders, packaged, timm_sets
from gradreg.train.data.catalogue import TIMM
from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.pools import Source

_SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "digits": packaged.digits,
    "mnist": packaged.mnist,
    "fashion-mnist": packaged.fashion_mnist,
    "cifar10": packaged.cifar10,
    "cifar100": packaged.cifar100,
    "svhn": packaged.svhn,
    "tiny-imagenet": folders.tiny_imagenet,
    "imagenet": folders.imagenet,
    "folder": folders.folder,
}


def read(config: DataConfig) -> Source:
    """The data set that ``config.name`` names.

    Raises:
        ValueError: files that are not there, saying where they are looked for and which keys mend it.
    """
    return timm_sets.read(config) if config.name.startswith(TIMM) else _SOURCES[config.name](config)
