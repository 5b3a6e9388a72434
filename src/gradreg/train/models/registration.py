"""The entries of our models in timm's registry, which build them untrained, and their image sizes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
Entry = TypeVar("Entry", bound=Callable[..., nn.Module])

ENTRIES: dict[str, Callable[..., nn.Module]] = {}
"""Name -> the function that builds the model, for those defined in this package."""


def ours(entry: Entry) -> Entry:
    """Register a model under the name of the function that builds it; its file gives its image size in ``default_cfgs``."""
    ENTRIES[entry.__name__] = entry
    return entry


def known(name: str) -> dict[str, Any]:
    """The ``default_cfgs`` of a model of ours, as for timm."""
    return vars(sys.modules[ENTRIES[name].__module__])["default_cfgs"][name]


@cache
def register_with_timm() -> None:
    """Register our models with timm: ``timm.create_model("wrn28_10")``."""
    from timm.models import register_model

    for entry in ENTRIES.values():
        register_model(entry)


def in_natural_order(names: list[str]) -> tuple[str, ...]:
    """``names`` as timm sorts them: resnet18 before resnet101."""
    return tuple(sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]))


def images(channels: int, size: int, *, fixed: bool = False) -> dict[str, Any]:
    """The ``default_cfgs`` entry of a model of ours.

    Args:
        channels: channels of the images by default.
        size: height and width in pixels by default.
        fixed: the size is one of the model's arguments (``img_size``); otherwise images of any size go through one and the same model.
    """
    return {"input_size": (channels, size, size), "num_classes": 10, "fixed_input_size": fixed}


def untrained(name: str, build: Callable[..., Model], pretrained: bool, options: Mapping[str, Any], **settings: Any) -> Model:
    """``build(**settings)`` with ``settings`` overridden by ``options``; timm's other arguments concern pretrained weights.

    Raises:
        ValueError: ``pretrained`` is true.
    """
    if pretrained:
        raise ValueError(f"pretrained must be False for {name!r}; got True. There are no published weights of it.")
    of_timm = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return build(**{**settings, **{k: v for k, v in options.items() if k not in of_timm}})
