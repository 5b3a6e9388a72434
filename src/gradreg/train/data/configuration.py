"""The keys ``data`` and ``augmentation`` of a recipe: which images, how they are split, and what is done to them in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradreg import checks

TRAINING_IMAGES = {"mnist": 60_000, "cifar10": 50_000}
"""Sizes of the training sets of the data sets that have a test set of their own."""

DIGITS_TO_TRAIN_ON = 1000
"""How many of "digits", which have no test set of their own, are trained on by default; the rest is the test set."""


@dataclass
class DataConfig:
    """The data and how they are split.

    Args:
        name: data set; "digits" is scikit-learn's: 1,797 real images of handwritten digits, 8 x 8 pixels, 10 classes; "mnist" has 60,000 of
            28 x 28 pixels, and 10,000 more as its test set; "cifar10" 50,000 and 10,000 in colour, 32 x 32 pixels.
        train_size: training images, drawn at random; null takes all of a training set that comes with a test set, and 1000 of "digits", of
            which the rest is the test set.
        label_noise: share of the training labels replaced by a class drawn at random (which may be the true one), 0 to 1.
        split_seed: seed of the split and of the label noise; null takes the run's seed, so that every seed has its own.
        validation: held out of the training images to validate on: a share between 0 and 1, or a number of images; null holds none out.
        root: folder of data sets that are files; docs/data.md says where each lies in it.
        download: whether what is missing under root is fetched from the network.
    """

    name: str = "digits"
    train_size: int | None = None
    label_noise: float = 0.0
    split_seed: int | None = None
    validation: int | float | None = None
    root: str = "data"
    download: bool = False

    def __post_init__(self) -> None:
        if self.train_size is not None:
            checks.whole("data.train_size", self.train_size, minimum=1)
        if checks.non_negative("data.label_noise", self.label_noise) > 1:
            raise ValueError(f"data.label_noise must be between 0 and 1; got {self.label_noise}. It is a share, not a percentage.")
        if self.split_seed is not None:
            checks.whole("data.split_seed", self.split_seed, minimum=0)
        self.training_images()

    def training_images(self) -> int:
        """How many images a run trains on, without those that are held out to validate on."""
        images = self.train_size
        if images is None:
            images = DIGITS_TO_TRAIN_ON if self.name == "digits" else TRAINING_IMAGES.get(self.name, 0)
        return images - self.validation_images(images)

    def validation_images(self, images: int) -> int:
        """How many of ``images`` are held out to validate on."""
        if self.validation is None:
            return 0
        rule = "be a share > 0 and < 1, or a number of images >= 1 (null holds none out)"
        value = checks.real("data.validation", self.validation, rule=rule)
        held = value if isinstance(self.validation, int) else round(value * images) if value < 1 else 0
        if not 1 <= held < images:
            raise ValueError(f"data.validation must {rule}, and leave some to train on; got {self.validation} of {images} images.")
        return int(held)


@dataclass
class AugmentationConfig:
    """What is done to the images: drawn anew for every training image in every epoch, and the same colour scale for all.

    Args:
        flip: mirror left and right, with probability 1/2.
        crop_padding: pixels by which every side is padded before a window of the old size is cut out at random, >= 1; null does not crop.
        padding: what crop_padding pads with: "zero" is black, "reflect" mirrors at the border.
        normalize: "auto" subtracts the data set's published mean and divides by its standard deviation, channel by channel ("digits" and
            "mnist" have none and stay between 0 and 1); "none" leaves every set between 0 and 1.
    """

    flip: bool = False
    crop_padding: int | None = None
    padding: Literal["zero", "reflect"] = "zero"
    normalize: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        if self.crop_padding is not None:
            checks.whole("augmentation.crop_padding", self.crop_padding, minimum=1, remedy="Use null not to crop.")
        elif self.padding != "zero":
            raise ValueError(f"augmentation.crop_padding must be given with padding {self.padding!r}; got null. Write 4, say.")
