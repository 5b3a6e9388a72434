"""The sets of a run: read, split, and ready to be dealt out in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradreg.train.data import sources, streaming
from gradreg.train.data.colours import ColourScale
from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.data.finishing import Finish
from gradreg.train.data.pools import Encoded, Pixels
from gradreg.train.data.requests import Processes
from gradreg.train.data.sets import EvaluationSet, TrainingSet
from gradreg.train.data.splitting import Part, split
from gradreg.train.data.supply import Supply


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on.

    Args:
        train: images to train on.
        test: images to test on.
        validation: images held out of those to train on; None without any.
        classes: how many.
        image_shape: (channels, height, width).
        in_memory: whether the images are held in memory; otherwise they are read from their files as they are needed.
        unreadable: images left out because they could not be read; 0 unless ``data.corrupt`` is "skip".
    """

    train: TrainingSet
    test: EvaluationSet
    validation: EvaluationSet | None
    classes: int
    image_shape: tuple[int, int, int]
    in_memory: bool
    unreadable: int = 0


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
        ValueError: files that are not there or cannot be read, more images wanted than there are, or keys that do not fit the images.
    """
    among = Processes(rank, processes)
    source = sources.read(config)
    pool = _readable(source.train, config)
    own_test = None if source.test is None else _readable(source.test, config)
    read = len(source.train) + (0 if source.test is None else len(source.test))
    left = len(pool) + (0 if own_test is None else len(own_test))

    parts = split(pool, own_test, config, classes=source.classes, seed=seed)
    supply = Supply(config, pool, count=parts.images, device=device)
    largest = pool.largest if isinstance(pool, Pixels) else 255
    _check_augmentation(augmentation, supply.shape, largest, config.name)
    scale = ColourScale(largest, augmentation.colours(config.name))

    def evaluated(part: Part, images: Pixels | Encoded) -> EvaluationSet:
        return EvaluationSet(supply.evaluation(images.take(part.positions)), part.labels, scale, device=device, processes=among)

    trained = supply.training(pool.take(parts.train.positions), augmentation, seed=seed)
    finish = Finish(scale, augmentation, classes=source.classes, seed=seed)
    return Data(
        train=TrainingSet(trained, parts.train.labels, finish, seed=seed, device=device, processes=among),
        test=evaluated(parts.test, pool if own_test is None else own_test),
        validation=None if parts.validation is None else evaluated(parts.validation, pool),
        classes=source.classes,
        image_shape=supply.shape,
        in_memory=supply.in_memory,
        unreadable=read - left,
    )


def _readable(images: Pixels | Encoded, config: DataConfig) -> Pixels | Encoded:
    """``images`` without those that cannot be read, if they are to be left out."""
    if config.corrupt == "error" or isinstance(images, Pixels):
        return images
    left = streaming.only_readable(images, workers=streaming.workers(config))
    if not len(left):
        raise ValueError(f"data.corrupt must not be 'skip' where no image can be read; got {len(images)} such images of {config.name!r}.")
    return left


def _check_augmentation(augmentation: AugmentationConfig, shape: tuple[int, int, int], largest: int, name: str) -> None:
    padding, side = augmentation.crop_padding, min(shape[1:])
    if padding is not None and augmentation.padding == "reflect" and padding >= side:
        raise ValueError(
            f"augmentation.crop_padding must be < {side}, the smaller side of the images of {name!r}, where it mirrors; got {padding}."
        )
    colours = augmentation.colours(name)
    if colours is not None and len(colours.mean) != shape[0]:
        raise ValueError(
            f"augmentation.normalize must fit images of {shape[0]} channels, as those of {name!r}; got {augmentation.normalize!r}, with "
            f"{len(colours.mean)}. Use none."
        )
    if largest != 255 and (augmentation.auto_augment or augmentation.rand_augment):
        raise ValueError(
            f"augmentation.auto_augment and rand_augment must be null for {name!r}, whose images have {largest + 1} levels: their "
            "operations are made for 256. Leave them out."
        )
