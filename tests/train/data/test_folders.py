"""Folders of images: the layouts that are found, and what is said about those that are not."""

from __future__ import annotations

import pytest
import torch

from gradreg.train.configuration import Config
from gradreg.train.data.configuration import DataConfig

from .cases import image_tree, joined, loaded


def folder(root, **keys):
    return loaded(name="folder", root=str(root), workers=0, **keys)


@pytest.mark.parametrize("test", ["val", "validation", "test"])
def test_a_tree_with_images_to_test_on(tmp_path, test):
    sets = folder(image_tree(tmp_path, {"train": 3, test: 2}))
    assert (len(sets.train), len(sets.test), sets.classes) == (9, 6, 3)
    assert joined(sets.test.batches(6)).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert DataConfig(name="folder", root=str(tmp_path)).training_images() == 9
    assert DataConfig(name="folder", root=str(tmp_path), validation=1 / 3).training_images() == 6


@pytest.mark.parametrize("split", ["", "train"])
def test_one_folder_is_split_by_train_size(tmp_path, split):
    image_tree(tmp_path, {split: 4})
    sets = folder(tmp_path, train_size=7, test_size=4, validation=2)
    assert (len(sets.train), len(sets.validation), len(sets.test)) == (5, 2, 4)
    images = torch.cat([joined(part).images for part in (sets.train.batches(1, 9), sets.validation.batches(9), sets.test.batches(9))])
    assert len(images.flatten(1).unique(dim=0)) == 11
    with pytest.raises(ValueError, match=r"data.train_size must be a number for 'folder' with no images to test on .*; got null"):
        folder(tmp_path)
    with pytest.raises(ValueError, match=r"data.train_size must be a number for 'folder'"):
        DataConfig(name="folder", root=str(tmp_path)).training_images()


def test_a_missing_folder_is_no_error_until_it_is_needed(tmp_path):
    config = Config(data=DataConfig(name="folder", root=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"data.root must be a folder with a folder of images a class; got '.*nowhere'"):
        config.data.training_images()


def test_the_classes_to_test_on_must_be_those_to_train_on(tmp_path):
    image_tree(tmp_path, {"train": 1, "val": 1})
    (tmp_path / "val" / "emu").rename(tmp_path / "val" / "fox")
    with pytest.raises(ValueError, match=r"val must have the same class folders as those to train on; 'emu', 'fox' are in one of the two"):
        folder(tmp_path)


def test_folders_without_images_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data.root must hold a folder of images a class, as .*CLASS/\*.jpg; got this: Couldn't find any"):
        folder(tmp_path)
    image_tree(tmp_path, {"train": 1, "val": 1})
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"got this: Found no valid file for the classes empty"):
        folder(tmp_path)


@pytest.mark.parametrize("sorted_into_classes", [True, False])
def test_tiny_imagenet_as_it_unpacks(tmp_path, sorted_into_classes):
    root = tmp_path / "tiny-imagenet-200"
    image_tree(root, {"train": 2, "val": 3}, size=(64, 64), suffix="JPEG")
    for name in ("cat", "dog", "emu"):
        images = root / "train" / name / "images"
        images.mkdir()
        for path in list((root / "train" / name).glob("*.JPEG")):
            path.rename(images / f"{name}_{path.name}")
    sets = loaded(name="tiny-imagenet", root=str(tmp_path), workers=0)
    expected = joined(sets.test.batches(9))
    if not sorted_into_classes:
        lines = []
        (root / "val" / "images").mkdir()
        for name in ("cat", "dog", "emu"):
            for path in sorted((root / "val" / name).iterdir()):
                lines.append(f"val_{len(lines)}.JPEG\t{name}\t0\t0\t63\t63\n")
                path.rename(root / "val" / "images" / f"val_{len(lines) - 1}.JPEG")
            (root / "val" / name).rmdir()
        (root / "val" / "val_annotations.txt").write_text("".join(lines))
    sets = loaded(name="tiny-imagenet", root=str(tmp_path), workers=0)
    assert (len(sets.train), len(sets.test), sets.classes, sets.image_shape) == (6, 9, 3, (3, 64, 64))
    found = joined(sets.test.batches(9))
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.images, expected.images)


def test_a_class_that_tiny_imagenet_does_not_train_on_is_an_error(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    image_tree(root, {"train": 1, "val": 1})
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tgnu\t0\t0\t63\t63\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt must name classes of .*train; got 'gnu'"):
        loaded(name="tiny-imagenet", root=str(tmp_path), workers=0)


def test_imagenet_as_class_folders(tmp_path):
    image_tree(tmp_path / "imagenet", {"train": 2, "val": 1}, size=(40, 50), suffix="JPEG")
    sets = loaded(name="imagenet", root=str(tmp_path), workers=0, image_size=14)
    assert (len(sets.train), len(sets.test), sets.image_shape) == (6, 3, (3, 14, 14))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tiny-imagenet",
            r"data.root must hold Tiny ImageNet, as .*n01443537_0.JPEG, .*val_annotations.txt .* Unpack tiny-imagenet-200.zip",
        ),
        ("imagenet", r"data.root must hold ImageNet, as .*n01440764/\*.JPEG .* ILSVRC2012_devkit_t12.tar.gz in .* Name the folder"),
    ],
)
def test_what_is_missing_is_described(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        loaded(name=name, root=str(tmp_path), image_size=32)
    with pytest.raises(ValueError, match=rf"data.download must be false for '{name}'"):
        loaded(name=name, root=str(tmp_path), download=True)
