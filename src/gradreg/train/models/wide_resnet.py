"""Wide residual networks for CIFAR."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu

from gradreg import checks
from gradreg.train.models.initialization import he_fan_out
from gradreg.train.models.registration import images, ours, untrained


class Block(nn.Module):
    """Batch normalization, ReLU and 3 x 3 convolution, twice, beside a shortcut: the identity, or a 1 x 1 convolution where shapes change.

    Args:
        incoming: channels of the input.
        outgoing: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, incoming: int, outgoing: int, stride: int) -> None:
        super().__init__()
        self.norm1: nn.BatchNorm2d = nn.BatchNorm2d(incoming)
        self.conv1: nn.Conv2d = nn.Conv2d(incoming, outgoing, 3, stride, padding=1, bias=False)
        self.norm2: nn.BatchNorm2d = nn.BatchNorm2d(outgoing)
        self.conv2: nn.Conv2d = nn.Conv2d(outgoing, outgoing, 3, padding=1, bias=False)
        self.projection: nn.Conv2d | None = None if incoming == outgoing else nn.Conv2d(incoming, outgoing, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, incoming, h, w) to (n, outgoing, h / stride, w / stride)."""
        activated = relu(self.norm1(x))
        shortcut = x if self.projection is None else self.projection(activated)
        return shortcut + self.conv2(relu(self.norm2(self.conv1(activated))))


class WideResNet(nn.Module):
    """WRN-depth-width: three groups of (depth − 4) / 6 pre-activation blocks with 16, 32 and 64 times ``width`` channels.

    Source: Zagoruyko and Komodakis 2016, arXiv 1605.07146, table 1 and the published code: a projection where the number of channels
    changes, taken after the first normalization and ReLU.

    Differs from the GNP reference (arXiv 2202.03599, its code): there a shortcut that changes shape is average pooling and zero-padded
    channels, without parameters (WRN-28-10 then has 36.22 M in place of 36.48 M), taken before normalization except in the first block; and
    the last layer's weights are uniform in ±1/√classes, here PyTorch's default. Dropout between the convolutions, which the paper also
    tries, is left out.

    Args:
        depth: layers, 6 k + 4 with k ≥ 1.
        width: factor on the channels, ≥ 1.
        num_classes: outputs, ≥ 1.
        in_chans: channels of the images, ≥ 1.
    """

    def __init__(self, *, depth: int = 28, width: int = 10, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        depth = checks.whole("model.depth", depth, minimum=10)
        width = checks.whole("model.width", width, minimum=1)
        if (depth - 4) % 6:
            raise ValueError(f"model.depth must be 6 k + 4 for a wide residual network; got {depth}. Use 16, 28 or 40, say.")
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for group, outgoing in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range((depth - 4) // 6):
                blocks.append(Block(channels, outgoing, stride=2 if group and not i else 1))
                channels = outgoing
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        he_fan_out(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) to logits (n, num_classes)."""
        return self.head(relu(self.norm(self.blocks(self.stem(images)))).mean((2, 3)))


default_cfgs: dict[str, dict[str, Any]] = {name: images(3, 32) for name in ("wrn16_4", "wrn28_10", "wrn40_10")}


@ours
def wrn16_4(pretrained: bool = False, **options: Any) -> WideResNet:
    """WRN-16-4: 2.75 M parameters."""
    return untrained("wrn16_4", WideResNet, pretrained, options, depth=16, width=4)


@ours
def wrn28_10(pretrained: bool = False, **options: Any) -> WideResNet:
    """WRN-28-10: 36.48 M parameters."""
    return untrained("wrn28_10", WideResNet, pretrained, options, depth=28, width=10)


@ours
def wrn40_10(pretrained: bool = False, **options: Any) -> WideResNet:
    """WRN-40-10: 55.84 M parameters."""
    return untrained("wrn40_10", WideResNet, pretrained, options, depth=40, width=10)
