"""From bytes to floats: between 0 and 1, then less the mean and over the standard deviation of the data set's colours."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
"""Data set -> mean and standard deviation of each channel over its training images, between 0 and 1."""


class ColourScale:
    """Bytes as floats: ``(bytes / largest − mean) / deviation``, channel by channel.

    Args:
        largest: the byte that becomes 1.
        statistics: mean and standard deviation of each channel; None leaves the images between 0 and 1.
    """

    def __init__(self, largest: int, statistics: tuple[tuple[float, ...], tuple[float, ...]] | None) -> None:
        self._largest, self._statistics = largest, statistics

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` (n, channels, height, width), uint8, as float32."""
        floats = images.to(torch.float32).div_(self._largest)
        if self._statistics is None:
            return floats
        mean, deviation = self._statistics
        return functional.normalize_image(floats, list(mean), list(deviation), inplace=True)
