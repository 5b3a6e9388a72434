"""Images held in memory as bytes, on the device that trains: augmented there a batch at a time, floats only then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradreg.train.data import draws, rectangles, samples, windows
from gradreg.train.data.configuration import AugmentationConfig
from gradreg.train.data.policies import BatchPolicy
from gradreg.train.data.requests import Request


class MemoryImages:
    """The images of a set, in memory.

    Args:
        pixels: (n, channels, height, width), uint8, on the device.
        augmentation: what training does to them; None leaves them as they are.
        seed: of the augmentation, which follows from it, the epoch and the batch alone.
    """

    def __init__(self, pixels: Tensor, augmentation: AugmentationConfig | None = None, *, seed: int = 0) -> None:
        self._pixels, self._seed = pixels, seed
        self._augmentation = augmentation or AugmentationConfig()
        policy = samples.colour_policy(self._augmentation)
        self._policy = None if policy is None else BatchPolicy(policy, height=pixels.shape[2], width=pixels.shape[3])
        chosen = self._augmentation
        self._moves = chosen.random_resized_crop or chosen.crop_padding is not None or chosen.flip or policy is not None

    def batches(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """See ``Images.batches``."""
        for request in requests:
            positions = request.positions[request.rows].to(self._pixels.device, non_blocking=True)
            images = self._pixels.index_select(0, positions)
            yield self._augmented(images, request) if self._moves else images

    def _augmented(self, images: Tensor, request: Request) -> Tensor:
        chosen, n, device = self._augmentation, len(request.positions), images.device
        height, width = images.shape[2:]
        generator = draws.generator(self._seed, request.epoch, request.number, draws.Purpose.BATCH)
        if chosen.random_resized_crop:
            drawn, _ = rectangles.draw(n, height, width, scale=chosen.scale, ratio=chosen.ratio, generator=generator)
            images = windows.resized_crop(images, drawn.take(request.rows, device))
        if chosen.crop_padding is not None:
            corners = torch.randint(2 * chosen.crop_padding + 1, (2, n), generator=generator)[:, request.rows]
            tops, lefts = corners.to(device, non_blocking=True)
            images = windows.crop(images, tops, lefts, size=chosen.crop_padding, padding=chosen.padding)
        if chosen.flip:
            flipped = torch.rand(n, generator=generator)[request.rows] < 0.5
            images = windows.flip(images, flipped.to(device, non_blocking=True))
        if self._policy is not None:
            images = self._policy.apply(images, self._policy.draw(n, generator)[:, request.rows])
        return images
