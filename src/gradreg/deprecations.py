"""Renamed names: the old one still works for one release, with a warning that names the new one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any


def deprecated(module: str, name: str, renamed: Mapping[str, Any]) -> Any:
    """The object that ``name`` refers to, with a ``DeprecationWarning``; for a module's ``__getattr__``.

    Args:
        module: the module that is asked.
        name: the name asked for.
        renamed: old names, and the objects that now have new names.

    Raises:
        AttributeError: ``name`` is not an old name either.
    """
    if name not in renamed:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = renamed[name]
    warnings.warn(f"{module}.{name} is now {module}.{new.__name__}; the old name goes in 0.2.", DeprecationWarning, stacklevel=3)
    return new
