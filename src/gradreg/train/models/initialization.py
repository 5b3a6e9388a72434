"""The initialization that the residual networks for CIFAR share."""

from __future__ import annotations

from torch import nn


def he_fan_out(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / (kernel² · output channels)), batch normalizations to 1 and 0, biases of linear layers to 0.

    The weights of linear layers keep PyTorch's default.

    Source: He et al. 2015, arXiv 1502.01852; the published code of WideResNet, PyramidNet and Shake-Shake all does this.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
