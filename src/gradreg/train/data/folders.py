"""Data sets that are folders of image files, one a class."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.pools import Files, Source

TEST_FOLDERS = ("val", "validation", "test")
"""Where images to test on are looked for, in this order."""


def folder(config: DataConfig) -> Source:
    """``root/train/CLASS/*.jpg`` with ``root/val`` (or ``validation``, or ``test``) beside it, or ``root/CLASS/*.jpg`` to be split."""
    root = Path(config.root)
    if not root.is_dir():
        raise ValueError(f"data.root must be a folder with a folder of images a class; got {config.root!r}, which is none.")
    test = _test_folder(root)
    classes, train = _class_folders(_train_folder(root))
    return Source(train, None if test is None else _same_classes(test, classes), classes=len(classes))


def count_training_images(config: DataConfig) -> int:
    """How many images ``folder`` trains on where all are taken."""
    root = Path(config.root)
    if root.is_dir() and _test_folder(root) is None:
        raise ValueError(config.needs_train_size())
    return len(folder(config).train)


def named(config: DataConfig) -> Path | None:
    """The folder of the set ``config.name`` under ``data.root``, if there is one with images to train and to test on."""
    candidate = Path(config.root) / config.name
    return candidate if (candidate / "train").is_dir() and _test_folder(candidate) else None


def named_set(config: DataConfig, *, classes: int) -> Source:
    """The set ``config.name`` as class folders under ``data.root``."""
    source = folder(DataConfig(name="folder", root=str(Path(config.root) / config.name)))
    if source.classes != classes:
        raise ValueError(
            f"data.root must hold {config.name!r} with a folder for each of its {classes} classes; got {source.classes} in "
            f"{config.root}/{config.name}/train."
        )
    return source


def tiny_imagenet(config: DataConfig) -> Source:
    """Tiny ImageNet: 100,000 and 10,000 photographs of 64 x 64 pixels in 200 classes, as its archive unpacks.

    Its test images lie in one folder, their classes in ``val_annotations.txt``; sorted into class folders they are taken as well.
    """
    root = Path(config.root) / "tiny-imagenet-200"
    annotations = root / "val" / "val_annotations.txt"
    if config.download:
        raise ValueError("data.download must be false for 'tiny-imagenet', which has to be fetched and unpacked by hand; got true.")
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        raise ValueError(
            f"data.root must hold Tiny ImageNet, as {root}/train/n01443537/images/n01443537_0.JPEG, {annotations} and "
            f"{root}/val/images/val_0.JPEG; got {config.root!r}, where they are not. Unpack tiny-imagenet-200.zip there, or name the "
            "folder that holds it with --data.root."
        )
    classes, train = _class_folders(root / "train")
    if not annotations.is_file():
        return Source(train, _same_classes(root / "val", classes), classes=len(classes))
    index = {name: i for i, name in enumerate(classes)}
    rows = [line.split("\t")[:2] for line in annotations.read_text(encoding="utf-8").splitlines() if line]
    unknown = {name for _, name in rows} - index.keys()
    if unknown:
        raise ValueError(f"{annotations} must name classes of {root}/train; got {sorted(unknown)[0]!r}. Unpack the archive anew.")
    paths = [str(root / "val" / "images" / file) for file, _ in rows]
    return Source(train, Files(paths, torch.tensor([index[name] for _, name in rows])), classes=len(classes))


def imagenet(config: DataConfig) -> Source:
    """ImageNet 2012: 1,281,167 and 50,000 photographs in 1,000 classes, as class folders or as the archives of its publishers."""
    root = Path(config.root) / "imagenet"
    if config.download:
        raise ValueError("data.download must be false for 'imagenet', which its publishers hand out on request; got true.")
    if not ((root / "train").is_dir() and (root / "val").is_dir()):
        from torchvision.datasets import ImageNet

        try:
            for split in ("train", "val"):
                ImageNet(root, split=split)  # unpacks and sorts the archives, checking their sums
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"data.root must hold ImageNet, as {root}/train/n01440764/*.JPEG and {root}/val/n01440764/*.JPEG, or the archives "
                f"ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz in {root} to be unpacked there; "
                f"got {config.root!r}: {error} Name the folder that holds it with --data.root."
            ) from error
    classes, train = _class_folders(root / "train")
    return Source(train, _same_classes(root / "val", classes), classes=len(classes))


def _train_folder(root: Path) -> Path:
    return root / "train" if (root / "train").is_dir() else root


def _test_folder(root: Path) -> Path | None:
    if not (root / "train").is_dir():
        return None
    return next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)


def _class_folders(root: Path) -> tuple[list[str], Files]:
    """The names of the classes, in the order of their indices, and their images."""
    try:
        classes, index = find_classes(str(root))
        samples = make_dataset(str(root), index, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ValueError(f"data.root must hold a folder of images a class, as {root}/CLASS/*.jpg; got this: {error}") from error
    return classes, Files([path for path, _ in samples], torch.tensor([label for _, label in samples]))


def _same_classes(root: Path, classes: list[str]) -> Files:
    """The images under ``root``, whose classes must be those given, or their indices would mean other things."""
    found, files = _class_folders(root)
    if found != classes:
        different = sorted(set(found) ^ set(classes))
        raise ValueError(
            f"{root} must have the same class folders as those to train on; {', '.join(map(repr, different[:3]))} "
            f"{'is' if len(different) == 1 else 'are'} in one of the two only. Add or remove folders until they agree."
        )
    return files
