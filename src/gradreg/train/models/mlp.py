"""A fully connected network on flattened images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from gradreg import checks


class MLP(nn.Module):
    """Flatten, then linear layers with ReLU between them.

    Args:
        num_classes: outputs, ≥ 1.
        in_chans: channels of the images, ≥ 1.
        img_size: height and width of the images in pixels, ≥ 1.
        hidden: widths of the hidden layers, each ≥ 1.
        gain: None is PyTorch's default initialization; a number > 0 draws the weights with deviation gain·√(2/fan_in), He's at 1,
            and sets the biases to 0.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 8,
        hidden: Sequence[int] = (256, 256),
        gain: float | None = None,
    ) -> None:
        super().__init__()
        widths = [in_chans * img_size * img_size, *(checks.whole("model.hidden", width, minimum=1) for width in hidden), num_classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        if gain is not None:
            deviation = checks.positive("model.gain", gain) * 2**0.5
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=deviation / layer.in_features**0.5)
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) to logits (n, num_classes)."""
        return self.layers(images)


@register_model
def mlp(pretrained: bool = False, **options: Any) -> MLP:
    """``MLP`` for ``timm.create_model("mlp", ...)``; there are no pretrained weights."""
    if pretrained:
        raise ValueError("pretrained must be False for 'mlp'; got True. There are no published weights of it.")
    options = {k: v for k, v in options.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    return MLP(**options)
