"""Augmented training images a second: CIFAR-10's bytes in memory, against torchvision's transforms in a DataLoader with two workers.

    python benchmarks/data_pipeline.py --out benchmarks/results/data_pipeline

Both deal out an epoch of normalised float32 batches of 128 from 50,000 images of 32 x 32 pixels in memory. Their bytes are random: nothing
that is measured depends on what they show. A round is an epoch of each, so that a machine whose speed drifts disturbs both alike;
the workers stay from epoch to epoch, and their start is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from gradreg.train.data.catalogue import SETS
from gradreg.train.data.configuration import AugmentationConfig
from gradreg.train.data.loader import InMemoryLoader, TrainingSet
from gradreg.train.data.sampler import BatchSampler
from gradreg.train.data.transforms import BatchTransform, Normalize
from reporting import command, environment, report, signature
from rounds import interleaved, ratio_quartiles
from tables import markdown, with_quartiles

BATCH = 128
CIFAR10 = SETS["cifar10"].normalization
TASKS = {
    "flip and crop": AugmentationConfig(flip=True, crop_padding=4),
    "flip, crop and AutoAugment": AugmentationConfig(flip=True, crop_padding=4, auto_augment="cifar10"),
}


class ByIndex(Dataset[tuple[Tensor, int]]):
    """Bytes in memory, given out one by one as torchvision's CIFAR-10 does: through PIL."""

    def __init__(self, pixels: np.ndarray, augmentation: AugmentationConfig) -> None:
        assert CIFAR10 is not None
        policy = [transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)] if augmentation.auto_augment else []
        moved = [transforms.RandomCrop(32, padding=augmentation.crop_padding), transforms.RandomHorizontalFlip()]
        floats = [transforms.ToTensor(), transforms.Normalize(CIFAR10.mean, CIFAR10.std)]
        self._pixels, self._transform = pixels, transforms.Compose([*moved, *policy, *floats])

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[index])), 0


def images_per_second(batches: Iterable[Any], count: int) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return count / (time.perf_counter() - start)


def measure(augmentation: AugmentationConfig, *, images: int, rounds: int, workers: int) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    cpu = torch.device("cpu")
    transform = BatchTransform(Normalize(255, CIFAR10), augmentation, classes=10, seed=0)
    in_memory = InMemoryLoader(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), augmentation, seed=0)
    labels = torch.zeros(images, dtype=torch.int64)
    ours = TrainingSet(in_memory, labels, transform, seed=0, device=cpu, sampler=BatchSampler())
    theirs = DataLoader(ByIndex(pixels, augmentation), BATCH, shuffle=True, num_workers=workers, persistent_workers=True)
    epochs = itertools.count(1)
    candidates = {
        "gradreg": lambda: images_per_second(ours.batches(next(epochs), BATCH), images),
        "torchvision": lambda: images_per_second(theirs, images),
    }
    interleaved(candidates, range(1))  # workers start, caches fill
    speeds = interleaved(candidates, range(rounds))
    low, middle, high = ratio_quartiles(speeds["gradreg"], speeds["torchvision"])
    return {
        "images_per_second": {name: round(statistics.median(values)) for name, values in speeds.items()},
        "ratio": round(middle, 2),
        "ratio_quartiles": [round(low, 2), round(high, 2)],
    }


def table(results: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{found['images_per_second'][who]:,}" for who in ("gradreg", "torchvision")), with_quartiles(found, 1))
        for name, found in results["tasks"].items()
    ]
    notes = (
        f"Median of {results['rounds']} interleaved epochs of {results['images']:,} images in batches of {BATCH}. gradreg: one process, "
        f"{results['environment']['threads']} thread(s); torchvision: {results['workers']} worker processes.\n\n"
        f"{signature(results, 'torch', 'torchvision')}"
    )
    return f"{markdown(('augmentation', 'gradreg, images/s', 'torchvision, images/s', 'ratio (quartiles)'), rows)}\n\n{notes}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each")
    parser.add_argument("--images", type=int, default=50_000, help="images in an epoch")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the DataLoader")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch in gradreg's process")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md beside printing the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "command": command(),
        "environment": environment(("torch", "torchvision")),
        "rounds": options.rounds,
        "images": options.images,
        "workers": options.workers,
        "tasks": {
            name: measure(augmentation, images=options.images, rounds=options.rounds, workers=options.workers)
            for name, augmentation in TASKS.items()
        },
    }
    report(results, table(results), options.out)


if __name__ == "__main__":
    main()
