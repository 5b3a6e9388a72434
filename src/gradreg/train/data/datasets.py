"""Labeled images as they are read: bytes in memory, or files and records to be decoded."""

from __future__ import annotations

import os
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

        return Image.open(self.describe(index))

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
    """

    train: InMemoryImages | EncodedImages
    test: InMemoryImages | EncodedImages | None
    classes: int | None = None


class UnreadableImage(ValueError):
    """An image cannot be decoded: which, why, and what to do about it."""


def decode(images: EncodedImages, index: int) -> Image.Image:
    """The image at ``index`` in color.

    Raises:
        UnreadableImage: its decoder raised.
    """
    try:
        with images.open(index) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(
            f"image {images.describe(index)!r} cannot be read: {type(error).__name__}: {error}. "
            "Replace it, or leave out whatever cannot be read with --data.corrupt skip."
        ) from error


def is_readable(images: EncodedImages, index: int) -> bool:
    """Whether the image at ``index`` can be decoded. JPEG files are decoded at an eighth of their size, which finds the same errors."""
    try:
        with images.open(index) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except Exception:  # as above
        return False
    return True


def size_mismatch(which: str, image: Tensor, expected: Sequence[int]) -> str:
    """The error for an image that does not have the ``expected`` shape (channels, height, width)."""
    (_, h, w), (_, height, width) = image.shape, expected
    return (
        f"data.image_size must be given for images that differ in size; got null, and {which} has {h} x {w} pixels where others have "
        f"{height} x {width}. Write 224, say."
    )
