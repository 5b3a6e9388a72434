"""Random boxes within images, and flips and crops of a whole batch at once.

All operate on bytes: flips and crops only copy them, and only resizing converts to floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

Padding = Literal["zero", "reflect"]

_TRIES = 10
"""Boxes drawn per image, of which the first that fits is used: torchvision's number."""


@dataclass(frozen=True)
class Boxes:
    """A box for each image, each field (n,) int64, in pixels: its first row, first column, height and width."""

    tops: Tensor
    lefts: Tensor
    heights: Tensor
    widths: Tensor

    def take(self, rows: Tensor, device: torch.device) -> Boxes:
        """The boxes of ``rows``, on the device."""
        # One copy to the device instead of four.
        fields = torch.stack([self.tops, self.lefts, self.heights, self.widths])[:, rows].to(device, non_blocking=True)
        return Boxes(*fields)

    def mask(self, height: int, width: int) -> Tensor:
        """(n, 1, height, width) bool: True inside the boxes."""
        row, column = (torch.arange(size, device=self.tops.device) for size in (height, width))
        # A box is the product of an interval of rows and one of columns, so two one-dimensional masks are enough until the end.
        in_rows = (row >= self.tops[:, None]) & (row < (self.tops + self.heights)[:, None])
        in_columns = (column >= self.lefts[:, None]) & (column < (self.lefts + self.widths)[:, None])
        return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def random_boxes(
    n: int, height: int, width: int, *, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator
) -> tuple[Boxes, Tensor]:
    """``n`` boxes of random area, aspect ratio and position; of ten tries for each, the first that fits is used.

    Args:
        n: how many.
        height: of the image, in pixels.
        width: of the image.
        scale: smallest and largest area as shares of the image's; drawn uniformly.
        ratio: smallest and largest width over height; its logarithm is drawn uniformly.
        generator: on the CPU.

    Returns:
        The boxes, and (n,) bool: which fitted. One that did not is as large as the image.
    """
    # torchvision tries until one fits. Here all tries of all images are drawn at once, so that no loop runs over images, and the
    # numbers of one image do not depend on how often another one had to try.
    areas = _uniform(_TRIES, n, low=scale[0], high=scale[1], generator=generator) * (height * width)
    # The logarithm, so that a ratio and its inverse, upright and lying boxes, are equally likely.
    ratios = _uniform(_TRIES, n, low=math.log(ratio[0]), high=math.log(ratio[1]), generator=generator).exp()
    widths, heights = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fit = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    # argmax of booleans finds the first True, or 0 if there is none, which ``fits`` excludes.
    first = fit.to(torch.int8).argmax(dim=0, keepdim=True)
    fits = fit.any(dim=0)
    heights, widths = (
        torch.where(fits, sides.gather(0, first)[0], side) for sides, side in ((heights, float(height)), (widths, float(width)))
    )
    place = _uniform(2, n, low=0.0, high=1.0, generator=generator)
    tops, lefts = place[0] * (height - heights + 1), place[1] * (width - widths + 1)
    return Boxes(tops.long(), lefts.long(), heights.long(), widths.long()), fits


def random_squares(n: int, height: int, width: int, *, side: int, generator: torch.Generator) -> Boxes:
    """``n`` squares centered at random pixels; the part of a square that lies outside the image does not count."""
    tops, lefts = (torch.randint(size, (n,), generator=generator) - side // 2 for size in (height, width))
    sides = torch.full((n,), side)
    return Boxes(tops, lefts, sides, sides)


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """``images`` (n, channels, height, width), those of ``flipped`` (n,) bool mirrored left and right."""
    # Selecting whole images from both versions is three times as fast on a CPU as torch.where or as writing to some of them.
    both = torch.cat([images, images.flip(3)])
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * flipped)


def padded_crop(images: Tensor, tops: Tensor, lefts: Tensor, *, size: int, padding: Padding) -> Tensor:
    """A crop of each image's own height and width, cut out of the image padded by ``size`` pixels on every side.

    Args:
        images: (n, channels, height, width).
        tops: (n,) int64, first row of each crop in the padded image, 0 to 2 ``size``.
        lefts: (n,) int64, first column, 0 to 2 ``size``.
        size: pixels, ≥ 1; for "reflect" less than height and width.
        padding: "zero", or "reflect" without repeating the border.
    """
    n, channels, height, width = images.shape
    padded = _pad(images, size, padding)
    rows, columns = padded.shape[2:]
    # Every row of a crop is a run of ``width`` values in memory. ``unfold`` is a view of the batch as all runs of that length, and
    # selecting runs by their start copies each as a whole. This needs one index per row, where ``gather`` needs one per pixel.
    corners = torch.arange(n, device=images.device) * (channels * rows * columns) + tops * columns + lefts
    channel = torch.arange(channels, device=images.device)[:, None] * (rows * columns)
    row = torch.arange(height, device=images.device) * columns
    starts = corners[:, None, None] + channel + row
    return padded.view(-1).unfold(0, width, 1).index_select(0, starts.view(-1)).view(images.shape)


def resized_crop(images: Tensor, boxes: Boxes) -> Tensor:
    """The inside of each image's box, resized to the image's own height and width, bilinearly.

    Args:
        images: (n, channels, height, width), uint8.
        boxes: of each image.
    """
    height, width = images.shape[2:]
    # Boxes differ in size, so a single call of ``interpolate`` cannot resize them. Instead, the corner and scale of each box become a
    # sampling grid in its whole image. A crop is only ever enlarged, so antialiasing is not needed.
    y = _sampling_points(boxes.tops, boxes.heights, height)
    x = _sampling_points(boxes.lefts, boxes.widths, width)
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
    resized = grid_sample(images.to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return resized.round_().to(torch.uint8)


def _pad(images: Tensor, size: int, padding: Padding) -> Tensor:
    if padding == "zero":
        return pad(images, [size] * 4)
    # Not every device can mirror bytes; float32 represents them exactly.
    return pad(images.to(torch.float32), [size] * 4, mode="reflect").to(images.dtype)


def _sampling_points(first: Tensor, length: Tensor, size: int) -> Tensor:
    """The points at which ``size`` pixels sample an interval of ``length`` pixels: (n, size), in ``grid_sample``'s range from -1 to 1."""
    # Pixel i is the interval from i to i + 1 and has its center at i + 1/2; output centers are mapped to input centers.
    within = (torch.arange(size, device=first.device) + 0.5) * (length[:, None] / size) - 0.5
    # Clamp within half a pixel of the box's edge, so that the result does not depend on pixels outside of the box.
    pixel = first[:, None] + torch.minimum(within.clamp(min=0), length[:, None] - 1.0)
    return (2 * pixel + 1) / size - 1


def _uniform(*shape: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    # float64, because in float32 the largest draws times a size round up to the size itself, and a box would start outside the image.
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
