"""Images held in memory as bytes, on the device that trains: augmented there a batch at a time, floats only then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gradreg.train.data import draws, windows
from gradreg.train.data.colours import ColourScale
from gradreg.train.data.configuration import AugmentationConfig
from gradreg.train.data.sets import Request


class MemoryImages:
    """Images in memory.

    Args:
        pixels: (n, channels, height, width), uint8, on the device.
        scale: what makes floats of them.
        augmentation: what training does to them.
        seed: of the augmentation.
    """

    def __init__(self, pixels: Tensor, scale: ColourScale, augmentation: AugmentationConfig, *, seed: int) -> None:
        self._pixels, self._scale, self._augmentation, self._seed = pixels, scale, augmentation, seed

    def for_training(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        for request in requests:
            yield self._scale(self._augmented(self._taken(request), request))

    def for_evaluation(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        for request in requests:
            yield self._scale(self._taken(request))

    def _taken(self, request: Request) -> Tensor:
        return self._pixels.index_select(0, request.positions[request.rows].to(self._pixels.device, non_blocking=True))

    def _augmented(self, images: Tensor, request: Request) -> Tensor:
        chosen, n = self._augmentation, len(request.positions)
        generator = draws.generator(self._seed, request.epoch, request.number) if chosen.crop_padding or chosen.flip else None
        if chosen.crop_padding is not None:
            corners = torch.randint(2 * chosen.crop_padding + 1, (2, n), generator=generator)[:, request.rows]
            tops, lefts = corners.to(images.device, non_blocking=True)
            images = windows.crop(images, tops, lefts, size=chosen.crop_padding, padding=chosen.padding)
        if chosen.flip:
            flipped = torch.rand(n, generator=generator)[request.rows] < 0.5
            images = windows.flip(images, flipped.to(images.device, non_blocking=True))
        return images
