"""Penalties by name and from plain dictionaries, as recipes write them; and whether an engine knows the parts of a penalty."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from gradreg import checks, schedules
from gradreg.auto_radius import AutoRadius, SelfSetRadius
from gradreg.directions import Direction
from gradreg.lets import LETS
from gradreg.masks import Mask
from gradreg.mixing import GradientMixing, Reuse
from gradreg.serialization import Part
from gradreg.validation import check_arguments

T = TypeVar("T")
P = ParamSpec("P")

CONSTRUCTORS: dict[str, Callable[..., Any]] = {}
"""The constructors by the name that recipes use."""

_SELF_SET: dict[str, type[SelfSetRadius]] = {"auto": AutoRadius, "lets": LETS}
"""What may stand in the place of a radius by its name alone."""

_MODIFIERS = ("warmup", "tail", "every", "probability", "compensate")


def constructor(build: Callable[P, T]) -> Callable[P, T]:
    """Register a constructor under its name for recipes, with errors that name missing and unknown arguments."""
    name = build.__name__

    @wraps(build)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if args:
            symbols = ", ".join(f"{n}=..." for n in inspect.signature(build).parameters)
            raise TypeError(f"{name} takes its symbols by name; got {len(args)} without. Write {name}({symbols}).")
        check_arguments(name, build, kwargs)
        return build(*args, **kwargs)

    CONSTRUCTORS[name] = checked
    return checked


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """``GradientPenalty.from_dict``, which says what ``data`` may hold."""
    if not isinstance(data, Mapping):  # type: ignore[unnecessary-isinstance]  # recipes are not type-checked
        raise TypeError(f"a penalty must be a mapping such as {{name: sam, rho: 0.05}}; got {checks.describe(data)}.")
    arguments = dict(data)
    name = arguments.pop("name", None)
    modifiers = {key: arguments.pop(key) for key in _MODIFIERS if key in arguments}
    arguments = {key: _built(key, value) for key, value in arguments.items()}
    if name is not None and not (isinstance(name, str) and name in CONSTRUCTORS):
        raise ValueError(checks.unknown("penalty", name, CONSTRUCTORS))
    mask = arguments.pop("mask", None)
    build: Callable[..., Any] = cls if name is None else CONSTRUCTORS[name]
    described = "a penalty without a name" if name is None else f"penalty {name!r}"
    check_arguments(described, build, arguments, extra=("mask", *_MODIFIERS, "name"))
    penalty: Any = build(**arguments)
    return _modified(penalty if mask is None else replace(penalty, mask=mask), modifiers)


def _built(key: str, value: Any) -> Any:
    """The value of a penalty's argument, from a dictionary if it is one."""
    if key in ("direction", "mask", "mixing") and isinstance(value, (str, Mapping)):
        part: type[Direction | Mask | GradientMixing] = {"direction": Direction, "mask": Mask, "mixing": GradientMixing}[key]
        return part.from_dict(cast("Mapping[str, Any]", value))
    if isinstance(value, str) and value in _SELF_SET:
        return _SELF_SET[value]()
    if not isinstance(value, Mapping):
        return value
    mapping = cast("Mapping[str, Any]", value)
    if key == "reuse":
        check_arguments("reuse", Reuse, mapping)
        return Reuse(**mapping)
    return schedules.schedule_from_dict(mapping)


def _modified(penalty: Any, modifiers: Mapping[str, Any]) -> Any:
    """``penalty`` with the ``_MODIFIERS`` of a dictionary applied."""
    if "compensate" in modifiers and not {"every", "probability"} & set(modifiers):
        raise ValueError(
            "compensate must go with every or probability, whose pauses it makes up for; got neither. Add one, or leave it out."
        )
    if modifiers.get("warmup") is not None:
        penalty = _call("warmup", penalty.warmup, modifiers["warmup"])
    if modifiers.get("tail") is not None:
        tail = modifiers["tail"]
        penalty = _call("tail", penalty.tail, cast("Mapping[str, Any]", tail if isinstance(tail, Mapping) else {"share": tail}))
    compensate = modifiers.get("compensate", False)
    if "every" in modifiers:
        penalty = penalty.every(modifiers["every"], compensate=compensate)
    if "probability" in modifiers:
        chance = modifiers["probability"]
        keys = cast("Mapping[str, Any]", chance if isinstance(chance, Mapping) else {"p": chance})
        penalty = _call("probability", penalty.with_probability, {"compensate": compensate, **keys})
    return penalty


def _call(key: str, method: Callable[..., Any], value: object) -> Any:
    needed = " and ".join(inspect.signature(method).parameters)
    if not isinstance(value, Mapping):
        raise TypeError(f"{key} must be a mapping with the keys {needed}; got {checks.describe(value)}.")
    keys = dict(cast("Mapping[str, Any]", value))
    check_arguments(key, method, keys)
    return method(**keys)


def check_known(part: Part, function: Any, *, engine: str) -> None:
    """Raise unless ``function``, an engine's ``functools.singledispatch`` over parts, has an entry for exactly the type of ``part``.

    ``singledispatch`` alone would pass a subclass to the function of its base class, and so train with a part other than the one requested.

    Raises:
        TypeError: naming the part, the engine and the function to register.
    """
    if type(part) not in function.registry:
        name = f"{function.__module__}.{function.__name__}"
        raise TypeError(
            f"{part.tag} must be one that the {engine} engine knows; got {checks.describe(part)}. "
            f"Register a function for it: @{name}.register, then def _({part.tag}: {type(part).__name__}, ...)."
        )
