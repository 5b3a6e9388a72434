"""Labeled images as they are read: bytes in memory, or files and records to be decoded."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class InMemoryImages:
    """Images in memory.

    Args:
        images: (n, channels, height, width), uint8.
        labels: (n,), int64.
        max_value: the byte that is white.
    """

    images: Tensor
    labels: Tensor
    max_value: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor) -> InMemoryImages:
        """The images at ``positions`` (m,)."""
        return replace(self, images=self.images.index_select(0, positions), labels=self.labels[positions])


class EncodedImages(Protocol):
    """Images to be decoded one at a time, in any process."""

    @property
    def labels(self) -> Tensor:
        """Classes (n,), int64."""
        ...

    def __len__(self) -> int: ...

    def take(self, positions: Tensor) -> EncodedImages:
        """The images at ``positions`` (m,)."""
        ...

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        """A context with the image at ``index``, which may be decoded lazily; its file is closed at the end."""
        ...

    def describe(self, index: int) -> str:
        """The name of the image at ``index`` in errors: its path, if it has one."""
        ...


class ImageFiles:
    """Images in separate files.

    Args:
        paths: of the files. They are kept as one array: millions of Python strings would be copied to every worker process, because
            their reference counts change.
        labels: (n,), int64.
    """

    def __init__(self, paths: Sequence[str] | np.ndarray, labels: Tensor) -> None:
        self._paths = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths])
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor) -> ImageFiles:
        return ImageFiles(self._paths[positions.numpy()], self.labels[positions])

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        from PIL import Image

        path = self.describe(index)
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for, for ever
            raise OSError("it must be a plain file, and is a pipe, a socket or a device")
        return Image.open(path)

    def describe(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))


class ImageRecords:
    """Images that another library gives by index.

    Args:
        records: ``records[i]`` is a pair of the image, or a stream of its bytes, and something else.
        labels: (n,), int64, of the selected images.
        selected: (n,), int64, their indices in ``records``.
        name: of the data set, for errors.
    """

    def __init__(self, records: Any, labels: Tensor, selected: Tensor, *, name: str) -> None:
        self._records, self.labels, self._selected, self._name = records, labels, selected, name

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor) -> ImageRecords:
        return ImageRecords(self._records, self.labels[positions], self._selected[positions], name=self._name)

    @contextmanager
    def open(self, index: int) -> Iterator[Image.Image]:
        from PIL import Image

        with closing(self._records[int(self._selected[index])][0]) as found:
            yield found if isinstance(found, Image.Image) else Image.open(found)

    def describe(self, index: int) -> str:
        return f"number {int(self._selected[index])} of {self._name}"


@dataclass(frozen=True)
class RawDataset:
    """A data set as its reader returns it, before splits and transforms.

    Args:
        train: the training images.
        test: the test images; None if the set has no separate ones.
        classes: how many; None if the files do not say.
        validation: the validation images; None if the set has no separate ones.
    """

    train: InMemoryImages | EncodedImages
    test: InMemoryImages | EncodedImages | None
    classes: int | None = None
    validation: InMemoryImages | EncodedImages | None = None


class UnreadableImage(ValueError):
    """An image cannot be decoded: which, why, and what to do about it."""


def decode(images: EncodedImages, index: int) -> Image.Image:
    """The image at ``index`` in color, upright.

    Raises:
        UnreadableImage: its decoder raised, or its values have no known range.
    """
    try:
        with images.open(index) as image:
            return in_color(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(
            f"image {images.describe(index)!r} cannot be read: {type(error).__name__}: {error}. "
            "Replace it, or leave out whatever cannot be read with --data.corrupt skip."
        ) from error


def in_color(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, turned as its EXIF orientation says; the upper 8 of 16 bits are kept.

    Raises:
        ValueError: values whose range is not known: floats, and integers of 32 bits.
    """
    from PIL import Image

    image.load()  # before its EXIF is asked for, which some formats hold at their end
    turn = _TURNS.get(_orientation(image))
    unknown = _unknown_range(image)
    if unknown is not None:
        raise ValueError(f"its pixels are {unknown}, of which nothing says what is white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    return image if turn is None else image.transpose(Image.Transpose(turn))


def _unknown_range(image: Image.Image) -> str | None:
    """The kind of the pixels, if it does not say between which numbers they lie."""
    if image.mode == "F":
        return "floats"
    sixteen_bits = image.mode != "I" or image.format in ("PNG", "PPM")  # which Pillow widens to 32
    return None if sixteen_bits else "integers of 32 bits"


_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF orientation -> what undoes it, of PIL's ``Transpose``; 1 is upright."""


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # EXIF is damaged more often than images are, and these are upright then
        return 1


def is_readable(images: EncodedImages, index: int) -> bool:
    """Whether the image at ``index`` can be decoded. JPEG files are decoded at an eighth of their size, which finds the same errors."""
    try:
        with images.open(index) as image:
            image.draft("RGB", (1, 1))
            image.load()
            return _unknown_range(image) is None
    except Exception:  # as above
        return False


def size_mismatch(which: str, image: Tensor, expected: Sequence[int]) -> str:
    """The error for an image that does not have the ``expected`` shape (channels, height, width)."""
    (_, h, w), (_, height, width) = image.shape, expected
    return (
        f"data.image_size must be given for images that differ in size; got null, and {which} has {h} x {w} pixels where others have "
        f"{height} x {width}. Write 224, say."
    )
