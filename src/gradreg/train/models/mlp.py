"""Fully connected networks on flattened images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from gradreg import checks
from gradreg.train.models.registration import images, ours, untrained


class MLP(nn.Module):
    """Flatten, then linear layers with ReLU between them.

    Args:
        num_classes: outputs, ≥ 1.
        in_chans: channels of the images, ≥ 1.
        img_size: height and width of the images in pixels, or one number for both, ≥ 1.
        hidden: widths of the hidden layers, each ≥ 1.
        gain: None is PyTorch's default initialization; a number > 0 draws the weights with deviation gain·√(2/fan_in), He's at 1,
            and sets the biases to 0.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 8,
        hidden: Sequence[int] = (256, 256),
        gain: float | None = None,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        widths = [in_chans * height * width, *checks.whole_numbers("model.hidden", hidden, minimum=1), num_classes]
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


default_cfgs: dict[str, dict[str, Any]] = {
    "mlp": images(1, 8, fixed=True),
    "mlp_fgr": images(3, 32, fixed=True),
    "mlp_l2": images(1, 28, fixed=True),
}


@ours
def mlp(pretrained: bool = False, **options: Any) -> MLP:
    """Two hidden layers of 256, for 8 x 8 digits."""
    return untrained("mlp", MLP, pretrained, options)


@ours
def mlp_fgr(pretrained: bool = False, **options: Any) -> MLP:
    """The MLP of the F-GR experiments on CIFAR-10: hidden layers of 512.

    Source: Karakida et al. 2023, arXiv 2210.02720, figure 2: "MLP (width 512)". Chosen here, since the paper's code was never published:
    three hidden layers, biases, PyTorch's initialization. ``hidden`` changes them.
    """
    return untrained("mlp_fgr", MLP, pretrained, options, in_chans=3, img_size=32, hidden=(512, 512, 512))


@ours
def mlp_l2(pretrained: bool = False, **options: Any) -> MLP:
    """The fully connected network of the experiments on L2 with MNIST.

    Source: Lewkowycz and Gur-Ari 2020, arXiv 2006.08643, which has one on MNIST, wide enough to fit its training data. Chosen here, and not
    checked against the paper's appendix: three hidden layers of 2048, biases, PyTorch's initialization. ``hidden`` changes them.
    """
    return untrained("mlp_l2", MLP, pretrained, options, in_chans=1, img_size=28, hidden=(2048, 2048, 2048))
