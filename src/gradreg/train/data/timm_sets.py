"""Data sets that timm reaches: those of the Hugging Face hub, WebDataset archives, and torchvision's."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import create_dataset
from torch import Tensor

from gradreg import checks
from gradreg.train.data import samples
from gradreg.train.data.catalogue import TIMM
from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.pools import Encoded, Pixels, Records, Source

_LIBRARIES = ("hfds", "hfids", "wds", "tfds", "torch")
"""What timm reads through: the beginnings of its names."""


def read(config: DataConfig) -> Source:
    """The set that timm knows by the rest of ``config.name``, with the splits that ``config`` names."""
    train, test = _part(config, config.train_split), _part(config, config.test_split)
    labels = torch.cat([train.labels, test.labels])
    if labels.min() < 0:
        raise ValueError(f"images of {config.name!r} must have classes >= 0; got {int(labels.min())}, which marks an image without one.")
    return Source(train, test, classes=int(labels.max()) + 1)


def _part(config: DataConfig, split: str) -> Pixels | Encoded:
    name = config.name.removeprefix(TIMM)
    if name.partition("/")[0].lower() not in _LIBRARIES:
        # timm reads the images under root for any name that it does not know.
        raise ValueError(checks.unknown("data set", config.name, ["folder", *(f"{TIMM}{library}/..." for library in _LIBRARIES)]))
    try:
        dataset = create_dataset(name, root=config.root, split=split, download=config.download)
    except Exception as error:  # of timm, of the library that it asks, or of the network
        raise ValueError(
            f"{config.name!r} could not be opened by timm with data.root {config.root!r} and split {split!r}: {type(error).__name__}: "
            f"{error} See timm.data.create_dataset for the names, and --data.train_split and --data.test_split for the splits."
        ) from error
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, torch.utils.data.IterableDataset):
        return _read_through(config, dataset)
    records = getattr(dataset, "reader", dataset)
    labels = _labels(records)
    return Records(records, labels, torch.arange(len(labels)), name=f"{config.name}, split {split}")


def _labels(records: Any) -> Tensor:
    """The classes of all records, from their list where there is one: reading every image for them takes as long as an epoch."""
    if hasattr(records, "label_key"):
        found = list(records.dataset[records.label_key])
    elif hasattr(records, "targets"):
        found = list(records.targets)
    else:
        found = []
        for index in range(len(records)):
            image, label = records[index]
            image.close()
            found.append(label)
    return torch.tensor(found, dtype=torch.int64)


def _read_through(config: DataConfig, dataset: Any) -> Pixels:
    """A set that can only be read from front to end, read into memory: batches must be found by position, in any order."""
    if config.memory is False:
        raise ValueError(
            f"data.memory must not be false for {config.name!r}, which cannot be read by position; got false. Take a set that can "
            "(timm:hfds/..., folder), or hold this one in memory."
        )
    transform = samples.as_it_is(config.image_size)
    images: list[Tensor] = []
    labels: list[int] = []
    for image, label in dataset:
        images.append(transform(image.convert("RGB")))
        labels.append(int(label))
        if images[-1].shape != images[0].shape:
            raise ValueError(samples.sizes_differ(f"image {len(labels) - 1}", images[-1], images[0].shape))
    return Pixels(torch.stack(images), torch.tensor(labels, dtype=torch.int64))
