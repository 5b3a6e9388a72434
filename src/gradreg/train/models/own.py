"""Models of one's own: a function or class in a file, named in a recipe as ``mine:build``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradreg import checks, own_code
from gradreg.own_code import Code

_SUPPLIED = ("num_classes", "in_chans", "img_size")
"""Options that are known from the data, and given to functions that have parameters of these names, as timm's have."""


def check(options: Mapping[str, Any], code: Code | None) -> None:
    """Import the function that ``options["name"]`` names, and check the other options.

    Raises:
        ValueError, TypeError: no such function, or options that do not fit it.
    """
    name, arguments = options["name"], {key: value for key, value in options.items() if key != "name"}
    function = own_code.load(name, code, key="model.name")
    own_code.check_call(function, name, key="model", options=arguments, supplied=_SUPPLIED, reserved=("name",))


def create(options: Mapping[str, Any], code: Code | None, *, classes: int | None, image_shape: tuple[int, int, int] | None) -> Any:
    """The model. What the data say is given to parameters of timm's names, unless ``options`` do.

    Raises:
        ValueError, TypeError: as ``check``; or something that is no ``torch.nn.Module``.
    """
    from torch import nn

    check(options, code)
    name = options["name"]
    function = own_code.load(name, code, key="model.name")
    known: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if image_shape is not None:
        channels, height, width = image_shape
        known |= {"in_chans": channels, "img_size": height if height == width else (height, width)}
    known = {key: value for key, value in known.items() if own_code.accepts(function, key)}
    try:
        model = function(**{**known, **{key: value for key, value in options.items() if key != "name"}})
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # the call itself, not something inside
            raise ValueError(
                f"model {name!r} must be callable with its options: {error}. The data do not say it: write it in the recipe."
            ) from error
        raise
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r} must return a torch.nn.Module; got {checks.describe(model)}.")
    return model
