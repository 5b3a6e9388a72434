"""Sets by name, in the layouts of those who publish them."""

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

from .cases import image_tree, joined, loaded

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
