"""Flips and crops of a whole batch at once, in the images' own type: bytes move, and nothing is computed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Padding = Literal["zero", "reflect"]


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """``images`` (n, channels, height, width), those of ``flipped`` (n,) bool mirrored left and right."""
    # Selecting whole images among both is three times as fast on a CPU as torch.where or as writing to some of them.
    both = torch.cat([images, images.flip(3)])
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * flipped)


def crop(images: Tensor, tops: Tensor, lefts: Tensor, *, size: int, padding: Padding) -> Tensor:
    """A window of each image's own height and width, cut out of the image padded by ``size`` pixels on every side.

    Args:
        images: (n, channels, height, width).
        tops: (n,) int64, first row of each window in the padded image, 0 to 2 ``size``.
        lefts: (n,) int64, first column, 0 to 2 ``size``.
        size: pixels, ≥ 1; for "reflect" less than height and width.
        padding: "zero", or "reflect" without repeating the border.
    """
    n, channels, height, width = images.shape
    padded = pad(images, [size] * 4, mode="constant" if padding == "zero" else "reflect")
    rows, columns = padded.shape[2:]
    # Every row of a window is a run of ``width`` values in memory, so that selecting runs copies them whole.
    corners = torch.arange(n, device=images.device) * (channels * rows * columns) + tops * columns + lefts
    channel = torch.arange(channels, device=images.device)[:, None] * (rows * columns)
    row = torch.arange(height, device=images.device) * columns
    starts = corners[:, None, None] + channel + row
    return padded.view(-1).unfold(0, width, 1).index_select(0, starts.view(-1)).view(images.shape)
