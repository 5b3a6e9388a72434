"""Names that have changed: the old one still works for a release, and says what to write."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any


def deprecated(module: str, name: str, renamed: Mapping[str, Any]) -> Any:
    """What ``name`` stands for, with a ``DeprecationWarning``; for a module's ``__getattr__``.

    Args:
        module: the module that is asked.
        name: the name asked for.
        renamed: old names, and the objects that stand under new ones.

    Raises:
        AttributeError: ``name`` is no old name either.
    """
    if name not in renamed:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = renamed[name]
    warnings.warn(f"{module}.{name} is now {module}.{new.__name__}; the old name goes in 0.2.", DeprecationWarning, stacklevel=3)
    return new
