"""What is known of the data sets that have a name, without reading them: how many images, and their colours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of each channel over the training images, which lie between 0 and 1."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@dataclass(frozen=True)
class KnownSet:
    """A data set by name.

    Args:
        training_images: how many; None where its files say.
        colours: those that are subtracted and divided by in publications; None leaves the images between 0 and 1.
        evaluation_crop: share of the resized shorter side that is left of an image to evaluate on.
    """

    training_images: int | None
    colours: Colours | None = None
    evaluation_crop: float = 1.0


_IMAGENET = Colours((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

SETS = {
    "digits": KnownSet(1797),
    "mnist": KnownSet(60_000),
    "fashion-mnist": KnownSet(60_000),
    "cifar10": KnownSet(50_000, Colours((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": KnownSet(50_000, Colours((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "svhn": KnownSet(73_257, Colours((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))),
    "tiny-imagenet": KnownSet(100_000, Colours((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))),
    "imagenet": KnownSet(1_281_167, _IMAGENET, evaluation_crop=0.875),
    "folder": KnownSet(None, _IMAGENET),
}

TIMM = "timm:"
"""What the names of timm's data sets begin with."""


def known_set(name: str) -> KnownSet | None:
    """What is known of the set ``name``; None of an unknown name."""
    return KnownSet(None, _IMAGENET) if name.startswith(TIMM) else SETS.get(name)
