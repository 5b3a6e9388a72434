"""Sets that timm reaches, read from folders: no network."""

from __future__ import annotations

import pytest
import torch

from .cases import image_tree, joined, loaded, same


@pytest.fixture
def tree(tmp_path):
    return image_tree(tmp_path / "tree", {"train": 4, "validation": 2})


@pytest.mark.parametrize("memory", [True, False])
def test_timm_gives_what_the_folder_gives(tree, memory):
    ours, timms = (loaded(name=n, root=str(tree), workers=0, memory=memory) for n in ("folder", "timm:torch/image_folder"))
    assert timms.classes == 3
    assert same(ours.train.batches(2, 5), timms.train.batches(2, 5))
    assert same(ours.test.batches(5), timms.test.batches(5))


def test_a_set_of_the_hub_is_read_by_position_with_its_own_splits(tree, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    keys = {"name": f"timm:hfds/{tree}", "root": str(tmp_path / "cache"), "workers": 0, "memory": False}
    sets = loaded(**keys, train_size=9, validation=3)
    assert (len(sets.train), len(sets.validation), len(sets.test), sets.classes) == (6, 3, 6, 3)
    expected = joined(loaded(name="folder", root=str(tree), workers=0).test.batches(9))
    assert torch.equal(joined(sets.test.batches(9)).images, expected.images)
    assert torch.equal(joined(sets.test.batches(9)).labels, expected.labels)
    assert len(loaded(**keys, train_split="validation", test_split="train").train) == 6


def test_a_set_that_can_only_be_read_through_is_held_in_memory(tree, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    keys = {"name": f"timm:hfids/{tree}", "root": str(tmp_path / "cache"), "workers": 0}
    expected = joined(loaded(**{**keys, "name": f"timm:hfds/{tree}"}).test.batches(9))  # which notes how many images there are
    assert torch.equal(joined(loaded(**keys).test.batches(9)).images, expected.images)
    with pytest.raises(ValueError, match=r"data.memory must not be false for 'timm:hfids.*', which cannot be read by position"):
        loaded(**keys, memory=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:hdfs/x", r"unknown data set 'timm:hdfs/x'\. Did you mean 'timm:hfds/\.\.\.'\?"),
        ("timm:torch/nonsense", r"'timm:torch/nonsense' could not be opened by timm with data.root .* and split 'train': AssertionError"),
        ("timm:torch/mnist", r"'timm:torch/mnist' could not be opened by timm .*RuntimeError: Dataset not found"),
    ],
)
def test_what_timm_cannot_open_is_an_error_in_words(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        loaded(name=name, root=str(tmp_path))
