"""The data of a run: read, split, and batched, from memory or from files.

``load`` returns the sets that a run trains and evaluates on. Each gets its batches from an ``ImageLoader``: ``InMemoryLoader``
if all images fit into memory, ``streaming.StreamingLoader`` otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gradreg import checks
from gradreg.train.data import streaming, transforms
from gradreg.train.data.catalogue import known_set
from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.data.datasets import EncodedImages, InMemoryImages, RawDataset
from gradreg.train.data.readers import ReadOptions
from gradreg.train.data.sampler import BatchIndices, BatchSampler, EpochOrder
from gradreg.train.data.splits import Subset, split
from gradreg.train.data.transforms import BatchAugmentation, BatchTransform, Normalize

MEMORY_LIMIT = 2 * 1024**3
"""Bytes up to which ``data.memory: auto`` holds the images in memory."""

_RESIZED_AT_ONCE = 1024
"""How many images in memory are resized at a time: resizing needs floats, which are four times as large."""


@dataclass(frozen=True)
class Batch:
    """One process's part of a batch.

    Args:
        images: (n, channels, height, width), float32, augmented and normalized.
        targets: (n,), int64 classes, or (n, classes) float32 if images are mixed.
        labels: (n,), int64 classes.
        share: n over the images of the whole batch in all processes, 0 to 1; the shares of all processes add up to 1.
        fewest: images that every process has at least, ≥ 1 and the same on all.
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    share: float
    fewest: int

    @property
    def size(self) -> int:
        """n."""
        return len(self.labels)

    def part(self, rows: slice, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """Images and targets of some rows, in the dtype of a model in ``precision``; autocast casts them itself."""
        images = self.images[rows]
        return images.double() if precision == "fp64" else images, self.targets[rows]

    def labeled(self, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """All images, and their classes even if the targets are mixed."""
        return self.part(slice(None), precision)[0], self.labels


class AnyBatch(Protocol):
    """A batch of images, or of the samples of a data set of one's own."""

    @property
    def size(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def fewest(self) -> int: ...
    def part(self, rows: slice, precision: str = "fp32") -> tuple[Any, Any]: ...
    def labeled(self, precision: str = "fp32") -> tuple[Any, Any]: ...


class TrainingBatches(Protocol):
    """What is trained on."""

    def __len__(self) -> int: ...
    def batches(self, epoch: int, size: int, *, start: int = 0) -> Iterator[AnyBatch]: ...


class EvaluationBatches(Protocol):
    """What is evaluated on."""

    def __len__(self) -> int: ...
    def batches(self, size: int) -> Iterator[AnyBatch]: ...


@dataclass(frozen=True)
class Data:
    """The data that a run trains and evaluates on.

    Args:
        train: training images.
        test: test images.
        validation: validation images, the set's own or held out of the training images; None if there are none.
        classes: how many; None if a data set of one's own does not say.
        image_shape: (channels, height, width); None for samples that are no images.
        in_memory: whether the images are held in memory; otherwise they are read from their files as they are needed.
        unaugmented: the first n training images in a fixed order, not augmented; all of them if there are fewer.
        unreadable: images left out because they could not be read; 0 unless ``data.corrupt`` is "skip".
        kept_out: training images that are not trained on, to tell whether a penalty helps, without augmentation; None if there are none.
    """

    train: TrainingBatches
    test: EvaluationBatches
    validation: EvaluationBatches | None
    classes: int | None
    image_shape: tuple[int, int, int] | None
    in_memory: bool
    unaugmented: Callable[[int], EvaluationBatches]
    unreadable: int = 0
    kept_out: TrainingBatches | None = None


def load(
    config: DataConfig,
    augmentation: AugmentationConfig,
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
    kept_out: Callable[[int], int] = lambda images: 0,
) -> Data:
    """The data that ``config`` describes; split and label noise are drawn from ``config.split_seed``, or from ``seed`` if that is null.

    Args:
        config: which images, and how they are split.
        augmentation: the augmentation of training images.
        seed: of the order of the batches and of the augmentation, ≥ 0. Draws depend only on it, the epoch and the position in the epoch:
            they are the same in a resumed run, and for any number of processes.
        device: the device of the batches.
        rank: of this process, 0 to ``processes`` - 1.
        processes: how many share every batch, ≥ 1.
        kept_out: how many of so many training images are kept out of training.

    Raises:
        ValueError: files that are missing or cannot be read, more images requested than there are, or keys that do not fit the images.
    """
    sampler = BatchSampler(rank, processes)
    raw, classes = _read(config)
    images = _without_unreadable(raw.train, config)
    own_test, own_validation = (None if part is None else _without_unreadable(part, config) for part in (raw.test, raw.validation))
    read = sum(len(part) for part in (raw.train, raw.test, raw.validation) if part is not None)
    left = sum(len(part) for part in (images, own_test, own_validation) if part is not None)

    splits = split(images, own_test, config, classes=classes, seed=seed, own_validation=own_validation)
    loaders = Loaders(config, images, count=splits.images, device=device)
    max_value = images.max_value if isinstance(images, InMemoryImages) else 255
    _check_augmentation(augmentation, loaders.shape, max_value, config.name)
    normalize = Normalize(max_value, augmentation.normalization(config.name))

    def evaluation_set(part: Subset, images: InMemoryImages | EncodedImages) -> EvaluationSet:
        return EvaluationSet(loaders.evaluation(images.take(part.positions)), part.labels, normalize, device=device, sampler=sampler)

    train, kept = splits.train.divided(kept_out(len(splits.train.labels)))
    aside: TrainingSet | None = None
    if kept is not None:
        if not loaders.in_memory:
            raise ValueError(
                f"penalty.held_out must be left out for images that are not held in memory, as those of {config.name!r}; got a share. "
                "Set data.memory: true, or leave it out."
            )
        whole = BatchTransform(normalize, AugmentationConfig(), classes=classes, seed=seed)
        apart = loaders.evaluation(images.take(kept.positions))
        aside = TrainingSet(apart, kept.labels, whole, seed=seed, device=device, sampler=sampler)

    def unaugmented(n: int) -> EvaluationSet:
        return evaluation_set(Subset(train.positions[:n], train.labels[:n]), images)

    training = loaders.training(images.take(train.positions), augmentation, seed=seed)
    transform = BatchTransform(normalize, augmentation, classes=classes, seed=seed)
    return Data(
        train=TrainingSet(training, train.labels, transform, seed=seed, device=device, sampler=sampler),
        test=evaluation_set(splits.test, images if own_test is None else own_test),
        validation=None
        if splits.validation is None
        else evaluation_set(splits.validation, images if own_validation is None else own_validation),
        classes=classes,
        image_shape=loaders.shape,
        in_memory=loaders.in_memory,
        unaugmented=unaugmented,
        unreadable=read - left,
        kept_out=aside,
    )


def _read(config: DataConfig) -> tuple[RawDataset, int]:
    """The data set that ``config.name`` names, and how many classes it has."""
    record = known_set(config.name)
    assert record is not None  # checked by DataConfig
    options = ReadOptions(
        name=config.name,
        root=Path(config.root),
        download=config.download,
        splits=(config.train_split, config.test_split),
        stream=config.memory is False,
        resize=transforms.evaluation_transform(config.image_size),
    )
    raw = record.read(options)
    assert raw.classes is not None  # a reader or its record says
    return raw, raw.classes


def _without_unreadable(images: InMemoryImages | EncodedImages, config: DataConfig) -> InMemoryImages | EncodedImages:
    """``images`` without those that cannot be read, if ``config.corrupt`` is "skip"."""
    if config.corrupt == "error" or isinstance(images, InMemoryImages):
        return images
    left = streaming.only_readable(images, workers=streaming.workers(config))
    if not len(left):
        raise ValueError(f"data.corrupt must not be 'skip' where no image can be read; got {len(images)} such images of {config.name!r}.")
    return left


def _check_augmentation(augmentation: AugmentationConfig, shape: tuple[int, int, int], max_value: int, name: str) -> None:
    padding, side = augmentation.crop_padding, min(shape[1:])
    if padding is not None and augmentation.padding == "reflect" and padding >= side:
        raise ValueError(
            f"augmentation.crop_padding must be < {side}, the smaller side of the images of {name!r}, where it mirrors; got {padding}."
        )
    normalization = augmentation.normalization(name)
    if normalization is not None and len(normalization.mean) != shape[0]:
        raise ValueError(
            f"augmentation.normalize must fit images of {shape[0]} channels, as those of {name!r}; got {augmentation.normalize!r}, with "
            f"{len(normalization.mean)}. Use none."
        )
    if max_value != 255 and (augmentation.auto_augment or augmentation.rand_augment):
        raise ValueError(
            f"augmentation.auto_augment and rand_augment must be null for {name!r}, whose images have {max_value + 1} levels: their "
            "operations are made for 256. Leave them out."
        )


# The sets, which give batches


class ImageLoader(Protocol):
    """Loads the images of one set, from memory or from files."""

    def batches(self, batches: Sequence[BatchIndices]) -> Iterator[Tensor]:
        """The images of each batch, (m, channels, height, width), uint8, on the device, transformed for training or evaluation."""
        ...


class TrainingSet:
    """Training images, in a new order every epoch.

    Args:
        loader: loads the images, each augmented.
        labels: (n,) int64, their classes.
        transform: normalizes a batch, and mixes its images.
        seed: of the order.
        device: the device of the batches.
        sampler: says which part of each batch is this process's.
    """

    def __init__(
        self, loader: ImageLoader, labels: Tensor, transform: BatchTransform, *, seed: int, device: torch.device, sampler: BatchSampler
    ) -> None:
        self._loader, self._labels, self._transform = loader, labels, transform
        self._order = EpochOrder(len(labels), seed=seed)
        self._device, self._sampler = device, sampler

    def __len__(self) -> int:
        """Images in an epoch, over all processes."""
        return len(self._labels)

    def batches(self, epoch: int, size: int, *, start: int = 0) -> Iterator[Batch]:
        """This process's part of the batches of ``epoch``, once through the set in random order; the last batch may be smaller.

        Args:
            epoch: counted from 1; the same epoch always gives the same batches.
            size: images of a whole batch over all processes, ≥ 1. A process whose part of a small batch is empty gets an image of
                it with ``share`` 0, so that all processes take the same number of steps.
            start: the first batch, ≥ 0; earlier batches are not loaded.
        """
        order = self._order(checks.whole("epoch", epoch, minimum=1))
        batches = self._sampler.batches(order, size, epoch=epoch, start=start, mixing=self._transform.mixes)
        for indices, pixels in zip(batches, self._loader.batches(batches), strict=True):
            labels = self._labels[indices.selected].to(self._device, non_blocking=True)
            images, targets = self._transform(pixels, labels, indices)
            own = slice(indices.neighbors, None)
            yield Batch(images[own], targets[own], labels[own], indices.share, indices.fewest)


class EvaluationSet:
    """Images to evaluate on, in a fixed order and without augmentation.

    Args:
        loader: loads the images.
        labels: (n,) int64, their classes.
        normalize: converts them to floats.
        device: the device of the batches.
        sampler: says which part of each batch is this process's.
    """

    def __init__(self, loader: ImageLoader, labels: Tensor, normalize: Normalize, *, device: torch.device, sampler: BatchSampler) -> None:
        self._loader, self._labels, self._normalize = loader, labels, normalize
        self._device, self._sampler = device, sampler

    def __len__(self) -> int:
        """Images over all processes."""
        return len(self._labels)

    def batches(self, size: int) -> Iterator[Batch]:
        """This process's part of the batches: over all processes every image exactly once.

        Args:
            size: images of a whole batch over all processes, ≥ 1; the last may be smaller, and leave this process without a part.
        """
        batches = self._sampler.batches(torch.arange(len(self)), size, epoch=0)
        batches = [indices for indices in batches if indices.share]
        for indices, pixels in zip(batches, self._loader.batches(batches), strict=True):
            labels = self._labels[indices.selected].to(self._device, non_blocking=True)
            yield Batch(self._normalize(pixels), labels, labels, indices.share, indices.fewest)


# Where the images of a batch come from


class InMemoryLoader:
    """Images held as bytes on the training device, and augmented there one batch at a time; only that batch is converted to floats.

    Args:
        pixels: (n, channels, height, width), uint8, on the device.
        augmentation: the augmentation in training; None for none.
        seed: of the augmentation, which depends only on it, the epoch and the batch.
    """

    def __init__(self, pixels: Tensor, augmentation: AugmentationConfig | None = None, *, seed: int = 0) -> None:
        height, width = pixels.shape[2:]
        self._pixels = pixels
        self._augment = BatchAugmentation(augmentation or AugmentationConfig(), height=height, width=width, seed=seed)

    def batches(self, batches: Sequence[BatchIndices]) -> Iterator[Tensor]:
        """See ``ImageLoader.batches``."""
        for indices in batches:
            selected = indices.selected.to(self._pixels.device, non_blocking=True)
            yield self._augment(self._pixels.index_select(0, selected), indices)


class Loaders:
    """Makes the loaders of a run's sets: in memory if all images fit, otherwise streaming.

    Args:
        config: the size of the images, whether they are held in memory, and how many workers decode.
        images: a set whose first image has the shape of all.
        count: the number of images of all sets together.
        device: the device of the batches.

    Raises:
        ValueError: ``data.memory`` is false for images that are always read into memory.
    """

    def __init__(self, config: DataConfig, images: InMemoryImages | EncodedImages, *, count: int, device: torch.device) -> None:
        if isinstance(images, InMemoryImages) and config.memory is False:
            raise ValueError(f"data.memory must not be false for {config.name!r}, which is read in one piece; got false. Leave it out.")
        self._size, self._device = config.image_size, device
        self._workers = streaming.workers(config)
        self._center_crop = transforms.evaluation_transform(config.image_size, crop=transforms.evaluation_crop(config))
        self.shape: tuple[int, int, int] = _shape(images, transforms.evaluation_transform(config.image_size))
        fits = count * math.prod(self.shape) <= MEMORY_LIMIT if config.memory == "auto" else config.memory
        self.in_memory: bool = isinstance(images, InMemoryImages) or fits

    def training(self, images: InMemoryImages | EncodedImages, augmentation: AugmentationConfig, *, seed: int) -> ImageLoader:
        """Loads ``images`` for training, augmented by random numbers from ``seed``."""
        if isinstance(images, InMemoryImages) or self.in_memory:
            return InMemoryLoader(self._pixels(images, transforms.evaluation_transform(self._size)), augmentation, seed=seed)
        _, height, width = self.shape
        transform = transforms.training_transform(self._size, augmentation, height=height, width=width)
        return streaming.StreamingLoader(
            images, transform, self.shape, workers=self._workers, seed=seed, keep_workers=True, device=self._device
        )

    def evaluation(self, images: InMemoryImages | EncodedImages) -> ImageLoader:
        """Loads ``images`` for evaluation."""
        if isinstance(images, InMemoryImages) or self.in_memory:
            return InMemoryLoader(self._pixels(images, self._center_crop))
        return streaming.StreamingLoader(
            images, self._center_crop, self.shape, workers=self._workers, seed=None, keep_workers=False, device=self._device
        )

    def _pixels(self, images: InMemoryImages | EncodedImages, transform: Callable[..., Tensor]) -> Tensor:
        if not isinstance(images, InMemoryImages):
            return streaming.decode_all(images, transform, self.shape, workers=self._workers).to(self._device)
        return torch.cat([transform(some) for some in images.images.split(_RESIZED_AT_ONCE)]).to(self._device)


def _shape(images: InMemoryImages | EncodedImages, transform: Callable[..., Tensor]) -> tuple[int, int, int]:
    """(channels, height, width) of the first image after ``transform``."""
    first = transform(images.images[0]) if isinstance(images, InMemoryImages) else streaming.first(images, transform)
    channels, height, width = first.shape
    return channels, height, width
