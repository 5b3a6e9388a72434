"""Rectangles drawn at random within an image: one for every image of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TRIES = 10


@dataclass(frozen=True)
class Rectangles:
    """A rectangle an image, each (n,) int64, in pixels: its first row, first column, height and width."""

    tops: Tensor
    lefts: Tensor
    heights: Tensor
    widths: Tensor

    def take(self, rows: Tensor, device: torch.device) -> Rectangles:
        """Those of ``rows``, on the device."""
        sides = torch.stack([self.tops, self.lefts, self.heights, self.widths])[:, rows].to(device, non_blocking=True)
        return Rectangles(*sides)

    def mask(self, height: int, width: int) -> Tensor:
        """(n, 1, height, width) bool: where the rectangles are."""
        row, column = (torch.arange(size, device=self.tops.device) for size in (height, width))
        in_rows = (row >= self.tops[:, None]) & (row < (self.tops + self.heights)[:, None])
        in_columns = (column >= self.lefts[:, None]) & (column < (self.lefts + self.widths)[:, None])
        return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def draw(
    n: int, height: int, width: int, *, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator
) -> tuple[Rectangles, Tensor]:
    """``n`` rectangles of random area, proportions and place, of which the first of ten tries counts that fits.

    Args:
        n: how many.
        height: of the image, in pixels.
        width: of the image.
        scale: area as shares of the image's, from and to; drawn evenly.
        ratio: width over height, from and to; its logarithm is drawn evenly.
        generator: on the CPU.

    Returns:
        The rectangles, and (n,) bool: which fitted. One that did not is as large as the image.
    """
    areas = _uniform(_TRIES, n, low=scale[0], high=scale[1], generator=generator) * (height * width)
    ratios = _uniform(_TRIES, n, low=math.log(ratio[0]), high=math.log(ratio[1]), generator=generator).exp()
    widths, heights = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fit = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fit.to(torch.int8).argmax(dim=0, keepdim=True)
    fits = fit.any(dim=0)
    heights, widths = (
        torch.where(fits, sides.gather(0, first)[0], side) for sides, side in ((heights, float(height)), (widths, float(width)))
    )
    place = _uniform(2, n, low=0.0, high=1.0, generator=generator)
    tops, lefts = place[0] * (height - heights + 1), place[1] * (width - widths + 1)
    return Rectangles(tops.long(), lefts.long(), heights.long(), widths.long()), fits


def squares(n: int, height: int, width: int, *, side: int, generator: torch.Generator) -> Rectangles:
    """``n`` squares about random pixels; the part of a square that lies outside the image does not count."""
    tops, lefts = (torch.randint(size, (n,), generator=generator) - side // 2 for size in (height, width))
    sides = torch.full((n,), side)
    return Rectangles(tops, lefts, sides, sides)


def _uniform(*shape: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    # float64: in float32 the largest draws, times a size, round up to the size itself
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
