"""Images decoded by workers: the same whoever decodes them, and what happens to those that cannot be."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .cases import image_tree, joined, loaded, same

EVERYTHING = {"flip": True, "crop_padding": 2, "rand_augment": 2, "random_erasing": 0.5, "mixup": 0.4, "cutmix": 1.0}


@pytest.fixture
def tree(tmp_path):
    return image_tree(tmp_path / "tree", {"train": 9, "val": 4})


def streamed(tree, *, workers: int = 0, augmentation=EVERYTHING, **keys):
    return loaded(name="folder", root=str(tree), memory=False, workers=workers, augmentation=augmentation, **keys)


def test_streamed_images_are_those_held_in_memory(tree):
    keys = {"name": "folder", "root": str(tree), "validation": 6, "workers": 0}
    stream, memory = (loaded(**keys, memory=memory) for memory in (False, True))
    assert (len(stream.train), len(stream.test), stream.classes, stream.image_shape) == (21, 12, 3, (3, 12, 10))
    assert same(stream.train.batches(1, 8), memory.train.batches(1, 8))
    assert same(stream.test.batches(5), memory.test.batches(5))
    assert same(stream.validation.batches(5), memory.validation.batches(5))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(tree, workers):
    alone, many = streamed(tree), streamed(tree, workers=workers)
    for epoch in (1, 2):
        assert same(alone.train.batches(epoch, 8), many.train.batches(epoch, 8))
    assert same(alone.test.batches(5), many.test.batches(5))


def test_every_epoch_draws_anew_for_every_image(tree):
    def images(epoch: int, **augmentation):
        train = streamed(tree, augmentation=augmentation).train
        return {tuple(row) for row in joined(train.batches(epoch, 8)).images.flatten(1).tolist()}

    assert images(1) == images(2)  # in another order
    assert len(images(1, crop_padding=2) & images(2, crop_padding=2)) < 9
    assert images(1, crop_padding=2) == images(1, crop_padding=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_left_or_resumed_leaves_no_trace(tree, workers):
    train = streamed(tree, workers=workers).train
    whole = list(train.batches(3, 5))
    left = train.batches(2, 5)
    next(left)
    assert same(train.batches(3, 5, start=2), whole[2:])
    with pytest.raises(RuntimeError, match="an epoch of streamed images must be over before another begins"):
        list(left)
    assert same(train.batches(3, 5), whole)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_stream_what_one_streams(tree, processes):
    whole = joined(streamed(tree).train.batches(1, 27))
    parts = [joined(streamed(tree, rank=rank, processes=processes).train.batches(1, 27)) for rank in range(processes)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


@pytest.mark.parametrize("workers", [0, 1])
def test_streaming_leaves_the_default_generator_alone(tree, workers):
    before = torch.get_rng_state()
    sets = streamed(tree, workers=workers)
    assert list(sets.train.batches(1, 10))
    assert list(sets.test.batches(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_resized_and_their_middle_is_taken(tmp_path):
    tree = image_tree(tmp_path, {"train": 1, "val": 1}, size=(40, 20))
    for memory in (True, False):
        sets = loaded(name="folder", root=str(tree), workers=0, memory=memory, image_size=20, augmentation={"normalize": "none"})
        original = loaded(name="folder", root=str(tree), workers=0, augmentation={"normalize": "none"})
        assert sets.image_shape == (3, 20, 20)
        assert torch.equal(joined(sets.test.batches(9)).images, joined(original.test.batches(9)).images[:, :, 10:30])
        closer = loaded(
            name="folder", root=str(tree), workers=0, memory=memory, image_size=10, evaluation_crop=0.5, augmentation={"normalize": "none"}
        )
        assert torch.equal(joined(closer.test.batches(9)).images, joined(original.test.batches(9)).images[:, :, 15:25, 5:15])
        assert joined(closer.train.batches(1, 9)).images.std() < joined(original.train.batches(1, 9)).images.std()  # resized: smoother


def test_random_resized_crops_are_drawn_from_the_whole_image(tmp_path):
    tree = image_tree(tmp_path, {"train": 3, "val": 1}, size=(40, 30))
    crop = {"random_resized_crop": True, "scale": [0.05, 0.1]}
    sets = loaded(name="folder", root=str(tree), workers=0, memory=False, image_size=8, augmentation=crop)
    assert joined(sets.train.batches(1, 9)).images.shape == (9, 3, 8, 8)
    assert not same(sets.train.batches(1, 9), sets.train.batches(2, 9))


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_with_the_remedy(tree, memory, workers):
    path = tree / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:100])
    message = rf"image '{path}' cannot be read: .*truncated.* with --data.corrupt skip"
    with pytest.raises(ValueError, match=message):
        list(loaded(name="folder", root=str(tree), memory=memory, workers=workers).train.batches(1, 10))


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_corrupt_images_are_left_out_and_counted_when_asked(tmp_path, memory, suffix):
    tree = image_tree(tmp_path, {"train": 5, "val": 3, "test": 4}, suffix=suffix)
    broken = [tree / "train" / "dog" / f"3.{suffix}", tree / "test" / "emu" / f"0.{suffix}", tree / "val" / "cat" / f"1.{suffix}"]
    broken[0].write_bytes(broken[0].read_bytes()[:-60])
    for path in broken[1:]:
        path.write_bytes(b"no image")
    keys = {"name": "folder", "root": str(tree), "memory": memory, "corrupt": "skip", "workers": 0}
    sets = loaded(**keys)
    assert sets.validation is not None
    assert (len(sets.train), len(sets.validation), len(sets.test), sets.unreadable) == (14, 8, 11, 3)
    for path in broken:
        path.unlink()
    without = loaded(**keys)
    assert without.unreadable == 0
    assert same(sets.train.batches(1, 5), without.train.batches(1, 5))
    assert without.validation is not None
    for found, expected in ((sets.test, without.test), (sets.validation, without.validation)):
        assert same(found.batches(5), expected.batches(5))


@pytest.mark.parametrize("memory", [True, False])
def test_images_of_several_sizes_need_one(tmp_path, memory):
    tree = image_tree(image_tree(tmp_path, {"train": 2}, size=(8, 8)), {"val": 1}, size=(8, 9))
    with pytest.raises(ValueError, match=r"data.image_size must be given .* and image '.*val/cat/0.png' has 8 x 9 pixels where .* 8 x 8"):
        list(loaded(name="folder", root=str(tree), memory=memory, workers=0).test.batches(10))
    assert loaded(name="folder", root=str(tree), memory=memory, workers=0, image_size=8).image_shape == (3, 8, 8)


def test_where_nothing_can_be_read_there_is_nothing_to_skip(tmp_path):
    tree = image_tree(tmp_path, {"train": 1, "val": 1})
    for path in tree.glob("val/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"data.corrupt must not be 'skip' where no image can be read; got 3 such images of 'folder'"):
        loaded(name="folder", root=str(tree), corrupt="skip", workers=0)


KILLED = """
import multiprocessing, os, signal, sys, threading, time
from gradreg.train.data import streaming

def serve(connection):
    try:
        connection.recv()
    except Exception:
        sys.excepthook(*sys.exc_info())  # as the thread of multiprocessing that hands over tensors does

def work(connection, others):
    others.close()
    streaming._end_with_parent(0)
    threading.Thread(target=serve, args=[connection], daemon=True).start()
    time.sleep(30)

context = multiprocessing.get_context("fork")
here, there = context.Pipe()
context.Process(target=work, args=(there, here)).start()
there.close()
time.sleep(0.5)
here.close()  # as when a killed process is taken down, before its children are told
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux, whose workers end with their parent")
def test_a_worker_of_a_run_that_is_killed_says_nothing():
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == ""
