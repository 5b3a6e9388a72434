"""Data: the split, the label noise and the batches."""

from __future__ import annotations

import torch

from gradreg.train import data
from gradreg.train.configuration import DataConfig


def test_the_split_covers_every_image_once_and_follows_its_seed():
    first, again, other = (data.load(DataConfig(), seed=seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.test), first.classes) == (1000, 797, 10)
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.images, other.train.images)
    both = torch.cat([first.train.images, first.test.images]).flatten(1)
    every = torch.cat([other.train.images, other.test.images]).flatten(1)
    assert torch.equal(both.sum(dim=1).sort().values, every.sum(dim=1).sort().values)
    assert both.min() == 0.0
    assert both.max() == 1.0


def test_split_seed_fixes_the_split_whatever_the_runs_seed():
    one, two = (data.load(DataConfig(split_seed=5), seed=seed) for seed in (0, 1))
    assert torch.equal(one.test.labels, two.test.labels)


def test_label_noise_replaces_the_asked_share_evenly_and_never_touches_the_test_set():
    clean, noisy = (data.load(DataConfig(label_noise=share), seed=3) for share in (0.0, 0.3))
    assert torch.equal(clean.test.labels, noisy.test.labels)
    assert torch.equal(clean.train.images, noisy.train.images)
    changed = (clean.train.labels != noisy.train.labels).sum().item()
    assert 240 <= changed <= 300  # 300 drawn anew, a tenth of which keep their class


def test_label_noise_of_one_redraws_every_label():
    labels = torch.zeros(5000, dtype=torch.int64)
    noisy = data.with_label_noise(labels, 1.0, 10, torch.Generator().manual_seed(0))
    assert noisy.bincount(minlength=10).min() > 400


def test_batches_deal_every_example_once_and_keep_the_last_smaller_one():
    split = data.Split(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
    dealt = list(data.batches(split, 4, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in dealt] == [4, 4, 2]
    assert torch.cat([labels for _, labels in dealt]).sort().values.tolist() == list(range(10))
    assert all(torch.equal(images.flatten().long(), labels) for images, labels in dealt)
