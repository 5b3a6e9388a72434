"""Labelled images as they are kept: bytes in memory, or files and records that have yet to be decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """Images in memory: (n, channels, height, width), uint8, and their classes (n,), int64.

    ``largest`` is the byte that is white.
    """

    images: Tensor
    labels: Tensor
    largest: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor) -> Pixels:
        """Those at ``positions`` (m,)."""
        return replace(self, images=self.images.index_select(0, positions), labels=self.labels[positions])


class Encoded(Protocol):
    """Images to be decoded, one at a time, in any process."""

    @property
    def labels(self) -> Tensor:
        """Classes (n,), int64."""
        ...

    def __len__(self) -> int: ...

    def take(self, positions: Tensor) -> Encoded:
        """Those at ``positions`` (m,)."""
        ...

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        """The image at ``index``, which may be decoded only when it is used, and whose file is closed at the end."""
        ...

    def describe(self, index: int) -> str:
        """What an error calls the image at ``index``: its path, where it has one."""
        ...


class Files:
    """Images that are files.

    Args:
        paths: of the files. They are kept as one array: millions of Python strings would be copied to every worker process as
            their reference counts change.
        labels: (n,), int64.
    """

    def __init__(self, paths: Sequence[str] | np.ndarray, labels: Tensor) -> None:
        self._paths = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths])
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor) -> Files:
        return Files(self._paths[positions.numpy()], self.labels[positions])

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        return Image.open(self.describe(index))

    def describe(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))


class Records:
    """Images that another library hands out by index.

    Args:
        records: ``records[i]`` is a pair of the image, or a stream of its bytes, and something else.
        labels: (n,), int64, of the images chosen.
        chosen: (n,), int64, their indices in ``records``.
        name: of the data set, for errors.
    """

    def __init__(self, records: Any, labels: Tensor, chosen: Tensor, *, name: str) -> None:
        self._records, self.labels, self._chosen, self._name = records, labels, chosen, name

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor) -> Records:
        return Records(self._records, self.labels[positions], self._chosen[positions], name=self._name)

    @contextmanager
    def open(self, index: int) -> Iterator[Image.Image]:
        with closing(self._records[int(self._chosen[index])][0]) as found:
            yield found if isinstance(found, Image.Image) else Image.open(found)

    def describe(self, index: int) -> str:
        return f"number {int(self._chosen[index])} of {self._name}"


class Unreadable(ValueError):
    """An image cannot be decoded: which, why, and what to do about it."""


def decoded(images: Encoded, index: int) -> Image.Image:
    """The image at ``index`` in colour.

    Raises:
        Unreadable: whatever its decoder found wrong with it.
    """
    try:
        with images.open(index) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        raise Unreadable(
            f"image {images.describe(index)!r} cannot be read: {type(error).__name__}: {error}. "
            "Replace it, or leave out whatever cannot be read with --data.corrupt skip."
        ) from error


def readable(images: Encoded, index: int) -> bool:
    """Whether the image at ``index`` can be decoded; JPEG files are decoded at an eighth of their size, which finds the same faults."""
    try:
        with images.open(index) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except Exception:  # as above
        return False
    return True


@dataclass(frozen=True)
class Source:
    """A data set as it is kept.

    Args:
        train: images to train on.
        test: images to test on; None where the set has none of its own.
        classes: how many.
    """

    train: Pixels | Encoded
    test: Pixels | Encoded | None
    classes: int
