"""The data sets that a recipe can name: one record for each. To add one, add its record here and its reader in ``readers``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gradreg.train.data import readers
from gradreg.train.data.readers import ReadOptions

if TYPE_CHECKING:
    from gradreg.train.data.datasets import RawDataset


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel over the training images, whose values lie between 0 and 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


_IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """What is known about a data set before it is read.

    Args:
        name: its ``data.name`` in a recipe.
        reader: the function of ``readers`` that reads it.
        layout: where its files are under ``data.root``, in Markdown, for docs/data.md.
        classes: how many; None if its folders say.
        training_images: how many; None if its files say.
        test_images: how many of its own; None if its files say, 0 if they are split off the training images.
        image_shape: (channels, height, width); None if the images differ.
        normalization: published mean and standard deviation; None leaves the images between 0 and 1.
        default_train_size: training images if ``data.train_size`` is null; None takes all.
        evaluation_crop: share of the resized shorter side that the center-crop keeps in evaluation, > 0 and ≤ 1.
        no_download: why ``data.download`` cannot fetch it, after "which"; None if it can.
    """

    name: str
    reader: Callable[[ReadOptions], RawDataset]
    layout: str
    classes: int | None = None
    training_images: int | None = None
    test_images: int | None = None
    image_shape: tuple[int, int, int] | None = None
    normalization: Normalization | None = None
    default_train_size: int | None = None
    evaluation_crop: float = 1.0
    no_download: str | None = None

    def read(self, options: ReadOptions) -> RawDataset:
        """The data set, with the number of its classes.

        Raises:
            ValueError: missing files; the message says where they were looked for and which keys change that.
        """
        found = self.reader(options)
        if found.classes is None:
            return replace(found, classes=self.classes)
        if self.classes not in (None, found.classes):
            raise ValueError(
                f"data.root must hold {self.name!r} with a folder for each of its {self.classes} classes; got {found.classes} in "
                f"{options.root}/{self.name}/train."
            )
        return found


TIMM = "timm:"
"""The prefix of the names of timm's data sets."""

_RECORDS = (
    DatasetRecord(
        name="digits",
        reader=readers.digits,
        layout="nothing: they come with scikit-learn. `train_size` (1000) images are drawn, the rest is the test set",
        classes=10,
        training_images=1797,
        test_images=0,
        image_shape=(1, 8, 8),
        default_train_size=1000,
        no_download="comes from no network",
    ),
    DatasetRecord(
        name="mnist",
        reader=readers.mnist,
        layout="`MNIST/raw/`: torchvision's",
        classes=10,
        training_images=60_000,
        test_images=10_000,
        image_shape=(1, 28, 28),
    ),
    DatasetRecord(
        name="fashion-mnist",
        reader=readers.fashion_mnist,
        layout="`FashionMNIST/raw/`: torchvision's",
        classes=10,
        training_images=60_000,
        test_images=10_000,
        image_shape=(1, 28, 28),
    ),
    DatasetRecord(
        name="cifar10",
        reader=readers.cifar10,
        layout="`cifar-10-batches-py/`: torchvision's; without it, class folders `cifar10/train/CLASS/*.png` and `cifar10/test/`",
        classes=10,
        training_images=50_000,
        test_images=10_000,
        image_shape=(3, 32, 32),
        normalization=Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    DatasetRecord(
        name="cifar100",
        reader=readers.cifar100,
        layout="`cifar-100-python/`: torchvision's; without it, class folders `cifar100/train/CLASS/*.png` and `cifar100/test/`",
        classes=100,
        training_images=50_000,
        test_images=10_000,
        image_shape=(3, 32, 32),
        normalization=Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ),
    DatasetRecord(
        name="svhn",
        reader=readers.svhn,
        layout="`train_32x32.mat`, `test_32x32.mat`: torchvision's",
        classes=10,
        training_images=73_257,
        test_images=26_032,
        image_shape=(3, 32, 32),
        normalization=Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    ),
    DatasetRecord(
        name="tiny-imagenet",
        reader=readers.tiny_imagenet,
        layout="`tiny-imagenet-200/`, as its archive unpacks: `val/images/` with `val/val_annotations.txt`, or sorted into class folders",
        training_images=100_000,
        test_images=10_000,
        image_shape=(3, 64, 64),
        normalization=Normalization((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
        no_download="has to be fetched and unpacked by hand",
    ),
    DatasetRecord(
        name="imagenet",
        reader=readers.imagenet,
        layout="`imagenet/train/n01440764/*.JPEG` and `imagenet/val/`; or the three archives in `imagenet/`, which are unpacked there",
        training_images=1_281_167,
        test_images=50_000,
        normalization=_IMAGENET,
        evaluation_crop=0.875,
        no_download="is handed out by its publishers on request",
    ),
    DatasetRecord(
        name="folder",
        reader=readers.folder,
        layout="`train/CLASS/*.jpg`, `val/CLASS/*.jpg` (or `valid/`, `validation/`) and `test/CLASS/*.jpg`; without `test/` the test set "
        "is `val/`. Or `CLASS/*.jpg`, of which `train_size` are drawn and the rest is the test set",
        normalization=_IMAGENET,
        no_download="comes from no network",
    ),
)

SETS = {record.name: record for record in _RECORDS}
"""The records by name, without timm's."""

_FROM_TIMM = DatasetRecord(
    name=f"{TIMM}...",
    reader=readers.timm_dataset,
    layout="determined by `timm.data.create_dataset` from the rest of the name, as in `timm:hfds/...` and `timm:torch/...`, with "
    '`data.train_split` ("train") and `data.test_split` ("validation")',
    normalization=_IMAGENET,
)


def known_set(name: str) -> DatasetRecord | None:
    """The record of the data set ``name``; None for an unknown name. All of timm's sets share one."""
    return _FROM_TIMM if name.startswith(TIMM) else SETS.get(name)


def all_records() -> list[DatasetRecord]:
    """Every record, timm's the last."""
    return [*SETS.values(), _FROM_TIMM]
