"""The training, validation and test images, and their labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.datasets import EncodedImages, InMemoryImages


@dataclass(frozen=True)
class Subset:
    """Some of the images of a data set.

    Args:
        positions: (n,) int64, of the images.
        labels: (n,) int64, which may be noisy.
    """

    positions: Tensor
    labels: Tensor

    def divided(self, number: int) -> tuple[Subset, Subset | None]:
        """All but the last ``number`` images, which are in random order, and those; None for 0."""
        if not number:
            return self, None
        return Subset(self.positions[:-number], self.labels[:-number]), Subset(self.positions[-number:], self.labels[-number:])


@dataclass(frozen=True)
class Splits:
    """The parts of a data set.

    Args:
        train: of the training images.
        validation: of the validation images; of the training images if the set has none of its own and some are held out, else None.
        test: of the test images; of the training images if the set has none of its own.
    """

    train: Subset
    validation: Subset | None
    test: Subset

    @property
    def images(self) -> int:
        """How many images all parts have together."""
        return sum(len(part.labels) for part in (self.train, self.validation, self.test) if part is not None)


def split(
    images: InMemoryImages | EncodedImages,
    own_test: InMemoryImages | EncodedImages | None,
    config: DataConfig,
    *,
    classes: int,
    seed: int,
    own_validation: InMemoryImages | EncodedImages | None = None,
) -> Splits:
    """The split that ``config`` describes, drawn by ``config.split_seed``, or by ``seed`` if that is null.

    Args:
        images: the training images; the test images are taken from them if there are no others.
        own_test: test images; None if the set has none of its own.
        config: the sizes, and the share of labels to be made noisy.
        classes: how many.
        seed: of the run.
        own_validation: validation images; None if the set has none of its own.

    Raises:
        ValueError: more images wanted than there are, none left to test on, or validation images held out beside the set's own.
    """
    if own_validation is not None and config.validation is not None:
        raise ValueError(
            f"data.validation must be null for {config.name!r} with validation images of its own, {len(own_validation)}; got "
            f"{config.validation}. Leave it out, or remove the folder of validation images."
        )
    size = config.images_asked_for
    if size is None and own_test is None:
        raise ValueError(config.needs_train_size())
    size = len(images) if size is None else size
    if size > len(images) - (own_test is None):
        raise ValueError(
            f"data.train_size must be {'<' if own_test is None else '<='} {len(images)}, the images of {config.name!r}; got {size}."
            + (" Leave some to test on." if own_test is None else "")
        )
    generator = torch.Generator().manual_seed(seed if config.split_seed is None else config.split_seed)
    order = torch.randperm(len(images), generator=generator)
    chosen, rest = order[:size], order[size:]
    noisy = with_label_noise(images.labels[chosen], config.label_noise, classes, generator)
    # They are in random order already, so the last ones are as good a sample as any.
    held = config.validation_images(size)
    train, validation = Subset(chosen[: size - held], noisy[: size - held]), Subset(chosen[size - held :], noisy[size - held :])
    test = rest if own_test is None else torch.arange(len(own_test))
    if config.test_size is not None:
        if config.test_size > len(test):
            raise ValueError(f"data.test_size must be <= {len(test)}, the test images of {config.name!r}; got {config.test_size}.")
        test = test[torch.randperm(len(test), generator=generator)[: config.test_size]]
    labels = (images if own_test is None else own_test).labels[test]
    if own_validation is not None:
        return Splits(train, Subset(torch.arange(len(own_validation)), own_validation.labels), Subset(test, labels))
    return Splits(train=train, validation=validation if held else None, test=Subset(test, labels))


def with_label_noise(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """``labels`` (n,) with ``round(share · n)`` of them replaced by a class drawn uniformly from all, including the true one."""
    noisy = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return noisy
