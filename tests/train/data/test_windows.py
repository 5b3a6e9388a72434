"""Flips and crops of a batch: exact, and drawn evenly."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional

from gradreg.train.data import rectangles, windows

from .cases import loaded


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 5, 9)])
def test_flip_mirrors_the_chosen_images_and_no_other(shape):
    images = torch.randint(256, (40, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flipped = torch.arange(40) % 3 == 0
    for image, chosen, found in zip(images, flipped, windows.flip(images, flipped), strict=True):
        assert torch.equal(found, functional.horizontal_flip(image) if chosen else image)


@pytest.mark.parametrize(("padding", "mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9)])
def test_every_crop_is_the_window_of_the_padded_image(shape, padding, mode):
    corners = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    images = torch.randint(256, (81, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = windows.crop(images, *corners.T, size=4, padding=padding)
    for image, (top, left), window in zip(images, corners.tolist(), found, strict=True):
        assert torch.equal(window, functional.crop(functional.pad(image, [4], padding_mode=mode), top, left, *shape[1:]))


def test_training_draws_windows_and_flips_evenly():
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
    drawn, _ = rectangles.draw(60, 20, 28, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), generator=torch.Generator().manual_seed(1))
    found = windows.resized_crop(images, drawn)
    sides = torch.stack([drawn.tops, drawn.lefts, drawn.heights, drawn.widths], dim=1).tolist()
    for image, (top, left, height, width), window in zip(images, sides, found, strict=True):
        expected = functional.resized_crop(image.float(), top, left, height, width, [20, 28], antialias=True)
        assert (window - expected).abs().max() < 0.501  # rounded
