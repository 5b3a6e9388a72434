"""What the tests of data share: sets from their keys, and batches as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.data.loading import Data, load
from gradreg.train.data.sets import Batch


def loaded(
    *, seed: int = 0, rank: int = 0, processes: int = 1, augmentation: dict[str, Any] | None = None, device: str = "cpu", **keys: Any
) -> Data:
    """The sets that the keys of ``data`` and of ``augmentation`` describe."""
    config, chosen = DataConfig(**keys), AugmentationConfig(**(augmentation or {}))
    return load(config, chosen, seed=seed, device=torch.device(device), rank=rank, processes=processes)


def joined(batches: Iterator[Batch]) -> Batch:
    """All batches as one."""
    images, targets, labels, shares = zip(*((b.images, b.targets, b.labels, b.share) for b in batches), strict=True)
    return Batch(torch.cat(images), torch.cat(targets), torch.cat(labels), sum(shares))
