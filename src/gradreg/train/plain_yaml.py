"""YAML as recipes and command lines are written in it."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everybody but YAML 1.1 expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$", re.IGNORECASE),
    list("-+0123456789."),
)


def read(what: str, text: str) -> Any:
    """What ``text`` holds.

    Args:
        what: what an error calls the text.
        text: YAML.

    Raises:
        ValueError: the text is no YAML, or holds a date that does not exist.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{what} must be valid YAML; got this from the parser: {error}") from error
