"""Floats, cutout, random erasing, mixup and CutMix of a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradreg.train.data.catalogue import SETS
from gradreg.train.data.configuration import AugmentationConfig
from gradreg.train.data.sampler import BatchSampler
from gradreg.train.data.transforms import BatchTransform, Normalize

from .cases import image_tree, joined, loaded

N = 400


def transformed(batch: int = 0, *, value: int = 255, images: Tensor | None = None, **keys) -> tuple[Tensor, Tensor]:
    """A batch of ``N`` images of 10 x 14 pixels and 7 classes, transformed."""
    transform = BatchTransform(Normalize(255, None), AugmentationConfig(**keys), classes=7, seed=0)
    indices = BatchSampler().part(1, batch, torch.arange(N), mixing=transform.mixes)
    pixels = torch.full((N, 3, 10, 14), value, dtype=torch.uint8) if images is None else images
    return transform(pixels, torch.arange(N) % 7, indices)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "tiny-imagenet", "imagenet"])
def test_normalizing_subtracts_the_mean_and_divides_by_the_standard_deviation(name):
    statistics = SETS[name].normalization
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = Normalize(255, statistics)(images)
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - statistics.mean[channel]) / statistics.std[channel]
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=0.0, atol=1e-6)
        assert 0.3 < statistics.mean[channel] < 0.6
        assert 0.15 < statistics.std[channel] < 0.3


def test_normalize_none_leaves_images_between_0_and_1(tmp_path):
    tree = image_tree(tmp_path, {"train": 2, "val": 1})
    plain, scaled = (
        joined(loaded(name="folder", root=str(tree), workers=0, augmentation={"normalize": n}).test.batches(9)).images
        for n in ("none", "auto")
    )
    assert plain.min() >= 0.0
    assert plain.max() <= 1.0
    torch.testing.assert_close(scaled, Normalize(255, SETS["imagenet"].normalization)((plain * 255).round().to(torch.uint8)))


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_sets_one_square_to_zero(side):
    images, targets = transformed(cutout=side)
    holes = (images == 0).all(dim=1)
    assert torch.equal((images == 0).any(dim=1), holes)  # the same in all channels
    assert images[~holes[:, None].expand_as(images)].min() == 1.0
    full = holes.sum(dim=(1, 2)) == side**2
    assert full.any()
    assert full.all() == (side == 1)  # others are cut off at the border
    for hole in holes:
        rows, columns = hole.any(dim=1).nonzero().flatten(), hole.any(dim=0).nonzero().flatten()
        assert len(rows) <= side
        assert len(columns) <= side
        assert hole.sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert side == 1 or holes.any(dim=0).all()  # every pixel is cut sometimes
    assert torch.equal(targets, torch.arange(N) % 7)


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_random_erasing_erases_its_share_of_images_and_area(probability):
    images, _ = transformed(random_erasing=probability)
    holes = (images == 0).all(dim=1)
    erased = holes.any(dim=(1, 2))
    assert abs(erased.float().mean().item() - probability) <= 4 * math.sqrt(probability * (1 - probability) / N)
    share = holes[erased].float().mean(dim=(1, 2))
    assert 0.12 < share.mean() < 0.22  # evenly from 2 to 33 %
    assert share.max() < 0.4


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_weighs_images_and_targets_alike_with_the_image_before(kind):
    noise = torch.randint(256, (N, 3, 10, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    originals = noise.float() / 255
    weights = []
    for batch in range(30):
        images, targets = transformed(batch, images=noise, **{kind: 1.0})
        weight = targets[1, 1].item()
        one_hot = torch.nn.functional.one_hot(torch.arange(N) % 7, 7).float()
        torch.testing.assert_close(targets, weight * one_hot + (1 - weight) * one_hot.roll(1, 0))
        if kind == "mixup":
            torch.testing.assert_close(images, weight * originals + (1 - weight) * originals.roll(1, 0))
        else:
            own = (images == originals).all(dim=1)
            assert torch.equal(images, torch.where(own[:, None], originals, originals.roll(1, 0)))
            assert own.float().mean().item() == pytest.approx(weight, abs=1e-3)
        weights.append(weight)
    assert len(set(weights)) > 20
    assert 0.3 < sum(weights) / len(weights) < 0.8


def test_with_both_each_batch_draws_one():
    pictures = torch.arange(N, dtype=torch.uint8)[:, None, None, None].expand(N, 3, 10, 14).contiguous()
    kinds = []
    for batch in range(40):
        images, _ = transformed(batch, images=pictures, mixup=1.0, cutmix=1.0)
        kinds.append(len(images[5, 0].unique()) > 1)
    assert 8 < sum(kinds) < 32


def test_batches_and_epochs_draw_again_and_repeat_themselves():
    keys = {"cutout": 3, "random_erasing": 0.5, "mixup": 1.0}
    one, again, other = transformed(0, **keys), transformed(0, **keys), transformed(1, **keys)
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])
