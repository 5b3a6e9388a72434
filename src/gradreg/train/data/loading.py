"""The sets of a run: read, split, their labels made noisy, and ready to be dealt out in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradreg.train.data import sources
from gradreg.train.data.colours import STATISTICS, ColourScale
from gradreg.train.data.configuration import DIGITS_TO_TRAIN_ON, AugmentationConfig, DataConfig
from gradreg.train.data.memory import MemoryImages
from gradreg.train.data.sets import EvaluationSet, Processes, TrainingSet


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on.

    Args:
        train: images to train on.
        test: images to test on.
        validation: images held out of those to train on; None without any.
        classes: how many.
        image_shape: (channels, height, width).
    """

    train: TrainingSet
    test: EvaluationSet
    validation: EvaluationSet | None
    classes: int
    image_shape: tuple[int, int, int]

    @property
    def in_memory(self) -> bool:
        """Whether the images lie in memory; otherwise they are read from files as they are needed."""
        return True

    @property
    def skipped_images(self) -> int:
        """Corrupt images left out so far."""
        return 0


def load(
    config: DataConfig, augmentation: AugmentationConfig, *, seed: int, device: torch.device, rank: int = 0, processes: int = 1
) -> Data:
    """The data that ``config`` describes, split and made noisy by ``config.split_seed``, or by ``seed`` where that is null.

    Args:
        config: which images, and how they are split.
        augmentation: what is done to them.
        seed: of the order of the batches and of the augmentation, ≥ 0. What is drawn follows from it, the epoch and the position in it
            alone: the same in a run that was resumed, and over however many processes.
        device: where batches are wanted.
        rank: of this process, 0 to ``processes`` - 1.
        processes: how many share every batch, ≥ 1.

    Raises:
        ValueError: an unknown data set, files that are not there, or no image left to test on.
    """
    among = Processes(rank, processes)
    source = sources.read(config)
    pool, test = source.train, source.test
    size = config.train_size
    if size is None:
        size = DIGITS_TO_TRAIN_ON if test is None else len(pool)
    if size > len(pool) - (test is None):
        raise ValueError(
            f"data.train_size must be {'<' if test is None else '<='} {len(pool)}, the images of {config.name!r}; got {size}."
            + (" Leave some to test on." if test is None else "")
        )
    generator = torch.Generator().manual_seed(seed if config.split_seed is None else config.split_seed)
    order = torch.randperm(len(pool), generator=generator)
    chosen, rest = order[:size], order[size:]
    noisy = with_label_noise(pool.labels[chosen], config.label_noise, source.classes, generator)
    # Drawn at random already, so that its last images are as good a sample as any.
    train, validation = chosen.split([size - (held := config.validation_images(size)), held])

    scale = ColourScale(source.largest, STATISTICS.get(config.name) if augmentation.normalize == "auto" else None)
    images = MemoryImages(pool.images.to(device), scale, augmentation, seed=seed)
    if test is None:
        testing = EvaluationSet(images, rest, pool.labels[rest], device=device, processes=among)
    else:
        unseen = MemoryImages(test.images.to(device), scale, augmentation, seed=seed)
        testing = EvaluationSet(unseen, torch.arange(len(test)), test.labels, device=device, processes=among)
    channels, height, width = pool.images.shape[1:]
    return Data(
        train=TrainingSet(images, train, noisy[: len(train)], seed=seed, device=device, processes=among),
        test=testing,
        validation=EvaluationSet(images, validation, noisy[len(train) :], device=device, processes=among) if held else None,
        classes=source.classes,
        image_shape=(channels, height, width),
    )


def with_label_noise(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """``labels`` (n,) with ``round(share · n)`` of them replaced by a class drawn evenly from all, the true one included."""
    noisy = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return noisy
