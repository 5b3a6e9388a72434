"""Which images are trained on, validated on and tested on, and with which labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.pools import Encoded, Pixels


@dataclass(frozen=True)
class Part:
    """Some of the images of a pool.

    Args:
        positions: (n,) int64, in the pool.
        labels: (n,) int64, which may be noisy.
    """

    positions: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """The parts of a data set; ``test`` is one of the training pool where the set has no test images of its own."""

    train: Part
    validation: Part | None
    test: Part

    @property
    def images(self) -> int:
        """How many there are in all parts."""
        return sum(len(part.labels) for part in (self.train, self.validation, self.test) if part is not None)


def split(pool: Pixels | Encoded, own_test: Pixels | Encoded | None, config: DataConfig, *, classes: int, seed: int) -> Split:
    """The split that ``config`` describes, drawn by ``config.split_seed``, or by ``seed`` where that is null.

    Args:
        pool: images to train on, and to test on if there are no others.
        own_test: images to test on; None where the set has none of its own.
        config: the sizes, and the share of labels to be made noisy.
        classes: how many.
        seed: of the run.

    Raises:
        ValueError: more images wanted than there are, or none left to test on.
    """
    size = config.images_asked_for
    if size is None and own_test is None:
        raise ValueError(config.needs_train_size())
    size = len(pool) if size is None else size
    if size > len(pool) - (own_test is None):
        raise ValueError(
            f"data.train_size must be {'<' if own_test is None else '<='} {len(pool)}, the images of {config.name!r}; got {size}."
            + (" Leave some to test on." if own_test is None else "")
        )
    generator = torch.Generator().manual_seed(seed if config.split_seed is None else config.split_seed)
    order = torch.randperm(len(pool), generator=generator)
    chosen, rest = order[:size], order[size:]
    noisy = with_label_noise(pool.labels[chosen], config.label_noise, classes, generator)
    # Drawn at random already, so that its last images are as good a sample as any.
    held = config.validation_images(size)
    train, validation = Part(chosen[: size - held], noisy[: size - held]), Part(chosen[size - held :], noisy[size - held :])
    test = rest if own_test is None else torch.arange(len(own_test))
    if config.test_size is not None:
        if config.test_size > len(test):
            raise ValueError(f"data.test_size must be <= {len(test)}, the test images of {config.name!r}; got {config.test_size}.")
        test = test[torch.randperm(len(test), generator=generator)[: config.test_size]]
    labels = (pool if own_test is None else own_test).labels[test]
    return Split(train=train, validation=validation if held else None, test=Part(test, labels))


def with_label_noise(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """``labels`` (n,) with ``round(share · n)`` of them replaced by a class drawn evenly from all, the true one included."""
    noisy = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return noisy
