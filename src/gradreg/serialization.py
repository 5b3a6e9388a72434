"""Parts of a specification as plain dictionaries (for YAML and JSON) and back: the name of the kind, and the fields of its dataclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar, cast

from gradreg import checks

T = TypeVar("T")
P = TypeVar("P", bound="Part")


class Part:
    """A piece of a penalty: a direction, a mixing, a mask. Immutable, compared by value.

    A kind of part is a class derived from ``Part`` with a ``tag``; each part of that kind is a frozen dataclass derived from the kind, with
    the ``name`` under which dictionaries know it::

        class Direction(Part, tag="direction"): ...

        @dataclass(frozen=True, kw_only=True)
        class Gradient(Direction, name="gradient"): ...
    """

    tag: ClassVar[str]
    """What a part of this kind is called in a dictionary and in errors."""

    kinds: ClassVar[dict[str, type[Any]]]
    """The named parts of this kind."""

    def __init_subclass__(cls, *, tag: str | None = None, name: str | None = None) -> None:
        super().__init_subclass__()
        if tag is not None:
            cls.tag, cls.kinds = tag, {}
        if name is None:
            return
        other = cls.kinds.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"name must be one that no other {cls.tag} has; got {name!r}, which is {other.__module__}.{other.__qualname__}. "
                "Choose another name."
            )
        cls.kinds[name] = cls  # a class that is defined again, as in a notebook, replaces itself

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary from which ``from_dict`` of this kind builds an equal part."""
        return to_plain(self, self.tag, self.kinds)

    @classmethod
    def from_dict(cls: type[P], data: Mapping[str, Any] | str) -> P:
        """The part that ``to_dict`` described; a part without arguments by its name alone: ``{"direction": "friendly", "sigma": 1.0}``.

        Raises:
            ValueError, TypeError: as ``from_plain``.
        """
        return from_plain({cls.tag: data} if isinstance(data, str) else data, cls.tag, cls.kinds)


def to_plain(part: Any, tag: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """``{tag: kind, field: value, ...}``; a field that is itself a part is converted by its own ``to_dict``."""
    kind = next((name for name, cls in kinds.items() if cls is type(part)), None)
    if kind is None:
        raise TypeError(
            f"{type(part).__name__} has no name in a dictionary; got {checks.describe(part)}. "
            f"Compose it from gradreg.{tag}s, give its class one (class {type(part).__name__}(..., name='...')), or keep it out of recipes."
        )
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    return {tag: kind, **{name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}}


def from_plain(data: Mapping[str, Any], tag: str, kinds: Mapping[str, type[T]], nested: Callable[[Any], Any] | None = None) -> T:
    """The part that ``to_plain`` described; ``nested`` builds the fields that are mappings.

    Raises:
        ValueError: an unknown kind or key (the nearest known one is named), or a bad value.
        TypeError: not a mapping, a missing key, or a value of the wrong type.
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
