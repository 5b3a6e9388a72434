"""Pyramidal residual networks for CIFAR, with and without ShakeDrop."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, relu

from gradreg import checks
from gradreg.train.models.initialization import he_fan_out
from gradreg.train.models.registration import images, ours, untrained
from gradreg.train.models.shake import ShakeDrop, linear_decay


class Block(nn.Module):
    """Convolutions between batch normalizations, without ReLU before the first and after the last, and a zero-padded shortcut.

    Args:
        incoming: channels of the input.
        channels: channels of the 3 x 3 convolutions.
        stride: of the first 3 x 3 convolution; the shortcut is average pooled by as much.
        bottleneck: 1 x 1, 3 x 3 and 1 x 1 to 4 times the channels, in place of two 3 x 3.
        keep: ShakeDrop's probability to keep the branch unchanged; None without ShakeDrop.
    """

    def __init__(self, incoming: int, channels: int, *, stride: int, bottleneck: bool, keep: float | None) -> None:
        super().__init__()
        if bottleneck:
            shapes = [(incoming, channels, 1, 1), (channels, channels, 3, stride), (channels, 4 * channels, 1, 1)]
        else:
            shapes = [(incoming, channels, 3, stride), (channels, channels, 3, 1)]
        self.outgoing: int = shapes[-1][1]
        layers: list[nn.Module] = [nn.BatchNorm2d(incoming)]
        for before, after, kernel, step in shapes:
            layers += [nn.Conv2d(before, after, kernel, step, padding=kernel // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        if keep is not None:
            layers[-1] = ShakeDrop(keep)
        else:
            layers.pop()
        self.branch = nn.Sequential(*layers)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(n, incoming, h, w) to (n, outgoing, ⌈h / stride⌉, ⌈w / stride⌉)."""
        shortcut = x if self.stride == 1 else avg_pool2d(x, self.stride, ceil_mode=True)
        return self.branch(x) + pad(shortcut, (0, 0, 0, 0, 0, self.outgoing - x.shape[1]))


class PyramidNet(nn.Module):
    """Additive PyramidNet: block k of N has round(16 + k · alpha / N) channels (four times as many leave a bottleneck).

    Source: Han, Kim and Kim 2017, arXiv 1610.02915, and the published code, which rounds the channels as here. With ``shake_drop``: Yamada
    et al. 2019, arXiv 1802.02375, after each branch's last normalization, the keep probability falling linearly to ``shake_drop`` at the
    last block.

    Differs from the GNP reference (arXiv 2202.03599, its code): there the last layer's weights are uniform in ±1/√classes, here PyTorch's
    default; its ShakeDrop variant stops with an error.

    Args:
        depth: layers; 9 k + 2 with bottlenecks, 6 k + 2 without, k ≥ 1.
        alpha: channels added from the first block to the last, ≥ 1.
        bottleneck: bottleneck blocks instead of basic ones.
        shake_drop: ShakeDrop's keep probability at the last block, in (0, 1]; None trains without ShakeDrop.
        num_classes: outputs, ≥ 1.
        in_chans: channels of the images, ≥ 1.
    """

    def __init__(
        self,
        *,
        depth: int = 110,
        alpha: int = 270,
        bottleneck: bool = False,
        shake_drop: float | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        layers = 9 if bottleneck else 6
        depth = checks.whole("model.depth", depth, minimum=layers + 2)
        alpha = checks.whole("model.alpha", alpha, minimum=1)
        if (depth - 2) % layers:
            kind = "bottleneck" if bottleneck else "basic"
            remedy = "Use 164, 200 or 272, say." if bottleneck else "Use 110, say, or bottleneck: true."
            raise ValueError(f"model.depth must be {layers} k + 2 for a PyramidNet of {kind} blocks; got {depth}. {remedy}")
        if shake_drop is not None and checks.positive("model.shake_drop", shake_drop) > 1:
            raise ValueError(f"model.shake_drop must be a probability, <= 1; got {shake_drop}. Use null to train without ShakeDrop.")
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        blocks: list[Block] = []
        total = (depth - 2) // layers * 3
        channels = 16
        for k in range(1, total + 1):
            stride = 2 if k in (total // 3 + 1, 2 * total // 3 + 1) else 1
            keep = None if shake_drop is None else linear_decay(k, total, shake_drop)
            blocks.append(Block(channels, round(16 + k * alpha / total), stride=stride, bottleneck=bottleneck, keep=keep))
            channels = blocks[-1].outgoing
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        he_fan_out(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) to logits (n, num_classes)."""
        return self.head(relu(self.norm(self.blocks(self.stem(images)))).mean((2, 3)))


_SIZES = ("110_270", "164_48", "164_270", "200_240", "272_200")
default_cfgs: dict[str, dict[str, Any]] = {f"pyramidnet{size}{shake}": images(3, 32) for size in _SIZES for shake in ("", "_shakedrop")}


def _entry(size: str, shake_drop: float | None) -> None:
    depth, alpha = map(int, size.split("_"))
    settings = {"depth": depth, "alpha": alpha, "bottleneck": depth != 110, "shake_drop": shake_drop}

    def entry(pretrained: bool = False, **options: Any) -> PyramidNet:
        return untrained(entry.__name__, PyramidNet, pretrained, options, **settings)

    entry.__name__ = f"pyramidnet{size}" + ("" if shake_drop is None else "_shakedrop")
    entry.__doc__ = f"PyramidNet-{depth}, alpha {alpha}" + ("." if shake_drop is None else ", with ShakeDrop to a keep probability of 0.5.")
    ours(entry)


for _size in _SIZES:
    _entry(_size, None)
    _entry(_size, 0.5)
