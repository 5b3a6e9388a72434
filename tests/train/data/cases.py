"""What the tests of data share: sets from their keys, batches as one, and folders of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.data.loader import Batch, Data, load


def loaded(
    *, seed: int = 0, rank: int = 0, processes: int = 1, augmentation: dict[str, Any] | None = None, device: str = "cpu", **keys: Any
) -> Data:
    """The sets that the keys of ``data`` and of ``augmentation`` describe."""
    config, chosen = DataConfig(**keys), AugmentationConfig(**(augmentation or {}))
    return load(config, chosen, seed=seed, device=torch.device(device), rank=rank, processes=processes)


def joined(batches: Iterator[Batch]) -> Batch:
    """All batches as one."""
    images, targets, labels, shares, fewest = zip(*((b.images, b.targets, b.labels, b.share, b.fewest) for b in batches), strict=True)
    return Batch(torch.cat(images), torch.cat(targets), torch.cat(labels), sum(shares), sum(fewest))


CLASSES = ("cat", "dog", "emu")


def image_tree(root: Path, counts: Mapping[str, int], *, size: tuple[int, int] = (12, 10), suffix: str = "png") -> Path:
    """``root/SPLIT/CLASS/0.png`` and so on, ``counts[SPLIT]`` of each class, all different; the split "" is ``root`` itself."""
    noise = np.random.default_rng(0)
    for split, count in counts.items():
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.{suffix}")
    return root


def same(left: Iterable[Batch], right: Iterable[Batch]) -> bool:
    """Whether two runs of batches are the same, bit for bit."""
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and torch.equal(a.labels, b.labels) and a.share == b.share
        for a, b in zip(left, right, strict=True)
    )
