"""Models by name through ``timm.create_model``: everything that timm has, and what it lacks, registered from the files here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from gradreg import checks
from gradreg.train.models import mlp as mlp  # each registers its models with timm
from gradreg.train.models import plain_cnn as plain_cnn
from gradreg.train.models import pyramidnet as pyramidnet
from gradreg.train.models import shake_shake as shake_shake
from gradreg.train.models import small_convnets as small_convnets
from gradreg.train.models import small_transformers as small_transformers
from gradreg.train.models import wide_resnet as wide_resnet

OURS = tuple(name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(f"{__name__}."))
"""The names that the files here have registered."""


def create(options: Mapping[str, Any], *, classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The model of ``options["name"]`` for images of (channels, height, width) and ``classes`` outputs.

    A model that is built for one size of images (``img_size``: transformers, fully connected networks) is built for that of
    ``image_shape``, unless ``options`` say otherwise.

    Args:
        options: "name" and the model's own options.
        classes: outputs.
        image_shape: (channels, height, width) of the images.

    Raises:
        ValueError: an unknown model or option; for a model the nearest known one is named.
    """
    name = options["name"]
    if not timm.is_model(name):
        raise ValueError(checks.unknown("model", name, [*OURS, *timm.list_models()]))
    arguments = {k: v for k, v in options.items() if k != "name"}
    channels, height, width = image_shape
    known = timm.get_pretrained_cfg(name)
    if known is not None and known.fixed_input_size and known.input_size[1:] != (height, width):
        arguments.setdefault("img_size", height if height == width else (height, width))
    try:
        return timm.create_model(name, num_classes=classes, in_chans=channels, **arguments)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model {name!r} refuses its options {arguments or 'none'}: {error}") from error
