"""A convolutional network without shortcuts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gradreg import checks
from gradreg.train.models.registration import images, ours, untrained


class PlainCNN(nn.Module):
    """Stages of 3 x 3 convolutions and a 2 x 2 max-pooling, then a linear layer, with a hidden one or without; ReLU throughout.

    Args:
        num_classes: outputs, ≥ 1.
        in_chans: channels of the images, ≥ 1.
        img_size: height and width of the images in pixels, or one number for both, ≥ 2 for each stage's halving.
        channels: channels of each stage's convolutions, each ≥ 1.
        convolutions: how many a stage has, ≥ 1.
        batch_norm: BatchNorm between each convolution, which then has no bias, and its ReLU.
        hidden: width of the hidden linear layer, ≥ 1, which reads every pixel; None: none, the output reads each channel's mean.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        channels: tuple[int, ...] = (300, 500),
        convolutions: int = 2,
        batch_norm: bool = False,
        hidden: int | None = 500,
    ) -> None:
        super().__init__()
        stages = checks.whole_numbers("model.channels", channels, minimum=1)
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        height, width = (side // 2 ** len(stages) for side in sides)
        if not height * width:
            remedy = "Use fewer stages in model.channels."
            raise ValueError(f"model.img_size must be >= {2 ** len(stages)} for {len(stages)} halvings; got {img_size}. {remedy}")
        layers: list[nn.Module] = []
        before = in_chans
        checks.whole("model.convolutions", convolutions, minimum=1)
        for channels_here in stages:
            for _ in range(convolutions):
                norm = [nn.BatchNorm2d(channels_here)] if batch_norm else []
                layers += [nn.Conv2d(before, channels_here, 3, padding=1, bias=not batch_norm), *norm, nn.ReLU()]
                before = channels_here
            layers.append(nn.MaxPool2d(2))
        if hidden is None:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)]
        else:
            hidden = checks.whole("model.hidden", hidden, minimum=1)
            layers += [nn.Flatten(), nn.Linear(before * height * width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) to logits (n, num_classes)."""
        return self.layers(images)


default_cfgs: dict[str, dict[str, Any]] = {"cnn_l2": images(3, 32, fixed=True), "cnn_bn": images(3, 32)}


@ours
def cnn_l2(pretrained: bool = False, **options: Any) -> PlainCNN:
    """The CNN of the experiments on L2 with CIFAR-10.

    Source: Lewkowycz and Gur-Ari 2020, arXiv 2006.08643, which has CNNs on CIFAR-10, wide enough to fit their training data. Chosen here,
    and not checked against the paper's appendix: two stages of 300 and 500 channels, a hidden layer of 500, PyTorch's initialization.
    ``channels`` and ``hidden`` change them.
    """
    return untrained("cnn_l2", PlainCNN, pretrained, options)


@ours
def cnn_bn(pretrained: bool = False, **options: Any) -> PlainCNN:
    """A small CNN with BatchNorm, of our own: three stages of one convolution with 32, 64 and 128 channels, and their means.

    ``channels``, ``convolutions``, ``batch_norm`` and ``hidden`` change it.
    """
    return untrained("cnn_bn", PlainCNN, pretrained, options, channels=(32, 64, 128), convolutions=1, batch_norm=True, hidden=None)
