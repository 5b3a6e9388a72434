"""Images and folders as they are found in the wild: each is read right, or named."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from gradreg.train.data.datasets import ImageFiles, UnreadableImage, decode, is_readable

from .cases import image_tree, joined, loaded

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
"""Every 8-bit gray, in an image that is not symmetric in any way."""
SIXTEEN = RAMP.astype(np.uint16) * 256 + RAMP[::-1, ::-1]
"""The same with 16 bits, of which the lower 8 are others."""


def files(path) -> ImageFiles:
    return ImageFiles([str(path)], torch.tensor([0]))


def read(path) -> np.ndarray:
    assert is_readable(files(path), 0)
    return np.asarray(decode(files(path), 0))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_the_upper_half_of_sixteen_bits_is_kept(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(SIXTEEN).save(path)
    assert np.array_equal(read(path), np.stack([RAMP] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["I;16B", "I;16"])
def test_sixteen_bits_in_either_byte_order(tmp_path, mode):
    gray = SIXTEEN.astype(">u2" if mode == "I;16B" else "<u2")
    Image.frombytes(mode, (16, 16), gray.tobytes()).save(tmp_path / "x.tif")
    assert np.array_equal(read(tmp_path / "x.tif")[..., 1], RAMP)


@pytest.mark.parametrize(("kind", "words"), [(np.float32, "floats"), (np.int32, "integers of 32 bits")])
def test_pixels_without_a_known_range_are_an_error_that_names_the_image(tmp_path, kind, words):
    path = tmp_path / "x.tif"
    Image.fromarray(RAMP.astype(kind)).save(path)
    assert not is_readable(files(path), 0)  # so that data.corrupt skip leaves it out
    with pytest.raises(
        UnreadableImage, match=rf"x\.tif' cannot be read: ValueError: its pixels are {words}, of which nothing says what is white"
    ):
        decode(files(path), 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_become_color(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    image = Image.fromarray(RAMP).convert("RGB").convert(mode)
    image.save(path)
    assert np.array_equal(read(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(tmp_path, suffix, orientation):
    """The corners: red, green, blue, white, clockwise from the upper left; stored so that the orientation restores this."""
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :24, 0] = upright[:16, 24:, 1] = upright[16:, 24:, 2] = upright[16:, :24] = 255
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),  # is to be turned a quarter clockwise
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"x.{suffix}", exif=exif, **lossless)
    found = read(tmp_path / f"x.{suffix}")
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.filterwarnings("ignore:Possibly corrupt EXIF")
@pytest.mark.parametrize(
    ("suffix", "exif"),
    [
        ("jpg", b"II*\x00" + struct.pack("<I", 0x7FFFFFFF)),
        ("png", b"no TIFF"),
        ("jpg", b"II*\x00" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, 2, 2, b"x", 0)),
    ],
    ids=["cut off", "something else", "an orientation that is a letter"],
)
def test_damaged_exif_does_not_spoil_an_image(tmp_path, suffix, exif):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP).save(path, exif=b"Exif\x00\x00" + exif)
    assert read(path).shape == (16, 16, 3)


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    image_tree(tmp_path, {"train": 2, "val": 1})
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    words = r"cat/pipe\.png' cannot be read: OSError: it must be a plain file, and is a pipe, a socket or a device"
    for memory in (True, False):
        with pytest.raises(UnreadableImage, match=words):
            joined(loaded(name="folder", root=str(tmp_path), workers=0, memory=memory).train.batches(1, 9))
    sets = loaded(name="folder", root=str(tmp_path), workers=0, corrupt="skip")
    assert (len(sets.train), sets.unreadable) == (6, 1)


def test_folders_and_files_of_programs_are_no_classes_and_no_images(tmp_path):
    image_tree(tmp_path, {"train": 2, "val": 1})
    expected = joined(loaded(name="folder", root=str(tmp_path), workers=0).train.batches(1, 9)).images
    for hidden in (".ipynb_checkpoints", "__MACOSX", "cat/.ipynb_checkpoints", "cat/__MACOSX"):
        (tmp_path / "train" / hidden).mkdir()
        (tmp_path / "train" / hidden / "0.png").write_bytes((tmp_path / "train" / "cat" / "0.png").read_bytes())
    (tmp_path / "train" / "dog" / "._0.png").write_bytes(b"a resource fork")
    sets = loaded(name="folder", root=str(tmp_path), workers=0)
    assert sets.classes == 3
    assert torch.equal(joined(sets.train.batches(1, 9)).images, expected)


@pytest.mark.parametrize("target", ["..", ".", "../..", "/"])
def test_a_link_to_a_folder_around_it_is_named(tmp_path, target):
    image_tree(tmp_path, {"train": 2, "val": 1})
    (tmp_path / "train" / "cat" / "loop").symlink_to(target)
    if target == ".":  # leads to nothing new
        assert len(loaded(name="folder", root=str(tmp_path), workers=0).train) == 6
        return
    with pytest.raises(ValueError, match=r"cat/loop' must not lead to a folder that holds it; it is a link to '.*'\. Remove it\."):
        loaded(name="folder", root=str(tmp_path), workers=0)


def test_links_elsewhere_are_followed_and_each_folder_is_read_once(tmp_path):
    image_tree(tmp_path / "tree", {"train": 2, "val": 1})
    image_tree(tmp_path / "more", {"": 3})
    for name in ("one", "again"):
        (tmp_path / "tree" / "train" / "cat" / name).symlink_to(tmp_path / "more" / "cat")
    (tmp_path / "tree" / "train" / "dog" / "file.png").symlink_to(tmp_path / "more" / "dog" / "0.png")
    sets = loaded(name="folder", root=str(tmp_path / "tree"), workers=0)
    assert joined(sets.train.batches(1, 99)).labels.bincount().tolist() == [5, 3, 2]


def test_the_order_is_torchvisions(tmp_path):
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    from gradreg.train.data.readers import _EXTENSIONS, _class_folders

    assert _EXTENSIONS == IMG_EXTENSIONS
    image_tree(tmp_path, {"": 3})
    for name in ("a-b", "a", "b", "a/c", "B", "a.d"):
        folder = tmp_path / "cat" / name
        folder.mkdir()
        for file in ("2.PNG", "10.png", "A.jpg", "notes.txt"):
            (folder / file).touch()
    classes, index = find_classes(str(tmp_path))
    found = _class_folders(tmp_path)
    assert found.classes == classes
    assert list(zip(found.paths, found.labels, strict=True)) == make_dataset(str(tmp_path), index, extensions=IMG_EXTENSIONS)
