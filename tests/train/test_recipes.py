"""The shipped recipes: each builds, and trains for an epoch of two steps on generated images of the size and classes that it names."""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradreg.train import recipe as recipes
from gradreg.train.loop import train
from gradreg.train.recipe import configuration

CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "imagenet": 1000}

REDUCED: dict[str, dict[str, Any]] = {
    "wrn28_10": {"depth": 10, "width": 1},
    "pyramidnet272_200_shakedrop": {"depth": 20, "alpha": 12},
    "shakeshake26_2x96d": {"channels": 8},
    "vit_small_patch4_32": {"depth": 4},
    "vit_base_patch4_32": {"depth": 2},
    "vgg16_bn": {"mlp_ratio": 1 / 64},
}
"""What is made smaller of models that would take a CPU more than a second or two a step; the others are run as they are."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with MNIST's files, and CIFAR-10 and ImageNet as class folders, of a few images of noise for each class."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        contents = {
            "labels-idx1": struct.pack(">II", 2049, count) + bytes(i % 10 for i in range(count)),
            "images-idx3": struct.pack(">IIII", 2051, count, 28, 28) + draw.bytes(count * 784),
        }
        for name, content in contents.items():
            (raw / f"{part}-{name}-ubyte").write_bytes(content)
            (raw / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    for number in range(10):
        for part in ("train", "test"):
            write_images(root / "cifar10" / part / f"class{number}", draw, side=32, extension="png")
    for number in range(1000):
        for part in ("train", "val"):
            write_images(root / "imagenet" / part / f"n{number:08}", draw, side=40, extension="JPEG")
    return root


def write_images(folder: Path, draw: np.random.Generator, *, side: int, extension: str) -> None:
    folder.mkdir(parents=True)
    file = io.BytesIO()
    Image.fromarray(draw.integers(256, size=(side, side, 3), dtype=np.uint8)).save(file, format=extension)
    (folder / f"0.{extension}").write_bytes(file.getvalue())


def shortened(recipe: recipes.Recipe, variant: str | None, root: Path) -> dict[str, Any]:
    """The settings of a run of two steps: four images, two a step; warm-ups of whole epochs are one, in a run of two."""
    settings = recipe.settings(variant)
    epochs = 2 if settings.get("schedule", {}).get("warmup_epochs") else 1
    settings = recipes.merge(
        settings,
        {
            "data": {"root": str(root), "train_size": 4, "test_size": 4, "validation": None, "workers": 0},
            "model": REDUCED.get(settings["model"]["name"], {}),
            "schedule": {"warmup_epochs": epochs - 1},
            "epochs": epochs,
            "batch_size": 2,
            "threads": 1,
            "device": "cpu",
        },
    )
    if settings["data"]["name"] == "imagenet":
        settings["data"]["image_size"] = 32
    if "warmup" in (settings.get("penalty") or {}):
        settings["penalty"]["warmup"]["epochs"] = 1
    return settings


def with_penalty(recipe: recipes.Recipe) -> str:
    """A variant with a penalty, which is warmed up if one is; of a recipe without any the first that decays its weights by AutoL2."""
    penalties = {name: keys["penalty"] for name, keys in recipe.variants.items() if keys.get("penalty")}
    if not penalties:
        return next(name for name, keys in recipe.variants.items() if "weight_decay" in keys)
    return max(penalties, key=lambda name: "warmup" in penalties[name])


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_recipe_trains_with_and_without_a_penalty(name, root):
    recipe = recipes.load(name)
    for variant in (None, with_penalty(recipe)):
        config = configuration(shortened(recipe, variant, root))
        outcome = train(config)
        steps = 2 * config.epochs
        penalty = config.resolved_penalty(2)
        last = outcome.history[-1]
        assert last.step == steps
        assert last.gradient_evaluations == sum(penalty.evaluations_at(step) for step in range(steps))
        assert (last.gradient_evaluations > steps) == (config.penalty is not None)
        assert all(map(math.isfinite, (last.train_loss, last.test_loss)))
        outputs = [w for w in outcome.weights.values() if w.ndim > 0 and w.shape[0] == CLASSES[config.data.name]]
        assert outputs, "no layer has an output for each class"
        assert all(torch.isfinite(w).all() for w in outcome.weights.values())


@pytest.mark.parametrize("name", recipes.shipped())
def test_the_head_of_a_recipe_says_what_it_is_and_how_to_run_it(name):
    recipe = recipes.load(name)
    text = (resources.files("gradreg") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    head = text[: text.index("description:")]
    assert all(line.startswith("#") for line in head.splitlines())
    assert all(len(line) <= 140 for line in text.splitlines())
    assert re.search(rf"gradreg (train|compare|l2 probe) {name}\b", head)
    assert "arXiv" in head or "All settings are ours." in head
    assert re.search(r"(?:# |\. )Published: \S", head)
    assert "not published" not in head
    assert "Expected" in head
    assert "Hardware" in head
    assert "Data: " in head or recipe.base["data"]["name"] == "digits"
    if recipe.base["data"]["name"] != "digits":
        assert "--data.root DATA" in head
    for variant in re.findall(r"--penalties ((?:[\w.-]+ )+?)(?=--|\n|$)", head):
        assert set(variant.split()) <= set(recipe.variants)
    for variant in re.findall(r"--variant (\S+)", head):
        assert variant in recipe.variants


ROWS = {
    # name: (model, data, epochs, batch size, lr, optimizer, L2 or weight decay, r, alpha, epochs of both warm-ups)
    "wideresnet-cifar": ("wrn28_10", "cifar10", 200, 256, 0.1, "sgd", 1e-3, 0.1, 0.8, 0),
    "resnet-cifar": ("resnet50_cifar", "cifar10", 200, 256, 0.1, "sgd", 1e-3, 0.1, 0.8, 0),
    "shake-shake-cifar": ("shakeshake26_2x96d", "cifar10", 1800, 256, 0.1, "sgd", 1e-3, 0.1, 0.8, 0),
    "pyramidnet-cifar": ("pyramidnet272_200_shakedrop", "cifar10", 1800, 128, 0.05, "sgd", 5e-4, 0.1, 0.8, 0),
    "resnet-imagenet": ("resnet50", "imagenet", 100, 512, 0.2, "sgd", 1e-4, 0.05, 0.8, 0),
    "vgg-imagenet": ("vgg16_bn", "imagenet", 100, 256, 0.1, "sgd", 1e-4, 0.05, 0.8, 0),
    "vit-cifar-basic": ("vit_small_patch4_32", "cifar10", 300, 256, 1e-3, "adamw", 0.3, 0.1, 0.8, 0),
    "vit-cifar-warmup": ("vit_small_patch4_32", "cifar10", 300, 256, 1e-3, "adamw", 0.3, 0.1, 1.0, 40),
    "vit-cifar-heavy": ("vit_small_patch4_32", "cifar10", 1200, 256, 5e-4, "adamw", 0.03, 0.1, 0.8, 0),
    "swin-imagenet-warmup": ("swin_tiny_patch4_window7_224", "imagenet", 300, 256, 2e-3, "adamw", 0.05, 0.05, 1.0, 40),
}
"""The runs of the GNP reference."""


@pytest.mark.parametrize("name", ROWS)
def test_the_reference_runs_have_their_published_settings(name):
    model, data, epochs, batch, lr, optimizer, decay, radius, alpha, warmup = ROWS[name]
    config = configuration(recipes.load(name).settings("gnp"))
    assert (config.model["name"], config.data.name, config.data.train_size) == (model, data, None)
    assert (config.epochs, config.batch_size, config.clip_norm) == (epochs, batch, 5.0)
    assert (config.schedule.name, config.schedule.warmup_epochs, config.schedule.min_lr) == ("cosine", warmup, 0.0)
    chosen = config.optimizer
    assert (chosen.name, chosen.lr) == (optimizer, lr)
    # L2 is in the loss with SGD and decoupled with AdamW.
    assert (chosen.l2_in_loss, chosen.weight_decay) == ((decay, 0.0) if optimizer == "sgd" else (0.0, decay))
    if optimizer == "sgd":
        assert (chosen.momentum, chosen.nesterov) == (0.9, True)
    assert config.penalty is not None
    assert (config.penalty["name"], config.penalty["r"], config.penalty["alpha"]) == ("gnp", radius, alpha)
    assert config.penalty.get("warmup") == ({"kind": "zero", "epochs": warmup} if warmup else None)


def test_the_grid_of_forward_and_backward_differences_is_whole():
    variants = recipes.load("fgr-wrn-cifar10").variants
    found = [(p["name"], p["gamma"], p.get("epsilon")) for p in (v.get("penalty") for v in variants.values()) if p]
    strengths, steps = (1e-4, 1e-3, 1e-2, 1e-1), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    differences = [(name, gamma, epsilon) for name in ("fgr", "bgr") for gamma in strengths for epsilon in steps]
    assert found == [*differences, *(("exact", gamma, None) for gamma in strengths)]
