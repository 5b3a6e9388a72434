"""Reads each data set from its files: scikit-learn's digits, torchvision's sets, folders of images, and timm's.

``catalogue`` names these functions. It is imported wherever a recipe is parsed, so PyTorch and torchvision are imported in
the functions that need them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradreg import checks

if TYPE_CHECKING:
    from torch import Tensor

    from gradreg.train.data.datasets import EncodedImages, ImageFiles, InMemoryImages, RawDataset

VALIDATION_FOLDERS = ("val", "valid", "validation")
"""Names of the folder with the validation images; without a ``test`` next to it, these are the test images, as in ImageNet."""

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of the files that are images, torchvision's."""

_TIMM_LIBRARIES = ("hfds", "hfids", "wds", "tfds", "torch")
"""Prefixes of names of timm's sets that can only be read in order."""


@dataclass(frozen=True)
class ReadOptions:
    """The options of a reader; most use only ``root`` and ``download``.

    Args:
        name: ``data.name``.
        root: the folder of data sets.
        download: whether files that are missing there are downloaded.
        splits: the training and test splits of a set of timm.
        stream: whether images must not be held in memory, if the reader has the choice.
        resize: a PIL image to uint8 (channels, height, width), for sets that can only be read in order.
    """

    name: str
    root: Path
    download: bool
    splits: tuple[str, str]
    stream: bool
    resize: Callable[..., Tensor]


# scikit-learn and torchvision: all images in one piece


def digits(options: ReadOptions) -> RawDataset:
    """scikit-learn's: 1,797 images of 8 x 8 pixels with 17 levels of gray."""
    import numpy as np
    import torch

    from gradreg.train.data.datasets import InMemoryImages, RawDataset

    # Read from the installed file: importing scikit-learn for it takes as long as importing PyTorch.
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ValueError("data.name must not be 'digits' without scikit-learn, which holds these images; got 'digits'. Install it.")
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    images = InMemoryImages(table[:, :-1].reshape(-1, 1, 8, 8).contiguous(), table[:, -1].to(torch.int64), max_value=16)
    return RawDataset(images, None)


def mnist(options: ReadOptions) -> RawDataset:
    """MNIST: 60,000 and 10,000 images of handwritten digits, 28 x 28 pixels."""
    from torchvision.datasets import MNIST

    return _gray(MNIST, options, "MNIST", "MNIST/raw/train-images-idx3-ubyte")


def fashion_mnist(options: ReadOptions) -> RawDataset:
    """Fashion-MNIST: 60,000 and 10,000 images of clothes, 28 x 28 pixels."""
    from torchvision.datasets import FashionMNIST

    return _gray(FashionMNIST, options, "Fashion-MNIST", "FashionMNIST/raw/train-images-idx3-ubyte")


def cifar10(options: ReadOptions) -> RawDataset:
    """CIFAR-10: 50,000 and 10,000 photographs of 32 x 32 pixels; torchvision's files, or class folders."""
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, options, "CIFAR-10", "data_batch_1")


def cifar100(options: ReadOptions) -> RawDataset:
    """CIFAR-100: 50,000 and 10,000 photographs of 32 x 32 pixels; torchvision's files, or class folders."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, options, "CIFAR-100", "train")


def svhn(options: ReadOptions) -> RawDataset:
    """SVHN, cropped digits: 73,257 and 26,032 photographs of house numbers, 32 x 32 pixels."""
    import torch
    from torchvision.datasets import SVHN

    from gradreg.train.data.datasets import InMemoryImages

    def split(train: bool) -> InMemoryImages:
        found = SVHN(options.root, split="train" if train else "test", download=options.download)
        return InMemoryImages(torch.from_numpy(found.data), torch.from_numpy(found.labels))

    return _both_splits(split, options.root, "SVHN", "train_32x32.mat")


def _gray(dataset: Any, options: ReadOptions, title: str, example: str) -> RawDataset:
    from gradreg.train.data.datasets import InMemoryImages

    def split(train: bool) -> InMemoryImages:
        found = dataset(options.root, train=train, download=options.download)
        return InMemoryImages(found.data.unsqueeze(1), found.targets)

    return _both_splits(split, options.root, title, example)


def _cifar(dataset: Any, options: ReadOptions, title: str, example: str) -> RawDataset:
    import torch

    from gradreg.train.data.datasets import InMemoryImages

    class_folders = options.root / options.name
    if not (options.root / dataset.base_folder).is_dir() and (class_folders / "train").is_dir() and _evaluation_folders(class_folders)[1]:
        return folder(replace(options, root=class_folders))

    def split(train: bool) -> InMemoryImages:
        found = dataset(options.root, train=train, download=options.download)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return InMemoryImages(images, torch.tensor(found.targets))

    alternative = f" (or class folders as {class_folders}/train/CLASS/*.png)"
    return _both_splits(split, options.root, title, f"{dataset.base_folder}/{example}", alternative=alternative)


def _both_splits(split: Callable[[bool], InMemoryImages], root: Path, title: str, example: str, *, alternative: str = "") -> RawDataset:
    """The training and the test images; ``ValueError`` that says where they were looked for."""
    from gradreg.train.data.datasets import RawDataset

    try:
        return RawDataset(split(True), split(False))
    except RuntimeError as error:
        raise ValueError(
            f"data.root must hold {title}, as {root}/{example} and the like{alternative}; got {str(root)!r}: {error}. "
            "Name the folder with --data.root, or let it be fetched with --data.download true."
        ) from error


# Folders of image files, one for each class


@dataclass(frozen=True)
class _ClassFolders:
    """The image files under one folder for each class.

    Args:
        classes: the names of the classes, in the order of their indices: alphabetical.
        paths: of the files.
        labels: index of the class of each file.
    """

    classes: list[str]
    paths: list[str]
    labels: list[int]

    def images(self) -> ImageFiles:
        """The files with their labels, to be decoded."""
        return _files(self.paths, self.labels)


def folder(options: ReadOptions) -> RawDataset:
    """``root/train/CLASS/*.jpg`` with ``test`` and ``val`` (``valid``, ``validation``) next to it, or ``root/CLASS/*.jpg`` to be split."""
    from gradreg.train.data.datasets import RawDataset

    train = _class_folders(_training_folder(options.root))
    validation, test = (None if path is None else _same_classes(path, train.classes) for path in _evaluation_folders(options.root))
    return RawDataset(train.images(), test, validation=validation, classes=len(train.classes))


def count_training_images(root: Path) -> int | None:
    """The number of images that ``folder`` trains on if it uses all; None if there are no test images, so that it cannot."""
    train = _training_folder(root)
    return None if _evaluation_folders(root)[1] is None else len(_class_folders(train).paths)


def tiny_imagenet(options: ReadOptions) -> RawDataset:
    """Tiny ImageNet: 100,000 and 10,000 photographs of 64 x 64 pixels in 200 classes, as its archive unpacks.

    Its test images lie in one folder, their classes in ``val_annotations.txt``; test images in class folders are read as well.
    """
    from gradreg.train.data.datasets import RawDataset

    unpacked = options.root / "tiny-imagenet-200"
    annotations = unpacked / "val" / "val_annotations.txt"
    if not (unpacked / "train").is_dir() or not (unpacked / "val").is_dir():
        raise ValueError(
            f"data.root must hold Tiny ImageNet, as {unpacked}/train/n01443537/images/n01443537_0.JPEG, {annotations} and "
            f"{unpacked}/val/images/val_0.JPEG; got {str(options.root)!r}, where they are not. Unpack tiny-imagenet-200.zip there, or name "
            "the folder that holds it with --data.root."
        )
    train = _class_folders(unpacked / "train")
    if not annotations.is_file():
        return RawDataset(train.images(), _same_classes(unpacked / "val", train.classes), classes=len(train.classes))
    index = {name: i for i, name in enumerate(train.classes)}
    rows = [line.split("\t")[:2] for line in annotations.read_text(encoding="utf-8").splitlines() if line]
    unknown = {name for _, name in rows} - index.keys()
    if unknown:
        raise ValueError(f"{annotations} must name classes of {unpacked}/train; got {sorted(unknown)[0]!r}. Unpack the archive again.")
    paths = [str(unpacked / "val" / "images" / file) for file, _ in rows]
    return RawDataset(train.images(), _files(paths, [index[name] for _, name in rows]), classes=len(train.classes))


def imagenet(options: ReadOptions) -> RawDataset:
    """ImageNet 2012: 1,281,167 and 50,000 photographs in 1,000 classes, as class folders or as the archives of its publishers."""
    from gradreg.train.data.datasets import RawDataset

    unpacked = options.root / "imagenet"
    if not ((unpacked / "train").is_dir() and (unpacked / "val").is_dir()):
        from torchvision.datasets import ImageNet

        try:
            for split in ("train", "val"):
                ImageNet(unpacked, split=split)  # unpacks and sorts the archives, and checks their checksums
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"data.root must hold ImageNet, as {unpacked}/train/n01440764/*.JPEG and {unpacked}/val/n01440764/*.JPEG, or the archives "
                f"ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz in {unpacked} to be unpacked there; "
                f"got {str(options.root)!r}: {error} Name the folder that holds it with --data.root."
            ) from error
    train = _class_folders(unpacked / "train")
    return RawDataset(train.images(), _same_classes(unpacked / "val", train.classes), classes=len(train.classes))


def _training_folder(root: Path) -> Path:
    if not root.is_dir():
        raise ValueError(f"data.root must be a folder with a folder of images a class; got {str(root)!r}, which is none.")
    return root / "train" if (root / "train").is_dir() else root


def _evaluation_folders(root: Path) -> tuple[Path | None, Path | None]:
    """The folders with the validation and the test images; the only one that is there has the test images, whatever its name.

    Raises:
        ValueError: two folders for one purpose.
    """
    if not (root / "train").is_dir():
        return None, None
    found = [root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{root} must have one folder of validation images; got {' and '.join(path.name for path in found)}. Remove one.")
    validation, test = found[0] if found else None, root / "test"
    return (validation, test) if test.is_dir() else (None, validation)


def _class_folders(root: Path) -> _ClassFolders:
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _hidden(entry.name)) if root.is_dir() else []
    if not classes:
        raise ValueError(f"data.root must hold a folder of images a class, as {root}/CLASS/*.jpg; got no folder in {str(root)!r}.")
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        found = _images_under(root / name, root)
        paths += found
        labels += [label] * len(found)
        empty += [] if found else [name]
    if empty:
        raise ValueError(
            f"every class folder of {str(root)!r} must hold an image ({', '.join(_EXTENSIONS)}); got none in "
            f"{', '.join(map(repr, empty[:3]))}{f' and {len(empty) - 3} more' if len(empty) > 3 else ''}. Fill or remove them."
        )
    return _ClassFolders(classes, paths, labels)


def _images_under(folder: Path, root: Path) -> list[str]:
    """The image files of a class, in the order of torchvision's; each real folder is read once, however many links lead to it.

    Raises:
        ValueError: a link to a folder that holds this one, through which images would come again and again, or as another class.
    """
    around = {_identity(path) for path in (root, *root.resolve().parents)}
    seen: set[tuple[int, int]] = set()
    waiting, found = [str(folder)], []
    while waiting:
        current = waiting.pop()
        identity = _identity(current)
        if identity in around:
            raise ValueError(
                f"{current!r} must not lead to a folder that holds it; it is a link to {os.path.realpath(current)!r}. Remove it."
            )
        if identity in seen:
            continue
        seen.add(identity)
        for entry in os.scandir(current):
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                waiting.append(entry.path)
            elif entry.name.lower().endswith(_EXTENSIONS):
                found.append((current, entry.name))
    return [os.path.join(*place) for place in sorted(found)]


def _hidden(name: str) -> bool:
    """Whether a file or folder belongs to a program, not to the data: ``.ipynb_checkpoints``, ``._0.jpg``, ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _same_classes(root: Path, classes: list[str]) -> ImageFiles:
    """The images under ``root``, whose classes must be ``classes``, because otherwise their indices would differ."""
    found = _class_folders(root)
    if found.classes != classes:
        different = sorted(set(found.classes) ^ set(classes))
        raise ValueError(
            f"{root} must have the same class folders as those to train on; {', '.join(map(repr, different[:3]))} "
            f"{'is' if len(different) == 1 else 'are'} in one of the two only. Add or remove folders until they agree."
        )
    return found.images()


def _files(paths: list[str], labels: list[int]) -> ImageFiles:
    import torch

    from gradreg.train.data.datasets import ImageFiles

    return ImageFiles(paths, torch.tensor(labels))


# timm: the Hugging Face hub, WebDataset archives, and more of torchvision's sets


def timm_dataset(options: ReadOptions) -> RawDataset:
    """The set that timm knows by the rest of the name, with the splits that ``options`` names."""
    import torch

    from gradreg.train.data.datasets import RawDataset

    train, test = (_timm_split(options, split) for split in options.splits)
    labels = torch.cat([train.labels, test.labels])
    if labels.min() < 0:
        raise ValueError(f"images of {options.name!r} must have classes >= 0; got {int(labels.min())}, which marks an image without one.")
    return RawDataset(train, test, classes=int(labels.max()) + 1)


def _timm_split(options: ReadOptions, split: str) -> InMemoryImages | EncodedImages:
    prefix, _, name = options.name.partition(":")
    library = name.partition("/")[0].lower()
    if library not in _TIMM_LIBRARIES:
        # timm reads the images under root for any name that it does not know.
        known = ["folder", *(f"{prefix}:{one}/..." for one in _TIMM_LIBRARIES)]
        raise ValueError(checks.unknown("data set", options.name, known))

    import torch
    from PIL import Image
    from timm.data import create_dataset
    from torchvision.datasets import ImageFolder

    from gradreg.train.data.datasets import ImageRecords

    try:
        # TFDS gives arrays, of which timm makes images. Those of the others keep their mode, because PIL makes 16 bits white:
        # in_color converts them.
        mode = "RGB" if library == "tfds" else ""
        dataset = create_dataset(name, root=str(options.root), split=split, download=options.download, input_img_mode=mode)
    except Exception as error:  # of timm, of the library that it asks, or of the network
        raise ValueError(
            f"{options.name!r} could not be opened by timm with data.root {str(options.root)!r} and split {split!r}: "
            f"{type(error).__name__}: {error} See timm.data.create_dataset for the names, and --data.train_split and --data.test_split "
            "for the splits."
        ) from error
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, torch.utils.data.IterableDataset):
        if options.stream:
            raise ValueError(
                f"data.memory must not be false for {options.name!r}, which cannot be read by position; got false. Take a set that can "
                "(timm:hfds/..., folder), or hold this one in memory."
            )
        return _read_in_order(dataset, options.resize)
    if isinstance(dataset, ImageFolder):
        dataset.loader = Image.open
    records = getattr(dataset, "reader", dataset)
    labels = _labels_of(records)
    return ImageRecords(records, labels, torch.arange(len(labels)), name=f"{options.name}, split {split}")


def _labels_of(records: Any) -> Tensor:
    """The classes of all records, from their list if there is one, because reading every image for its class takes as long as an epoch."""
    import torch

    if hasattr(records, "label_key"):
        found = list(records.dataset[records.label_key])
    elif hasattr(records, "targets"):
        found = list(records.targets)
    else:
        found = []
        for index in range(len(records)):
            image, label = records[index]
            image.close()
            found.append(label)
    return torch.tensor(found, dtype=torch.int64)


def _read_in_order(dataset: Any, resize: Callable[..., Tensor]) -> InMemoryImages:
    """A set without access by position, read into memory, because batches need access by position."""
    import torch

    from gradreg.train.data.datasets import InMemoryImages, in_color, size_mismatch

    images: list[Tensor] = []
    labels: list[int] = []
    for image, label in dataset:
        images.append(resize(in_color(image)))
        labels.append(int(label))
        if images[-1].shape != images[0].shape:
            raise ValueError(size_mismatch(f"image {len(labels) - 1}", images[-1], images[0].shape))
    return InMemoryImages(torch.stack(images), torch.tensor(labels, dtype=torch.int64))
