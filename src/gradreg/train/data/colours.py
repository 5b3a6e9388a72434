"""From bytes to floats: between 0 and 1, then less the mean and over the standard deviation of the data set's colours."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from gradreg.train.data.catalogue import Colours


class ColourScale:
    """Bytes as floats: ``(bytes / largest − mean) / deviation``, channel by channel.

    Args:
        largest: the byte that becomes 1.
        colours: mean and standard deviation of each channel; None leaves the images between 0 and 1.
    """

    def __init__(self, largest: int, colours: Colours | None) -> None:
        self._largest, self._colours = largest, colours

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` (n, channels, height, width), uint8, as float32."""
        floats = images.to(torch.float32).div_(self._largest)
        if self._colours is None:
            return floats
        return functional.normalize(floats, list(self._colours.mean), list(self._colours.deviation), inplace=True)
