"""Where the images of each set come from: held in memory where they fit, else streamed from their files."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradreg.train.data import samples, streaming
from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.data.memory import MemoryImages
from gradreg.train.data.pools import Encoded, Pixels
from gradreg.train.data.requests import Images
from gradreg.train.data.streaming import StreamedImages

MEMORY_LIMIT = 2 * 1024**3
"""Bytes up to which ``data.memory: auto`` holds the images in memory."""

_RESIZED_AT_ONCE = 1024


class Supply:
    """Makes the images of sets.

    Args:
        config: their size, whether they are held in memory, and how many workers decode.
        first: the pool whose first image says what size they are.
        count: how many images all sets have together.
        device: where batches are wanted.

    Raises:
        ValueError: images in one piece that are not to be held in memory.
    """

    def __init__(self, config: DataConfig, first: Pixels | Encoded, *, count: int, device: torch.device) -> None:
        if isinstance(first, Pixels) and config.memory is False:
            raise ValueError(f"data.memory must not be false for {config.name!r}, which is read in one piece; got false. Leave it out.")
        self._size, self._device = config.image_size, device
        self._workers = streaming.workers(config)
        self._centre = samples.as_it_is(config.image_size, kept=samples.evaluation_crop(config))
        self.shape = _shape(first, samples.as_it_is(config.image_size))
        fits = count * math.prod(self.shape) <= MEMORY_LIMIT if config.memory == "auto" else config.memory
        self.in_memory: bool = isinstance(first, Pixels) or fits

    def training(self, images: Pixels | Encoded, augmentation: AugmentationConfig, *, seed: int) -> Images:
        """``images`` to train on, augmented by numbers that follow from ``seed``."""
        if isinstance(images, Pixels) or self.in_memory:
            return MemoryImages(self._held(images, samples.as_it_is(self._size)), augmentation, seed=seed)
        _, height, width = self.shape
        transform = samples.augmented(self._size, augmentation, height=height, width=width)
        return StreamedImages(images, transform, self.shape, workers=self._workers, seed=seed, keep_workers=True, device=self._device)

    def evaluation(self, images: Pixels | Encoded) -> Images:
        """``images`` to evaluate on."""
        if isinstance(images, Pixels) or self.in_memory:
            return MemoryImages(self._held(images, self._centre))
        return StreamedImages(images, self._centre, self.shape, workers=self._workers, seed=None, keep_workers=False, device=self._device)

    def _held(self, images: Pixels | Encoded, transform: Callable[..., Tensor]) -> Tensor:
        if not isinstance(images, Pixels):
            return streaming.decode_all(images, transform, self.shape, workers=self._workers).to(self._device)
        return torch.cat([transform(some) for some in images.images.split(_RESIZED_AT_ONCE)]).to(self._device)


def _shape(pool: Pixels | Encoded, transform: Callable[..., Tensor]) -> tuple[int, int, int]:
    """(channels, height, width) that ``transform`` makes of the pool's first image."""
    first = transform(pool.images[0]) if isinstance(pool, Pixels) else streaming.first(pool, transform)
    channels, height, width = first.shape
    return channels, height, width
