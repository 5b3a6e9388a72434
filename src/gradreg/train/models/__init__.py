"""Models by name through ``timm.create_model``: everything that timm has, and the few here that it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from gradreg import checks
from gradreg.train.models import mlp as mlp  # registers it with timm

OURS = ("mlp",)


def create(options: Mapping[str, Any], *, classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The model of ``options["name"]`` for images of (channels, height, width) and ``classes`` outputs.

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
    channels, height, _ = image_shape
    if name in OURS:
        arguments.setdefault("img_size", height)
    try:
        return timm.create_model(name, num_classes=classes, in_chans=channels, **arguments)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model {name!r} refuses its options {arguments or 'none'}: {error}") from error
