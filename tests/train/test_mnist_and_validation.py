"""MNIST, the validation split, and how many images a run trains on."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest
import torch

from gradreg.study.plan import steps_per_epoch
from gradreg.train import data
from gradreg.train.configuration import Config, DataConfig


def test_validation_images_are_held_out_of_the_training_images_and_nothing_else_changes():
    whole = data.load(DataConfig(train_size=500, label_noise=0.3), seed=4)
    for validation, count in ((0.2, 100), (120, 120)):
        held = data.load(DataConfig(train_size=500, label_noise=0.3, validation=validation), seed=4)
        assert held.validation is not None
        assert (len(held.train), len(held.validation), whole.validation) == (500 - count, count, None)
        assert torch.equal(torch.cat([held.train.images, held.validation.images]), whole.train.images)
        assert torch.equal(torch.cat([held.train.labels, held.validation.labels]), whole.train.labels)
        assert torch.equal(held.test.images, whole.test.images)


@pytest.mark.parametrize(
    ("keys", "images"),
    [
        ({}, 1000),
        ({"train_size": 300, "validation": 0.1}, 270),
        ({"name": "mnist", "train_size": None}, 60_000),
        ({"name": "mnist", "train_size": None, "validation": 5000}, 55_000),
        ({"name": "mnist", "train_size": 2000, "validation": 0.25}, 1500),
    ],
)
def test_steps_per_epoch_know_the_training_images_without_loading_them(keys, images):
    config = Config(data=DataConfig(**keys), batch_size=100)
    assert config.data.training_images() == images
    assert steps_per_epoch(config) == -(-images // 100)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            {"validation": 0},
            ValueError,
            r"data.validation must be a share > 0 and < 1, or a number of images >= 1 .*; got 0 of 1000 images",
        ),
        ({"validation": 0.0}, ValueError, r"data.validation must be a share .*; got 0.0 of 1000 images"),
        ({"validation": 1.0}, ValueError, r"leave some to train on; got 1.0 of 1000 images"),
        ({"validation": 1000}, ValueError, r"leave some to train on; got 1000 of 1000 images"),
        ({"validation": -0.1}, ValueError, r"data.validation must .*; got -0.1"),
        ({"validation": "0.1"}, TypeError, r"data.validation must .*; got '0.1' \(str\)"),
        ({"train_size": None}, ValueError, r"data.train_size must be a number for 'digits', which has no test set of its own; got null"),
    ],
)
def test_bad_splits_are_refused(keys, error, message):
    with pytest.raises(error, match=message):
        DataConfig(**keys)


def _fake_mnist(root: Path, train: int = 30, test: int = 12) -> None:
    """MNIST's four files with few images, each filled with its own class's grey."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", test)):
        labels = bytes(i % 10 for i in range(count))
        images = b"".join(bytes([20 * label]) * 784 for label in labels)
        for part, header in (("labels-idx1", struct.pack(">II", 2049, count)), ("images-idx3", struct.pack(">IIII", 2051, count, 28, 28))):
            content = header + (labels if "labels" in part else images)
            (raw / f"{name}-{part}-ubyte").write_bytes(content)
            (raw / f"{name}-{part}-ubyte.gz").write_bytes(gzip.compress(content))


def test_mnist_keeps_its_own_test_set_and_scales_to_one(tmp_path):
    _fake_mnist(tmp_path)
    sets = data.load(DataConfig(name="mnist", train_size=20, validation=5, root=str(tmp_path)), seed=0)
    assert sets.validation is not None
    assert (len(sets.train), len(sets.validation), len(sets.test), sets.classes) == (15, 5, 12, 10)
    for split in (sets.train, sets.validation, sets.test):
        assert split.images.shape[1:] == (1, 28, 28)
        torch.testing.assert_close(split.images[:, 0, 3, 3], split.labels * 20 / 255)
    with pytest.raises(ValueError, match=r"data.train_size must be <= 30, the images of 'mnist'; got 31\.$"):
        data.load(DataConfig(name="mnist", train_size=31, root=str(tmp_path)), seed=0)


def test_missing_files_are_named_and_not_fetched(tmp_path):
    with pytest.raises(ValueError, match=r"data.root must hold MNIST, as .*; got .* let it be fetched with --data.download true"):
        data.load(DataConfig(name="mnist", train_size=10, root=str(tmp_path / "nowhere")), seed=0)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("GRADREG_DATA"), reason="needs the folder of data sets in $GRADREG_DATA")
def test_real_mnist_has_its_sixty_thousand_images():
    sets = data.load(DataConfig(name="mnist", train_size=None, root=os.environ["GRADREG_DATA"]), seed=0)
    assert (len(sets.train), len(sets.test)) == (60_000, 10_000)
    assert sets.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert sets.train.images.mean().item() == pytest.approx(0.1307, abs=1e-4)
