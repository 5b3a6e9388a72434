"""The keys of ``data`` and ``augmentation``: what is refused, and how many images a run trains on."""

from __future__ import annotations

import pytest

from gradreg.study.plan import steps_per_epoch
from gradreg.train.configuration import Config
from gradreg.train.data.configuration import AugmentationConfig, DataConfig


@pytest.mark.parametrize(
    ("keys", "images"),
    [
        ({}, 1000),
        ({"train_size": 300, "validation": 0.1}, 270),
        ({"name": "mnist"}, 60_000),
        ({"name": "mnist", "validation": 5000}, 55_000),
        ({"name": "mnist", "train_size": 2000, "validation": 0.25}, 1500),
        ({"name": "cifar10", "validation": 5000}, 45_000),
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
    ],
)
def test_bad_splits_are_refused(keys, error, message):
    with pytest.raises(error, match=message):
        DataConfig(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"crop_padding": 0}, r"augmentation.crop_padding must be >= 1; got 0. Use null for none"),
        ({"padding": "reflect"}, r"augmentation.crop_padding must be given with padding 'reflect'; got None. Write 4, say"),
    ],
)
def test_bad_augmentations_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**keys)
