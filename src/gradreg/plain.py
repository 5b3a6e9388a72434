"""Parts of a specification as plain dictionaries and back: a tag that names the kind, and the fields of its frozen dataclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from gradreg import checks

T = TypeVar("T")


def to_plain(part: Any, tag: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """``{tag: kind, field: value, ...}``; a field that is itself a part describes itself by its own ``to_dict``."""
    kind = next((name for name, cls in kinds.items() if cls is type(part)), None)
    if kind is None:
        raise TypeError(
            f"{type(part).__name__} has no name in a dictionary; got {checks.describe(part)}. "
            f"Compose it from gradreg.{tag}s, or keep it in code and out of recipes."
        )
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    return {tag: kind, **{name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}}


def from_plain(data: Mapping[str, Any], tag: str, kinds: Mapping[str, type[T]], nested: Callable[[Any], Any] | None = None) -> T:
    """The part that ``to_plain`` described; ``nested`` builds the fields that are mappings.

    Raises:
        ValueError: an unknown kind or key (the nearest known one is named), or a bad value.
        TypeError: no mapping, a missing key, or a value of the wrong type.
    """
    if not isinstance(cast(object, data), Mapping) or tag not in data:
        raise TypeError(f"a {tag} must be a mapping with the key {tag!r}, one of {', '.join(kinds)}; got {checks.describe(data)}.")
    kind = data[tag]
    cls = kinds.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ValueError(checks.unknown(tag, kind, kinds))
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # every named kind is a dataclass
    arguments = {key: value for key, value in data.items() if key != tag}
    for key, value in arguments.items():
        if key not in known:
            raise ValueError(checks.unknown(f"key of {tag} {kind!r}:", key, known))
        if nested is not None and isinstance(value, Mapping):
            arguments[key] = nested(value)
    try:
        return cls(**arguments)
    except TypeError as error:
        if "missing" not in str(error):
            raise
        raise TypeError(f"{tag} {kind!r} needs {', '.join(known)}; got only {', '.join(arguments) or 'nothing'}.") from None
