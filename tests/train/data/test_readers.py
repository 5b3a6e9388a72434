"""Every data set in the layout of its publishers: what is read, and what is said about files that are missing."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from gradreg.train.configuration import Config
from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.datasets import InMemoryImages
from gradreg.train.data.readers import ReadOptions, digits

from .cases import image_tree, joined, loaded, same

# scikit-learn and torchvision


def test_digits_are_those_that_scikit_learn_loads():
    from sklearn.datasets import load_digits

    options = ReadOptions(name="digits", root=Path(), download=False, splits=("train", "test"), stream=False, resize=lambda image: image)
    found = digits(options).train
    images, labels = load_digits(return_X_y=True)
    assert isinstance(found, InMemoryImages)
    assert np.array_equal(found.images.reshape(-1, 64).numpy(), images)
    assert np.array_equal(found.labels.numpy(), labels)
    assert found.images.max() == found.max_value == 16


RAW = {"augmentation": {"normalize": "none"}}


def write_mnist(root: Path, folder: str, train: int = 30, test: int = 12) -> None:
    """MNIST's four files with few images, each filled with its own class's grey."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", test)):
        labels = bytes(i % 10 for i in range(count))
        images = b"".join(bytes([20 * label]) * 784 for label in labels)
        for part, header in (("labels-idx1", struct.pack(">II", 2049, count)), ("images-idx3", struct.pack(">IIII", 2051, count, 28, 28))):
            content = header + (labels if "labels" in part else images)
            (raw / f"{name}-{part}-ubyte").write_bytes(content)
            (raw / f"{name}-{part}-ubyte.gz").write_bytes(gzip.compress(content))


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, dataset: type, *, classes: int) -> None:
    """The pickles of CIFAR with one image a class in each, and the sums that torchvision compares them with."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    labels = list(range(classes))
    key = "labels" if classes == 10 else "fine_labels"
    for listed in ("train_list", "test_list"):
        sums = []
        for i, (name, _) in enumerate(getattr(dataset, listed)):
            pixels = np.zeros((classes, 3, 32, 32), dtype=np.uint8)
            pixels[:, 0], pixels[:, 1, 0], pixels[:, 2, :, 31] = np.array(labels)[:, None, None], 100 + i, 200
            (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(classes, 3072), key: labels}))
            sums.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
        monkeypatch.setattr(dataset, listed, sums)
    names = pickle.dumps({"label_names": labels, "fine_label_names": labels})
    meta = {**dataset.meta, "md5": hashlib.md5(names).hexdigest()}
    (folder / meta["filename"]).write_bytes(names)
    monkeypatch.setattr(dataset, "meta", meta)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_keeps_its_own_test_set_and_scales_to_one(tmp_path, name, folder):
    write_mnist(tmp_path, folder)
    sets = loaded(name=name, train_size=20, validation=5, root=str(tmp_path))
    assert sets.validation is not None
    assert (len(sets.train), len(sets.validation), len(sets.test), sets.classes) == (15, 5, 12, 10)
    for batch in (joined(sets.train.batches(1, 4)), joined(sets.validation.batches(5)), joined(sets.test.batches(5))):
        assert batch.images.shape[1:] == (1, 28, 28)
        torch.testing.assert_close(batch.images[:, 0, 3, 3], batch.labels * 20 / 255)
    with pytest.raises(ValueError, match=rf"data.train_size must be <= 30, the images of '{name}'; got 31\.$"):
        loaded(name=name, train_size=31, root=str(tmp_path))
    with pytest.raises(ValueError, match=rf"data.test_size must be <= 12, the test images of '{name}'; got 13\.$"):
        loaded(name=name, test_size=13, root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "dataset", "classes"), [("cifar10", torchvision.datasets.CIFAR10, 10), ("cifar100", torchvision.datasets.CIFAR100, 100)]
)
def test_cifar_as_torchvision_downloads_it(tmp_path, monkeypatch, name, dataset, classes):
    write_cifar(tmp_path, monkeypatch, dataset, classes=classes)
    sets = loaded(name=name, root=str(tmp_path), **RAW)
    files = len(dataset.train_list)
    assert (len(sets.train), len(sets.test), sets.classes, sets.image_shape) == (files * classes, classes, classes, (3, 32, 32))
    batch = joined(sets.train.batches(1, 64))
    bytes_ = (batch.images * 255).round().to(torch.int64)
    assert torch.equal(bytes_[:, 0, 5, 5], batch.labels)  # red, by channel, then row, then column
    assert bytes_[:, 1, 0, 5].bincount()[100:].tolist() == [classes] * files
    assert (bytes_[:, 2, 5, 31] == 200).all()
    assert (bytes_[:, 2, 31, 5] == 0).all()
    colours = joined(loaded(name=name, root=str(tmp_path)).test.batches(100)).images
    assert colours.min() < -1.5  # normalised


def test_svhn_as_torchvision_downloads_it(tmp_path, monkeypatch):
    from scipy.io import savemat

    sums = {}
    for split, count in (("train", 20), ("test", 10)):
        path = tmp_path / f"{split}_32x32.mat"
        labels = np.arange(count) % 10
        images = np.broadcast_to(labels.astype(np.uint8), (32, 32, 3, count))
        savemat(path, {"X": images, "y": np.where(labels == 0, 10, labels)[:, None]})  # the publishers call 0 class 10
        sums[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", sums)
    sets = loaded(name="svhn", root=str(tmp_path), **RAW)
    assert (len(sets.train), len(sets.test), sets.classes, sets.image_shape) == (20, 10, 10, (3, 32, 32))
    batch = joined(sets.train.batches(1, 8))
    assert torch.equal((batch.images[:, 1, 3, 3] * 255).round().to(torch.int64), batch.labels)


def test_cifar_as_class_folders_if_torchvisions_are_not_there(tmp_path, monkeypatch):
    root = tmp_path / "cifar10"
    image_tree(root, {"train": 3, "test": 1}, size=(32, 32))
    with pytest.raises(
        ValueError, match=r"data.root must hold 'cifar10' with a folder for each of its 10 classes; got 3 in .*cifar10/train"
    ):
        loaded(name="cifar10", root=str(tmp_path))
    for i in range(7):
        for split in ("train", "test"):
            (root / split / "cat").rename(root / split / f"class{i}")
        image_tree(root, {"train": 3, "test": 1}, size=(32, 32))
    sets = loaded(name="cifar10", root=str(tmp_path), workers=0)
    assert (len(sets.train), len(sets.test), sets.classes, sets.image_shape) == (30, 10, 10, (3, 32, 32))
    write_cifar(tmp_path, monkeypatch, torchvision.datasets.CIFAR10, classes=10)
    assert len(loaded(name="cifar10", root=str(tmp_path)).train) == 50


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("mnist", "MNIST, as .*/MNIST/raw/train-images-idx3-ubyte and the like"),
        ("fashion-mnist", "Fashion-MNIST, as .*/FashionMNIST/raw/train-images-idx3-ubyte and the like"),
        ("cifar10", r"CIFAR-10, as .*/cifar-10-batches-py/data_batch_1 and the like \(or class folders as .*/cifar10/train/CLASS/\*.png\)"),
        ("cifar100", r"CIFAR-100, as .*/cifar-100-python/train and the like \(or class folders as .*/cifar100/train"),
        ("svhn", "SVHN, as .*/train_32x32.mat and the like"),
    ],
)
def test_missing_files_are_named_and_not_fetched(tmp_path, name, example):
    with pytest.raises(ValueError, match=rf"data.root must hold {example}.*; got .* let it be fetched with --data.download true"):
        loaded(name=name, train_size=10, root=str(tmp_path / "nowhere"))


# Folders of images


def folder(root, **keys):
    return loaded(name="folder", root=str(root), workers=0, **keys)


@pytest.mark.parametrize("test", ["val", "validation", "test"])
def test_a_tree_with_images_to_test_on(tmp_path, test):
    sets = folder(image_tree(tmp_path, {"train": 3, test: 2}))
    assert (len(sets.train), len(sets.test), sets.classes) == (9, 6, 3)
    assert joined(sets.test.batches(6)).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert DataConfig(name="folder", root=str(tmp_path)).training_images() == 9
    assert DataConfig(name="folder", root=str(tmp_path), validation=1 / 3).training_images() == 6


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_three_folders_mean_what_they_say(tmp_path, name):
    sets = folder(image_tree(tmp_path, {"train": 4, name: 1, "test": 2}))
    assert sets.validation is not None
    assert (len(sets.train), len(sets.validation), len(sets.test)) == (12, 3, 6)
    alone = folder(image_tree(tmp_path / "alone", {"train": 1, "val": 1}), train_size=None)
    assert (len(alone.test), alone.validation) == (3, None)
    for part, images in ((name, sets.validation), ("test", sets.test)):
        root = tmp_path / f"only-{part}"
        root.mkdir()
        (root / "train").symlink_to(tmp_path / "train")
        (root / "test").symlink_to(tmp_path / part)
        assert torch.equal(joined(images.batches(9)).images, joined(folder(root).test.batches(9)).images)
    few = folder(tmp_path, train_size=5, test_size=4, label_noise=1.0)
    assert (len(few.train), len(few.validation), len(few.test)) == (5, 3, 4)
    assert joined(few.validation.batches(9)).labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"data.validation must be null for 'folder' with validation images of its own, 3; got 2\. Leave"):
        folder(tmp_path, validation=2)


def test_two_folders_for_one_purpose_are_named(tmp_path):
    image_tree(tmp_path, {"train": 1, "val": 1, "validation": 1, "test": 1})
    with pytest.raises(ValueError, match=r"must have one folder of validation images; got val and validation\. Remove one"):
        folder(tmp_path)


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
    with pytest.raises(ValueError, match=r"data.root must hold a folder of images a class, as .*CLASS/\*.jpg; got no folder in '.*'\."):
        folder(tmp_path)
    image_tree(tmp_path, {"train": 1, "val": 1})
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"every class folder of '.*train' must hold an image \(\.jpg, .*\); got none in 'empty'\. Fill"):
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


# timm, without network


@pytest.fixture
def timm_tree(tmp_path):
    return image_tree(tmp_path / "tree", {"train": 4, "validation": 2})


@pytest.mark.parametrize("memory", [True, False])
def test_timm_gives_what_the_folder_gives(timm_tree, memory):
    ours, timms = (loaded(name=n, root=str(timm_tree), workers=0, memory=memory) for n in ("folder", "timm:torch/image_folder"))
    assert timms.classes == 3
    assert same(ours.train.batches(2, 5), timms.train.batches(2, 5))
    assert same(ours.test.batches(5), timms.test.batches(5))


def test_a_set_of_the_hub_is_read_by_position_with_its_own_splits(timm_tree, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    keys = {"name": f"timm:hfds/{timm_tree}", "root": str(tmp_path / "cache"), "workers": 0, "memory": False}
    sets = loaded(**keys, train_size=9, validation=3)
    assert (len(sets.train), len(sets.validation), len(sets.test), sets.classes) == (6, 3, 6, 3)
    expected = joined(loaded(name="folder", root=str(timm_tree), workers=0).test.batches(9))
    assert torch.equal(joined(sets.test.batches(9)).images, expected.images)
    assert torch.equal(joined(sets.test.batches(9)).labels, expected.labels)
    assert len(loaded(**keys, train_split="validation", test_split="train").train) == 6


def test_a_set_that_can_only_be_read_through_is_held_in_memory(timm_tree, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    keys = {"name": f"timm:hfids/{timm_tree}", "root": str(tmp_path / "cache"), "workers": 0}
    expected = joined(loaded(**{**keys, "name": f"timm:hfds/{timm_tree}"}).test.batches(9))  # which notes how many images there are
    assert torch.equal(joined(loaded(**keys).test.batches(9)).images, expected.images)
    with pytest.raises(ValueError, match=r"data.memory must not be false for 'timm:hfids.*', which cannot be read by position"):
        loaded(**keys, memory=False)


@pytest.mark.parametrize("library", ["hfids", "hfds", "torch"])
def test_images_of_timms_sets_become_color_as_all_others(timm_tree, tmp_path, monkeypatch, library):
    """Of 16 bits the upper 8 are kept, where PIL by itself would make them white."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for path in timm_tree.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 256 + 255).save(path)
    keys = {"root": str(tmp_path / "cache"), "workers": 0}
    if library == "hfids":
        loaded(name=f"timm:hfds/{timm_tree}", **keys)  # which notes how many images there are
    elif library == "torch":
        keys["root"] = str(timm_tree)
    found = joined(loaded(name=f"timm:{library}/{'image_folder' if library == 'torch' else timm_tree}", **keys).test.batches(9))
    expected = joined(loaded(name="folder", root=str(timm_tree), workers=0).test.batches(9))
    assert torch.equal(found.images, expected.images)
    assert len(expected.images.unique()) > 100


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:hdfs/x", r"unknown data set 'timm:hdfs/x'\. Did you mean 'timm:hfds/\.\.\.'\?"),
        ("timm:torch/nonsense", r"'timm:torch/nonsense' could not be opened by timm with data.root .* and split 'train': AssertionError"),
        ("timm:torch/mnist", r"'timm:torch/mnist' could not be opened by timm .*RuntimeError: Dataset not found"),
    ],
)
def test_what_timm_cannot_open_is_an_error_with_its_reason(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        loaded(name=name, root=str(tmp_path))


# The real files

needs_data = pytest.mark.skipif(not os.environ.get("GRADREG_DATA"), reason="needs the folder of data sets in $GRADREG_DATA")


@pytest.mark.data
@needs_data
def test_real_mnist_has_its_sixty_thousand_images():
    sets = loaded(name="mnist", root=os.environ["GRADREG_DATA"])
    assert (len(sets.train), len(sets.test)) == (60_000, 10_000)
    assert joined(sets.test.batches(10_000)).labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert joined(sets.train.batches(1, 60_000)).images.mean().item() == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.data
@needs_data
def test_real_cifar10_has_the_colours_that_it_is_normalised_by():
    sets = loaded(name="cifar10", root=os.environ["GRADREG_DATA"], validation=5000)
    assert sets.validation is not None
    assert (len(sets.train), len(sets.validation), len(sets.test)) == (45_000, 5_000, 10_000)
    assert joined(sets.test.batches(10_000)).labels.bincount().tolist() == [1000] * 10
    images = joined(sets.train.batches(1, 45_000)).images
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0.0, atol=0.02)
    torch.testing.assert_close(images.std(dim=(0, 2, 3)), torch.ones(3), rtol=0.0, atol=0.03)
