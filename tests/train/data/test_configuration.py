"""The keys of ``data`` and ``augmentation``: what is refused, and how many images a run trains on."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict

import pytest

from gradreg.train.arguments import CommandParser
from gradreg.train.configuration import Config
from gradreg.train.data.catalogue import SETS
from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.recipe import configuration, parse_recipe

from .cases import loaded


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
    assert config.steps_per_epoch() == -(-images // 100)


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
        ({"name": "cifar-10"}, ValueError, r"unknown data set 'cifar-10'\. Did you mean 'cifar10'\?"),
        ({"name": "mnist", "train_size": 0}, ValueError, r"data.train_size must be >= 1; got 0"),
        ({"test_size": 0}, ValueError, r"data.test_size must be >= 1; got 0"),
        ({"image_size": 3.5}, TypeError, r"data.image_size must be a whole number >= 1; got 3.5"),
        ({"workers": -1}, ValueError, r"data.workers must be >= 0; got -1"),
        ({"evaluation_crop": 0.5}, ValueError, r"data.image_size must be given with data.evaluation_crop 0.5; got null. Write 224, say"),
        ({"evaluation_crop": 87.5, "image_size": 8}, ValueError, r"data.evaluation_crop must be <= 1; got 87.5. It is a share"),
        ({"download": True}, ValueError, r"data.download must be false for 'digits', which comes from no network; got true"),
        ({"name": "folder", "download": True}, ValueError, r"data.download must be false for 'folder', which comes from no network"),
        (
            {"test_split": "test"},
            ValueError,
            r"data.test_split must be left out unless the name begins with 'timm:'; got 'test' for 'digits'",
        ),
    ],
)
def test_bad_splits_are_refused(keys, error, message):
    with pytest.raises(error, match=message):
        DataConfig(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cutout": 0}, r"augmentation.cutout must be >= 1; got 0"),
        ({"mixup": 0.0}, r"augmentation.mixup must be finite and > 0; got 0.0. Use null for none"),
        ({"normalize": "cifar"}, r"unknown augmentation.normalize 'cifar'. Did you mean 'cifar10'\? Known: auto, none, digits"),
        ({"random_erasing": 1.5}, r"augmentation.random_erasing must be <= 1; got 1.5. It is a probability"),
        ({"rand_augment": 2, "rand_magnitude": 31}, r"augmentation.rand_magnitude must be <= 30; got 31"),
        ({"rand_magnitude": 5}, r"augmentation.rand_augment must be given with rand_magnitude 5; got None. Write 2, say"),
        ({"scale": [0.5, 1.0]}, r"augmentation.random_resized_crop must be given with scale \[0.5, 1.0\]; got False. Write true, say"),
        ({"random_resized_crop": True, "scale": [0.5, 1.5]}, r"augmentation.scale must be two numbers > 0 and <= 1, .*; got \[0.5, 1.5\]"),
        ({"random_resized_crop": True, "ratio": [2.0, 0.5]}, r"augmentation.ratio must be two numbers > 0, the smaller first; got"),
        ({"random_resized_crop": True, "ratio": [1.0]}, r"augmentation.ratio must be two numbers > 0, the smaller first; got \[1.0\]"),
        ({"auto_augment": "svhn", "rand_augment": 2}, r"augmentation.auto_augment must be left out with rand_augment; got 'svhn' and 2"),
        ({"random_resized_crop": True, "crop_padding": 4}, r"augmentation.random_resized_crop must be left out with crop_padding"),
        ({"crop_padding": 0}, r"augmentation.crop_padding must be >= 1; got 0. Use null for none"),
        ({"padding": "reflect"}, r"augmentation.crop_padding must be given with padding 'reflect'; got None. Write 4, say"),
    ],
)
def test_bad_augmentations_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**keys)


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ({"crop_padding": 8, "padding": "reflect"}, r"augmentation.crop_padding must be < 8, the smaller side of the images of 'digits'"),
        ({"normalize": "cifar10"}, r"augmentation.normalize must fit images of 1 channels, as those of 'digits'; got 'cifar10', with 3"),
        ({"rand_augment": 2}, r"augmentation.auto_augment and rand_augment must be null for 'digits', whose images have 17 levels"),
    ],
)
def test_augmentations_that_do_not_fit_the_images_are_refused(augmentation, message):
    with pytest.raises(ValueError, match=message):
        loaded(augmentation=augmentation)


def test_only_what_is_counted_beforehand_has_a_size_before_it_is_loaded():
    with pytest.raises(ValueError, match=r"data.train_size must be given for 'timm:hfds/x', whose images are not counted"):
        DataConfig(name="timm:hfds/x").training_images()
    assert DataConfig(name="timm:hfds/x", train_size=50, validation=0.1).training_images() == 45


@pytest.mark.parametrize("name", [name for name in SETS if name != "folder"])
def test_every_named_set_has_its_size(name):
    assert DataConfig(name=name).training_images() >= 1000


def test_a_recipe_says_all_of_it_and_it_round_trips():
    recipe = parse_recipe(
        "x",
        "data: {name: cifar10, validation: 5000, memory: auto, workers: 2}\n"
        "augmentation: {flip: true, crop_padding: 4, padding: reflect, auto_augment: cifar10, cutout: 16, mixup: 0.2}",
    )
    config = configuration(recipe.settings())
    assert (config.augmentation.flip, config.augmentation.crop_padding, config.augmentation.auto_augment) == (True, 4, "cifar10")
    assert configuration(asdict(config)) == config
    for memory in ("true", "false", "auto"):
        words = ["x", f"--data.memory={memory}", "--augmentation.mixup=null"]
        changed = configuration(CommandParser("train", "").settings(words, recipe.base))
        assert changed.data.memory == {"true": True, "false": False}.get(memory, memory)
        assert changed.augmentation.mixup is None


def test_the_keys_load_without_pytorch():
    program = "import sys, gradreg.train.configuration; sys.exit(any(m in sys.modules for m in ('torch', 'torchvision', 'timm', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
