"""Rectangles within images: in bounds, and distributed as torchvision draws them one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import v2

from gradreg.train.data import rectangles


@pytest.mark.parametrize("size", [(32, 32), (20, 48), (5, 3)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.02, 0.33)])
def test_rectangles_lie_within_and_have_the_area_asked_for(size, scale):
    height, width = size
    generator = torch.Generator().manual_seed(0)
    drawn, fits = rectangles.draw(500, height, width, scale=scale, ratio=(3 / 4, 4 / 3), generator=generator)
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
    drawn, _ = rectangles.draw(n, 32, 48, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), generator=torch.Generator().manual_seed(0))
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
    drawn = rectangles.squares(2000, 6, 9, side=4, generator=torch.Generator().manual_seed(0))
    assert sorted(set((drawn.tops + 2).tolist())) == list(range(6))
    assert sorted(set((drawn.lefts + 2).tolist())) == list(range(9))
    assert (drawn.heights == 4).all()
    assert (drawn.widths == 4).all()


def test_a_mask_is_true_inside_alone():
    sides = torch.tensor([[1, -1], [2, 7], [3, 3], [4, 5]])
    mask = rectangles.Rectangles(*sides).mask(6, 9)
    expected = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    expected[0, 0, 1:4, 2:6] = True
    expected[1, 0, 0:2, 7:9] = True
    assert torch.equal(mask, expected)
