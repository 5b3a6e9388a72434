"""Shake-Shake residual networks for CIFAR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from gradreg import checks
from gradreg.train.models.initialization import he_fan_out
from gradreg.train.models.registration import images, ours, untrained
from gradreg.train.models.shake import shake_shake


class Shortcut(nn.Module):
    """Downsamples on two paths, one of them shifted by a pixel down and to the right, so that they see different pixels.

    Args:
        incoming: channels of the input.
        outgoing: channels of the output, even; half from each path.
        stride: of the downsampling.
    """

    def __init__(self, incoming: int, outgoing: int, stride: int) -> None:
        super().__init__()
        self.straight = nn.Conv2d(incoming, outgoing // 2, 1, stride, bias=False)
        self.shifted = nn.Conv2d(incoming, outgoing // 2, 1, stride, bias=False)
        self.norm = nn.BatchNorm2d(outgoing)

    def forward(self, x: Tensor) -> Tensor:
        """(n, incoming, h, w) to (n, outgoing, ⌈h / stride⌉, ⌈w / stride⌉)."""
        x = relu(x)
        return self.norm(torch.cat([self.straight(x), self.shifted(pad(x, (1, -1, 1, -1)))], dim=1))


class Block(nn.Module):
    """Two residual branches of two 3 x 3 convolutions, mixed at random, and a shortcut.

    Args:
        incoming: channels of the input.
        outgoing: channels of the output.
        stride: of each branch's first convolution.
    """

    def __init__(self, incoming: int, outgoing: int, stride: int) -> None:
        super().__init__()
        self.first: nn.Sequential = self._branch(incoming, outgoing, stride)
        self.second: nn.Sequential = self._branch(incoming, outgoing, stride)
        self.shortcut: nn.Module = nn.Identity() if incoming == outgoing else Shortcut(incoming, outgoing, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, incoming, h, w) to (n, outgoing, ⌈h / stride⌉, ⌈w / stride⌉)."""
        return self.shortcut(x) + shake_shake(self.first(x), self.second(x), self.training)

    @staticmethod
    def _branch(incoming: int, outgoing: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(incoming, outgoing, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outgoing),
            nn.ReLU(),
            nn.Conv2d(outgoing, outgoing, 3, padding=1, bias=False),
            nn.BatchNorm2d(outgoing),
        )


class ShakeShake(nn.Module):
    """Three groups of (depth − 2) / 6 blocks of two branches each, with ``channels``, 2 and 4 times ``channels``.

    Random in the forward pass and again in the backward pass, for each image ("S-S-I").

    Source: Gastaldi 2017, arXiv 1705.07485, and the published code.

    Differs from the GNP reference (arXiv 2202.03599, its code), which calls it WideResNet_2_96_ShakeShake: there no ReLU precedes a
    shortcut's convolutions, its shift goes up and to the left, and the last layer's weights are uniform in ±1/√classes.

    Args:
        depth: layers, 6 k + 2 with k ≥ 1.
        channels: of each branch in the first group, even, ≥ 2.
        num_classes: outputs, ≥ 1.
        in_chans: channels of the images, ≥ 1.
    """

    def __init__(self, *, depth: int = 26, channels: int = 96, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        depth = checks.whole("model.depth", depth, minimum=8)
        channels = checks.whole("model.channels", channels, minimum=2)
        if (depth - 2) % 6:
            raise ValueError(f"model.depth must be 6 k + 2 for a Shake-Shake network; got {depth}. Use 26, say.")
        if channels % 2:
            raise ValueError(f"model.channels must be even, half for each way of a shortcut; got {channels}. Use 32, 64 or 96, say.")
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        blocks: list[nn.Module] = []
        incoming = 16
        for group, outgoing in enumerate((channels, 2 * channels, 4 * channels)):
            for i in range((depth - 2) // 6):
                blocks.append(Block(incoming, outgoing, stride=2 if group and not i else 1))
                incoming = outgoing
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(incoming, num_classes)
        he_fan_out(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) to logits (n, num_classes)."""
        return self.head(relu(self.blocks(self.stem(images))).mean((2, 3)))


default_cfgs: dict[str, dict[str, Any]] = {"shakeshake26_2x96d": images(3, 32)}


@ours
def shakeshake26_2x96d(pretrained: bool = False, **options: Any) -> ShakeShake:
    """Shake-Shake-26 2x96d, "WRN-28-2x96d" in the GNP paper: 26.2 M parameters."""
    return untrained("shakeshake26_2x96d", ShakeShake, pretrained, options, depth=26, channels=96)
