"""timm's ResNet and VGG for images as small as CIFAR's: layers for which timm has no options are replaced after it has built them.

- ``resnet*_cifar``: a 3 x 3 convolution of stride 1 replaces the 7 x 7 stem of stride 2 and the max-pooling, as is usual on CIFAR
  (He et al. 2015, arXiv 1512.03385, section 4.2, for its smaller networks). 64 channels; the GNP reference has a stem of 16.
- ``vgg*_cifar``: the first linear layer reads the single pixel that remains of a 32-pixel image. timm's own would upsample that pixel
  to 7 x 7 and have 49 times the weights. Dropout 0.5 as in the paper (arXiv 1409.1556) and in the GNP reference.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gradreg.train.models.registration import images, ours, untrained

RESNETS = tuple(f"resnet{depth}_cifar" for depth in (18, 34, 50, 101, 152, 200))
VGGS = ("vgg16_cifar", "vgg16_bn_cifar", "vgg19_cifar", "vgg19_bn_cifar")

default_cfgs: dict[str, dict[str, Any]] = {name: images(3, 32) for name in (*RESNETS, *VGGS)}


def _resnet(of_timm: str, **options: Any) -> nn.Module:
    import timm
    from timm.models.resnet import ResNet

    model = timm.create_model(of_timm, **options)
    assert isinstance(model, ResNet)
    stem = nn.Conv2d(model.in_chans, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()
    return model


def _vgg(of_timm: str, *, drop_rate: float = 0.5, **options: Any) -> nn.Module:
    import timm
    from timm.models.vgg import VGG, ConvMlp

    smallest = 1 / 4096  # of timm's first linear layer, which is replaced
    model = timm.create_model(of_timm, drop_rate=drop_rate, mlp_ratio=smallest, **options)
    assert isinstance(model, VGG)
    model.pre_logits = ConvMlp(model.num_features, 4096, kernel_size=1, drop_rate=drop_rate)
    return model


def _entry(name: str, build: Any) -> None:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return untrained(name, build, pretrained, options, of_timm=name.removesuffix("_cifar"), num_classes=10)

    entry.__name__ = name
    entry.__doc__ = f"timm's {name.removesuffix('_cifar')} for small images."
    ours(entry)


for _name in RESNETS:
    _entry(_name, _resnet)
for _name in VGGS:
    _entry(_name, _vgg)
