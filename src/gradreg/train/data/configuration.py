"""The keys ``data`` and ``augmentation`` of a recipe: which images, how they are split, and how they are augmented."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from gradreg import checks, own_code
from gradreg.train.data import readers
from gradreg.train.data.catalogue import SETS, TIMM, Normalization, known_set

_OF_IMAGES = ("label_noise", "download", "train_split", "test_split", "image_size", "evaluation_crop", "memory", "corrupt")
"""Keys that a data set of one's own does not have."""


@dataclass
class DataConfig:
    """The data and how they are split.

    Args:
        name: data set: "digits" (scikit-learn's: 1,797 real images of handwritten digits, 8 x 8 pixels), "mnist", "fashion-mnist",
            "cifar10", "cifar100", "svhn", "tiny-imagenet", "imagenet"; "folder", with a folder of images for each class under root; or
            "timm:" and a name that timm.data.create_dataset takes, as in "timm:hfds/food101"; or a function of your own, "mine:dataset",
            called with "train", "validation" and "test", whose options are further keys of the block (docs/data.md).
        train_size: training images, drawn at random; null takes all of a training set that comes with a test set, and 1000 of "digits". The
            rest is the test set if there is no separate one.
        test_size: test images, drawn at random; null takes all.
        label_noise: share of the training labels replaced by a class drawn at random (which may be the true one), 0 to 1.
        split_seed: seed of the split and of the label noise; null takes the run's seed, so that every seed has its own.
        validation: validation images, held out of the training images: a share between 0 and 1, or a number; null holds none out. A
            "folder" with train/, val/ and test/ has validation images of its own.
        root: folder of data sets that are files; docs/data.md says where each is in it.
        download: whether files that are missing under root are downloaded.
        train_split: the split of a "timm:" set to train on.
        test_split: the split of a "timm:" set to test on.
        image_size: height and width of the images: the shorter side is resized to it, then the image is center-cropped. null does not
            resize; all images must then have the same size.
        evaluation_crop: with image_size, the share of the resized shorter side that the center-crop keeps in evaluation, > 0 and <= 1;
            null is 0.875 for "imagenet" and 1 for the others.
        memory: whether the images are held in the memory of the device as bytes; "auto" does so up to 2 GiB. Otherwise worker processes
            decode them again in every epoch.
        workers: processes that decode images; 0 decodes in the run's own process; null is one per core, at most 8, and 0 for a data set of
            your own.
        corrupt: what to do with images that cannot be read: "error" stops the run and names the image, "skip" looks for such images before
            the run, leaves them out, and counts them.
        collate: for a data set of your own, a function that makes a batch of a list of samples, "mine:collate"; null stacks them.
        options: the options of a data set of your own, which may as well be keys of the block itself.
    """

    name: str = "digits"
    train_size: int | None = None
    test_size: int | None = None
    label_noise: float = 0.0
    split_seed: int | None = None
    validation: int | float | None = None
    root: str = "data"
    download: bool = False
    train_split: str = "train"
    test_split: str = "validation"
    image_size: int | None = None
    evaluation_crop: float | None = None
    memory: bool | Literal["auto"] = "auto"
    workers: int | None = None
    corrupt: Literal["error", "skip"] = "error"
    collate: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = known_set(self.name)
        if known is None and not self.is_own:
            raise ValueError(checks.unknown("data set", self.name, [*SETS, f"{TIMM}...", "mine:dataset"]))
        if self.collate is not None and not (self.is_own and own_code.is_own(self.collate)):
            raise ValueError(
                f"data.collate must be a function such as mine:collate, with a data set of your own; got {self.collate!r} for "
                f"{self.name!r}. Leave it out."
            )
        for key in ("train_size", "test_size", "image_size"):
            if getattr(self, key) is not None:
                checks.whole(f"data.{key}", getattr(self, key), minimum=1)
        if checks.non_negative("data.label_noise", self.label_noise) > 1:
            raise ValueError(f"data.label_noise must be between 0 and 1; got {self.label_noise}. It is a share, not a percentage.")
        if self.split_seed is not None:
            checks.seed(self.split_seed, name="data.split_seed")
        if self.workers is not None:
            checks.whole("data.workers", self.workers, minimum=0)
        if self.evaluation_crop is not None:
            if checks.positive("data.evaluation_crop", self.evaluation_crop) > 1:
                raise ValueError(f"data.evaluation_crop must be <= 1; got {self.evaluation_crop}. It is a share, not a percentage.")
            if self.image_size is None:
                raise ValueError(
                    f"data.image_size must be given with data.evaluation_crop {self.evaluation_crop}; got null. Write 224, say."
                )
        if known is None:
            self._check_own()
            return
        if self.download and known.no_download:
            raise ValueError(f"data.download must be false for {self.name!r}, which {known.no_download}; got true. Leave it out.")
        for key in ("train_split", "test_split"):
            default = next(f.default for f in fields(self) if f.name == key)
            if getattr(self, key) != default and not self.name.startswith(TIMM):
                raise ValueError(
                    f"data.{key} must be left out unless the name begins with {TIMM!r}; got {getattr(self, key)!r} for {self.name!r}."
                )
        if self.train_size is not None or known.training_images is not None:
            self.training_images()

    @property
    def is_own(self) -> bool:
        """Whether the data set is a function of one's own, to which what concerns images does not apply."""
        return own_code.is_own(self.name)

    def _check_own(self) -> None:
        for key in _OF_IMAGES:
            default = next(f.default for f in fields(self) if f.name == key)
            if getattr(self, key) != default:
                raise ValueError(
                    f"data.{key} must be left out for {self.name!r}, which makes its samples itself; got {getattr(self, key)!r}. "
                    "Make it an option of that function."
                )
        if self.train_size is not None:
            self.validation_images(self.train_size)

    @property
    def images_asked_for(self) -> int | None:
        """The number of training and validation images together; None for all."""
        known = known_set(self.name)
        return known.default_train_size if self.train_size is None and known is not None else self.train_size

    def training_images(self) -> int:
        """The number of training images, without the validation images.

        For a "folder" whose ``train_size`` is null its files are counted, including those that ``corrupt`` leaves out.

        Raises:
            ValueError: the number is not known before the data are loaded, or the folder does not exist.
        """
        known = known_set(self.name)
        images = self.images_asked_for
        if images is None and known is not None:
            images = known.training_images
        if images is None and self.name == "folder":
            images = readers.count_training_images(Path(self.root))
            if images is None:
                raise ValueError(self.needs_train_size())
        if images is None:
            raise ValueError(
                f"data.train_size must be given for {self.name!r}, whose images are not counted before they are loaded; got null. "
                "Give the number of images to train on."
            )
        return images - self.validation_images(images)

    def needs_train_size(self) -> str:
        """The error for a null ``train_size`` if there are no test images."""
        return (
            f"data.train_size must be a number for {self.name!r} with no images to test on beside those to train on; got null. "
            f"Give fewer than there are, so that the rest is the test set, or sort them into {self.root}/train and {self.root}/val."
        )

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
    """Augmentation, drawn again for every training image in every epoch, and normalization of all images.

    Args:
        random_resized_crop: cut a window of random area and proportions out of the image and resize it to the image's size.
        scale: the window's area as shares of the image's, from and to, > 0 and <= 1.
        ratio: the window's width over its height, from and to, > 0.
        crop_padding: pixels by which every side is padded before a window of the old size is cut out at random, >= 1; null does not crop.
        padding: what crop_padding pads with: "zero" is black, "reflect" mirrors at the border.
        flip: mirror left and right, with probability 1/2.
        auto_augment: AutoAugment's policy found on "cifar10", "svhn" or "imagenet"; null applies none.
        rand_augment: operations of RandAugment on each image, >= 1; null applies none.
        rand_magnitude: strength of each operation of RandAugment, 0 to 30.
        cutout: side in pixels of a square around a random center that is set to 0, >= 1; null cuts none out.
        random_erasing: probability that a random rectangle is set to 0, > 0 and <= 1; null erases none.
        mixup: alpha of mixup, > 0: images and labels are weighted means with those of the previous image in the batch, with one weight per
            batch from Beta(alpha, alpha); null mixes none.
        cutmix: alpha of CutMix, > 0: a rectangle comes from the previous image; null mixes none. With both, each batch draws one.
        normalize: "auto" subtracts the data set's published mean and divides by its standard deviation, channel by channel; "folder" and
            "timm:" sets use ImageNet's, and "digits", "mnist" and "fashion-mnist" stay between 0 and 1. "none" does not normalize;
            the name of a data set uses that set's statistics.
    """

    random_resized_crop: bool = False
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    crop_padding: int | None = None
    padding: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    auto_augment: Literal["cifar10", "svhn", "imagenet"] | None = None
    rand_augment: int | None = None
    rand_magnitude: int = 9
    cutout: int | None = None
    random_erasing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    normalize: str = "auto"

    def __post_init__(self) -> None:
        for key in ("crop_padding", "rand_augment", "cutout"):
            if getattr(self, key) is not None:
                checks.whole(f"augmentation.{key}", getattr(self, key), minimum=1, remedy="Use null for none.")
        for key in ("random_erasing", "mixup", "cutmix"):
            if getattr(self, key) is not None:
                checks.positive(f"augmentation.{key}", getattr(self, key), remedy="Use null for none.")
        if self.random_erasing is not None and self.random_erasing > 1:
            raise ValueError(f"augmentation.random_erasing must be <= 1; got {self.random_erasing}. It is a probability.")
        if checks.whole("augmentation.rand_magnitude", self.rand_magnitude, minimum=0) > 30:
            raise ValueError(f"augmentation.rand_magnitude must be <= 30; got {self.rand_magnitude}.")
        if self.normalize not in ("auto", "none") and known_set(self.normalize) is None:
            raise ValueError(checks.unknown("augmentation.normalize", self.normalize, ["auto", "none", *SETS]))
        for key, most in (("scale", 1.0), ("ratio", float("inf"))):
            self._check_range(key, getattr(self, key), most)
        self._check_company()

    @staticmethod
    def _check_range(key: str, value: list[float], most: float) -> None:
        rule = f"be two numbers > 0{' and <= 1' if most == 1 else ''}, the smaller first"
        if len(value) != 2:
            raise ValueError(f"augmentation.{key} must {rule}; got {checks.describe(value)}.")
        low, high = (checks.positive(f"augmentation.{key}", number) for number in value)
        if not low <= high <= most:
            raise ValueError(f"augmentation.{key} must {rule}; got {checks.describe(value)}.")

    def _check_company(self) -> None:
        """Raise for keys that would have no effect, and for pairs that exclude each other."""
        default = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self)}
        for key, needed, example in (
            ("padding", "crop_padding", "4"),
            ("rand_magnitude", "rand_augment", "2"),
            ("scale", "random_resized_crop", "true"),
            ("ratio", "random_resized_crop", "true"),
        ):
            if getattr(self, key) != default[key] and not getattr(self, needed):
                raise ValueError(
                    f"augmentation.{needed} must be given with {key} {getattr(self, key)!r}; got {getattr(self, needed)}. "
                    f"Write {example}, say."
                )
        for one, other in (("auto_augment", "rand_augment"), ("random_resized_crop", "crop_padding")):
            if getattr(self, one) and getattr(self, other):
                received = f"{getattr(self, one)!r} and {getattr(self, other)!r}"
                raise ValueError(f"augmentation.{one} must be left out with {other}; got {received}. Choose one.")

    def normalization(self, data: str) -> Normalization | None:
        """The normalization of the set ``data``; None leaves its images between 0 and 1."""
        known = None if self.normalize == "none" else known_set(data if self.normalize == "auto" else self.normalize)
        return None if known is None else known.normalization

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with their neighbors in the batch."""
        return self.mixup is not None or self.cutmix is not None
