"""What every model of ours gives to timm's registry: an entry that builds it untrained, and the size of its images."""

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
"""Name -> what builds the model, of those that the files of this package define."""


def ours(entry: Entry) -> Entry:
    """Name a model after the function that builds it; its file says under ``default_cfgs`` what images it takes."""
    ENTRIES[entry.__name__] = entry
    return entry


def known(name: str) -> dict[str, Any]:
    """What timm knows of a model of ours: its file's ``default_cfgs``."""
    return vars(sys.modules[ENTRIES[name].__module__])["default_cfgs"][name]


@cache
def register_with_timm() -> None:
    """Have timm know our models: ``timm.create_model("wrn28_10")``."""
    from timm.models import register_model

    for entry in ENTRIES.values():
        register_model(entry)


def in_natural_order(names: list[str]) -> tuple[str, ...]:
    """``names`` as timm sorts them: resnet18 before resnet101."""
    return tuple(sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]))


def images(channels: int, size: int, *, fixed: bool = False) -> dict[str, Any]:
    """What timm knows of a model of ours before it is built.

    Args:
        channels: channels of the images by default.
        size: height and width in pixels by default.
        fixed: the size is one of the model's arguments (``img_size``); otherwise images of any size go through one and the same model.
    """
    return {"input_size": (channels, size, size), "num_classes": 10, "fixed_input_size": fixed}


def untrained(name: str, build: Callable[..., Model], pretrained: bool, options: Mapping[str, Any], **settings: Any) -> Model:
    """``build(**settings)`` with ``options`` laid over ``settings``; what else timm passes along is meant for pretrained weights.

    Raises:
        ValueError: ``pretrained`` is true.
    """
    if pretrained:
        raise ValueError(f"pretrained must be False for {name!r}; got True. There are no published weights of it.")
    of_timm = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return build(**{**settings, **{k: v for k, v in options.items() if k not in of_timm}})
