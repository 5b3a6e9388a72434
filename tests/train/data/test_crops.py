"""Boxes within images, distributed as torchvision draws them one by one; and flips and crops of a batch, exact and drawn evenly."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from gradreg.train.data import crops

from .cases import loaded


@pytest.mark.parametrize("size", [(32, 32), (20, 48), (5, 3)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.02, 0.33)])
def test_boxes_lie_within_and_have_the_area_asked_for(size, scale):
    height, width = size
    generator = torch.Generator().manual_seed(0)
    drawn, fits = crops.random_boxes(500, height, width, scale=scale, ratio=(3 / 4, 4 / 3), generator=generator)
    for first, length, whole in ((drawn.tops, drawn.heights, height), (drawn.lefts, drawn.widths, width)):
        assert first.min() >= 0
        assert (first + length).max() <= whole
        assert (first + length)[length < whole].max() == whole  # the last place is drawn as well
    assert fits.float().mean() > 0.9
    assert (drawn.heights[~fits] == height).all()
    assert (drawn.widths[~fits] == width).all()
    if min(size) > 10:  # else rounding to whole pixels says more than the ranges
        area, ratio = drawn.heights * drawn.widths / (height * width), drawn.widths / drawn.heights
        low, high = scale[0] * height * width, 1.0
        slack = 1 + 2 / math.sqrt(low)
        assert (scale[0] / slack <= area[fits]).all()
        assert (area[fits] <= min(high, scale[1] * slack)).all()
        assert (ratio[fits] >= 3 / 4 / slack).all()
        assert (ratio[fits] <= 4 / 3 * slack).all()


def test_the_distribution_is_torchvisions():
    n, image = 4000, torch.zeros(3, 32, 48)
    drawn, _ = crops.random_boxes(n, 32, 48, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), generator=torch.Generator().manual_seed(0))
    ours = torch.stack([drawn.tops, drawn.lefts, drawn.heights, drawn.widths]).double()
    crop = v2.RandomResizedCrop(32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = [crop.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[p[key] for p in params] for key in ("top", "left", "height", "width")], dtype=torch.float64)
    deviation = theirs.std(dim=1)
    assert ((ours.mean(dim=1) - theirs.mean(dim=1)).abs() < 5 * deviation * math.sqrt(2 / n)).all()
    torch.testing.assert_close(ours.std(dim=1), deviation, rtol=0.05, atol=0.0)


def test_squares_lie_about_any_pixel():
    drawn = crops.random_squares(2000, 6, 9, side=4, generator=torch.Generator().manual_seed(0))
    assert sorted(set((drawn.tops + 2).tolist())) == list(range(6))
    assert sorted(set((drawn.lefts + 2).tolist())) == list(range(9))
    assert (drawn.heights == 4).all()
    assert (drawn.widths == 4).all()


def test_a_mask_is_true_inside_alone():
    sides = torch.tensor([[1, -1], [2, 7], [3, 3], [4, 5]])
    mask = crops.Boxes(*sides).mask(6, 9)
    expected = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    expected[0, 0, 1:4, 2:6] = True
    expected[1, 0, 0:2, 7:9] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 5, 9)])
def test_flip_mirrors_the_chosen_images_and_no_other(shape):
    images = torch.randint(256, (40, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flipped = torch.arange(40) % 3 == 0
    for image, chosen, found in zip(images, flipped, crops.flip(images, flipped), strict=True):
        assert torch.equal(found, functional.horizontal_flip(image) if chosen else image)


@pytest.mark.parametrize(("padding", "mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9)])
def test_every_crop_is_that_of_the_padded_image(shape, padding, mode):
    corners = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    images = torch.randint(256, (81, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = crops.padded_crop(images, *corners.T, size=4, padding=padding)
    for image, (top, left), crop in zip(images, corners.tolist(), found, strict=True):
        assert torch.equal(crop, functional.crop(functional.pad(image, [4], padding_mode=mode), top, left, *shape[1:]))


def test_training_draws_crops_and_flips_evenly():
    sets = loaded(train_size=1500, augmentation={"flip": True, "crop_padding": 1})
    plain = loaded(train_size=1500)
    counts = torch.zeros(2, 3, 3)
    for epoch in range(1, 5):
        images = next(sets.train.batches(epoch, 1500)).images
        originals = next(plain.train.batches(epoch, 1500)).images
        padded = torch.nn.functional.pad(originals, [1] * 4)
        fits = torch.stack(
            [
                (torch.flip(padded[:, :, i : i + 8, j : j + 8], [3] if mirrored else []) == images).flatten(1).all(dim=1)
                for mirrored in (0, 1)
                for i in range(3)
                for j in range(3)
            ]
        )
        assert fits.any(dim=0).all()
        counts += (fits & (fits.sum(dim=0) == 1)).sum(dim=1).reshape(2, 3, 3)
    expected = counts.sum() / 18
    assert expected > 200
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_a_resized_crop_is_torchvisions():
    images = torch.randint(256, (60, 3, 20, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn, _ = crops.random_boxes(60, 20, 28, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), generator=torch.Generator().manual_seed(1))
    found = crops.resized_crop(images, drawn)
    sides = torch.stack([drawn.tops, drawn.lefts, drawn.heights, drawn.widths], dim=1).tolist()
    for image, (top, left, height, width), crop in zip(images, sides, found, strict=True):
        expected = functional.resized_crop(image.float(), top, left, height, width, [20, 28], antialias=True)
        assert (crop - expected).abs().max() < 0.501  # rounded
