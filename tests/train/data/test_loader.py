"""Batches: their order, their parts among processes, and what resuming in the middle of an epoch gives."""

from __future__ import annotations

import pytest
import torch

from gradreg.train.data import loader
from gradreg.train.data.loader import InMemoryLoader
from gradreg.train.data.sampler import BatchSampler
from gradreg.train.data.streaming import StreamingLoader

from .cases import image_tree, joined, loaded, same

MOVED = {"flip": True, "crop_padding": 2}
EVERYTHING = {"random_resized_crop": True, "flip": True, "cutout": 2, "random_erasing": 0.5, "mixup": 0.3, "cutmix": 1.0}


def test_the_order_is_one_permutation_after_another_from_one_generator():
    train = loaded(train_size=50, augmentation={}, seed=7).train
    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(50, generator=generator) for _ in range(3)]
    first = joined(train.batches(1, 50))
    unshuffled = torch.empty_like(first.images)
    unshuffled[orders[0]] = first.images
    for epoch in (2, 3, 1, 3, 2):  # earlier ones after later ones, too
        dealt = list(train.batches(epoch, 20))
        assert [len(batch.labels) for batch in dealt] == [20, 20, 10]
        assert torch.equal(torch.cat([batch.images for batch in dealt]), unshuffled[orders[epoch - 1]])


@pytest.mark.parametrize("augmentation", [{}, MOVED, EVERYTHING])
def test_starting_within_an_epoch_gives_the_rest_of_it(augmentation):
    whole = list(loaded(train_size=50, augmentation=augmentation).train.batches(2, 8))
    rest = list(loaded(train_size=50, augmentation=augmentation).train.batches(2, 8, start=3))
    assert len(rest) == len(whole) - 3 == 4
    assert same(rest, whole[3:])
    assert not list(loaded(train_size=50).train.batches(2, 8, start=7))


def test_batches_that_are_skipped_are_not_loaded(monkeypatch):
    train = loaded(train_size=50).train
    asked = []
    original = train._loader.batches
    monkeypatch.setattr(train._loader, "batches", lambda batches: original([asked.append(b) or b for b in batches]))
    assert len(list(train.batches(1, 10, start=3))) == 2
    assert [indices.number for indices in asked] == [3, 4]


@pytest.mark.parametrize("processes", [2, 3, 5, 13])
@pytest.mark.parametrize("augmentation", [{}, MOVED, EVERYTHING])
def test_processes_together_see_what_one_sees(processes, augmentation):
    alone = loaded(train_size=52, augmentation=augmentation).train
    parts = [loaded(train_size=52, augmentation=augmentation, rank=rank, processes=processes).train for rank in range(processes)]
    for epoch in (1, 2):
        for whole, *pieces in zip(alone.batches(epoch, 12), *(part.batches(epoch, 12) for part in parts), strict=True):
            assert sum(piece.share for piece in pieces) == pytest.approx(1.0)
            for piece in pieces:
                assert len(piece.labels) == max(1, round(piece.share * len(whole.labels)))
            assert {piece.fewest for piece in pieces} == {min(len(piece.labels) for piece in pieces)}
            shared = [piece for piece in pieces if piece.share]
            assert max(len(p.labels) for p in shared) - min(len(p.labels) for p in shared) <= 1
            assert torch.equal(torch.cat([p.images for p in shared]), whole.images)
            assert torch.equal(torch.cat([p.targets for p in shared]), whole.targets)
            assert torch.equal(torch.cat([p.labels for p in shared]), whole.labels)


@pytest.mark.parametrize("policy", [{"auto_augment": "imagenet"}, {"rand_augment": 2}])
def test_policies_do_not_depend_on_the_processes_either(tmp_path, policy):
    keys = {"name": "folder", "root": str(image_tree(tmp_path, {"train": 10, "val": 1})), "workers": 0, "augmentation": policy}
    whole = joined(loaded(**keys).train.batches(1, 30))
    parts = [joined(loaded(**keys, rank=rank, processes=3).train.batches(1, 30)) for rank in range(3)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    plain = joined(loaded(**{**keys, "augmentation": {}}).train.batches(1, 30))
    changed = (plain.images != whole.images).flatten(1).any(dim=1)
    assert changed.sum() >= 8  # on noise, some operations change nothing
    assert not torch.equal(
        joined(loaded(**keys).train.batches(1, 30, start=0)).images, joined(loaded(**keys, seed=1).train.batches(1, 30)).images
    )


def test_a_process_without_a_part_takes_an_image_that_does_not_count():
    parts = [list(loaded(train_size=7, rank=rank, processes=3).train.batches(1, 5)) for rank in range(3)]
    assert [[len(b.labels) for b in part] for part in parts] == [[1, 1], [2, 1], [2, 1]]
    assert [part[1].share for part in parts] == [0.0, 0.5, 0.5]
    assert torch.equal(parts[0][1].images, parts[1][1].images)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_deals_every_image_to_one_process(processes):
    whole = torch.cat([batch.images for batch in loaded(train_size=1700).test.batches(97)])
    parts = [list(loaded(train_size=1700, rank=rank, processes=processes).test.batches(32)) for rank in range(processes)]
    assert {len(part) for part in parts} == ({4} if processes == 1 else {3, 4})
    rows = torch.cat([batch.images for part in parts for batch in part]).flatten(1)
    assert sorted(rows.tolist()) == sorted(whole.flatten(1).tolist())


def test_loading_and_dealing_leave_the_default_generator_alone():
    before = torch.get_rng_state()
    sets = loaded(train_size=50, augmentation=EVERYTHING)
    assert list(sets.train.batches(1, 10))
    assert list(sets.test.batches(100))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda train: next(train.batches(0, 10)), r"epoch must be >= 1; got 0"),
        (lambda train: next(train.batches(1, 0)), r"size must be >= 1; got 0"),
        (lambda train: next(train.batches(1, 10, start=-1)), r"start must be >= 0; got -1"),
        (lambda train: BatchSampler(2, 2), r"rank must be < processes, 2; got 2"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(loaded(train_size=20).train)


def test_images_in_memory_are_brought_to_a_size():
    sets = loaded(image_size=12)
    assert sets.image_shape == (1, 12, 12)
    assert joined(sets.test.batches(797)).images.shape == (797, 1, 12, 12)


def test_memory_is_chosen_by_size(tmp_path, monkeypatch):
    tree = image_tree(tmp_path, {"train": 9, "val": 4})
    needed = (27 + 12) * 3 * 12 * 10
    for limit, kind in ((needed, InMemoryLoader), (needed - 1, StreamingLoader)):
        monkeypatch.setattr(loader, "MEMORY_LIMIT", limit)
        assert isinstance(loaded(name="folder", root=str(tree), workers=0).train._loader, kind)


def test_a_set_in_one_piece_is_not_streamed():
    with pytest.raises(ValueError, match=r"data.memory must not be false for 'digits', which is read in one piece"):
        loaded(memory=False)
