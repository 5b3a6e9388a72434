"""The split, the label noise and the images held out to validate on."""

from __future__ import annotations

import pytest
import torch

from gradreg.train.data.splits import with_label_noise

from .cases import joined, loaded, same


def test_the_split_covers_every_image_once_and_follows_its_seed():
    first, again, other = (loaded(seed=seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.test), first.validation, first.classes, first.image_shape) == (1000, 797, None, 10, (1, 8, 8))
    one, two, three = (joined(sets.train.batches(1, 1000)).images for sets in (first, again, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    both = torch.cat([one, joined(first.test.batches(1000)).images]).flatten(1)
    every = torch.cat([three, joined(other.test.batches(1000)).images]).flatten(1)
    assert torch.equal(both.sum(dim=1).sort().values, every.sum(dim=1).sort().values)
    assert both.min() == 0.0
    assert both.max() == 1.0


def test_split_seed_fixes_the_split_whatever_the_runs_seed():
    one, two = (joined(loaded(split_seed=5, seed=seed).test.batches(797)) for seed in (0, 1))
    assert torch.equal(one.labels, two.labels)


def test_without_a_split_seed_every_seed_has_its_own_split():
    one, again, two = (joined(loaded(seed=seed).test.batches(797)) for seed in (0, 0, 1))
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, two.images)


def test_label_noise_replaces_the_asked_share_evenly_and_never_touches_the_test_set():
    clean, noisy = (loaded(label_noise=share, seed=3) for share in (0.0, 0.3))
    assert torch.equal(joined(clean.test.batches(797)).labels, joined(noisy.test.batches(797)).labels)
    before, after = (joined(sets.train.batches(1, 1000)) for sets in (clean, noisy))
    assert torch.equal(before.images, after.images)
    changed = (before.labels != after.labels).sum().item()
    assert 240 <= changed <= 300  # 300 drawn again, a tenth of which keep their class


def test_label_noise_of_one_redraws_every_label():
    noisy = with_label_noise(torch.zeros(5000, dtype=torch.int64), 1.0, 10, torch.Generator().manual_seed(0))
    assert noisy.bincount(minlength=10).min() > 400


def test_validation_images_are_held_out_of_the_training_images_and_nothing_else_changes():
    keys = {"train_size": 500, "label_noise": 0.3, "seed": 4}
    whole = loaded(**keys)
    everything = joined(whole.train.batches(1, 500))
    for validation, count in ((0.2, 100), (120, 120)):
        held = loaded(**keys, validation=validation)
        assert held.validation is not None
        assert (len(held.train), len(held.validation)) == (500 - count, count)
        train, validated = joined(held.train.batches(1, 500)), joined(held.validation.batches(500))
        together = torch.cat([train.images, validated.images]).flatten(1), torch.cat([train.labels, validated.labels])
        assert rows(*together) == rows(everything.images.flatten(1), everything.labels)
        assert torch.equal(joined(held.test.batches(1297)).images, joined(whole.test.batches(1297)).images)


def rows(images: torch.Tensor, labels: torch.Tensor) -> list[list[float]]:
    return sorted(torch.cat([images, labels[:, None]], dim=1).tolist())


def test_too_many_training_images_are_refused():
    with pytest.raises(ValueError, match=r"data.train_size must be < 1797, the images of 'digits'; got 1797\. Leave some to test on\."):
        loaded(train_size=1797)


def test_a_test_set_can_be_made_smaller_and_nothing_else_changes():
    whole, smaller = loaded(label_noise=0.3), loaded(label_noise=0.3, test_size=100)
    assert len(smaller.test) == 100
    everything = {tuple(row) for row in joined(whole.test.batches(797)).images.flatten(1).tolist()}
    assert all(tuple(row) in everything for row in joined(smaller.test.batches(797)).images.flatten(1).tolist())
    assert same(whole.train.batches(1, 100), smaller.train.batches(1, 100))
