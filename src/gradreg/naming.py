"""Penalties by name and from plain dictionaries, as recipes write them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from gradreg import checks, schedules
from gradreg.directions import direction_from_dict
from gradreg.masks import mask_from_dict
from gradreg.mixing import mixing_from_dict

if TYPE_CHECKING:
    from gradreg.penalties import GradientPenalty

_PARTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "direction": direction_from_dict,
    "mask": mask_from_dict,
    "mixing": mixing_from_dict,
}
"""How the fields that are no schedules are built from a dictionary."""

_DIALS = ("warmup", "every", "probability", "compensate")


def from_dict(cls: type[GradientPenalty], data: Mapping[str, Any]) -> GradientPenalty:
    """``GradientPenalty.from_dict``, which says what ``data`` may hold."""
    if not isinstance(data, Mapping):  # type: ignore[unnecessary-isinstance]  # recipes are not type-checked
        raise TypeError(f"a penalty must be a mapping such as {{name: sam, rho: 0.05}}; got {checks.describe(data)}.")
    arguments = dict(data)
    name = arguments.pop("name", None)
    dials = {key: arguments.pop(key) for key in _DIALS if key in arguments}
    for key, value in arguments.items():
        if isinstance(value, Mapping) or (isinstance(value, str) and key in ("direction", "mask")):  # which have no names alone
            arguments[key] = _PARTS.get(key, schedules.schedule_from_dict)(cast("Mapping[str, Any]", value))
    if name is not None and not (isinstance(name, str) and name in CONSTRUCTORS):
        raise ValueError(checks.unknown("penalty", name, CONSTRUCTORS))
    mask = arguments.pop("mask", None)
    build: Callable[..., GradientPenalty] = cls if name is None else CONSTRUCTORS[name]
    described = "a penalty without a name" if name is None else f"penalty {name!r}"
    _check_arguments(described, build, arguments, extra=("mask", *_DIALS, "name"))
    penalty = build(**arguments)
    return _with_dials(penalty if mask is None else replace(penalty, mask=mask), dials)


def _with_dials(penalty: GradientPenalty, dials: Mapping[str, Any]) -> GradientPenalty:
    """``penalty`` with the ``_DIALS`` of a dictionary applied."""
    if "compensate" in dials and not {"every", "probability"} & set(dials):
        raise ValueError(
            "compensate must go with every or probability, whose pauses it makes up for; got neither. Add one, or leave it out."
        )
    if dials.get("warmup") is not None:
        penalty = _call("warmup", penalty.warmup, dials["warmup"])
    compensate = dials.get("compensate", False)
    if "every" in dials:
        penalty = penalty.every(dials["every"], compensate=compensate)
    if "probability" in dials:
        chance = dials["probability"]
        keys = cast("Mapping[str, Any]", chance if isinstance(chance, Mapping) else {"p": chance})
        penalty = _call("probability", penalty.with_probability, {"compensate": compensate, **keys})
    return penalty


def _call(key: str, method: Callable[..., GradientPenalty], value: object) -> GradientPenalty:
    needed = " and ".join(inspect.signature(method).parameters)
    if not isinstance(value, Mapping):
        raise TypeError(f"{key} must be a mapping with the keys {needed}; got {checks.describe(value)}.")
    keys = dict(cast("Mapping[str, Any]", value))
    _check_arguments(key, method, keys)
    return method(**keys)


def _check_arguments(what: str, function: Callable[..., Any], arguments: Mapping[str, Any], *, extra: tuple[str, ...] = ()) -> None:
    """Fail in words if ``arguments`` lack what ``function`` needs or hold what it does not know."""
    parameters = inspect.signature(function).parameters
    for key in arguments:
        if key not in parameters:
            raise ValueError(checks.unknown(f"key of {what}:", key, [*parameters, *extra]))
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        example = ", ".join(f"{n}=..." for n in parameters if n in missing or n in arguments)
        got = ", ".join(f"{k}={v!r}" for k, v in arguments.items()) or "nothing"
        raise TypeError(f"{what} needs {' and '.join(missing)}; got only {got}. Write {example}.")


CONSTRUCTORS: dict[str, Callable[..., GradientPenalty]] = {}
"""The constructors by the name that recipes use."""

P = ParamSpec("P")


def constructor(build: Callable[P, GradientPenalty]) -> Callable[P, GradientPenalty]:
    """Register a constructor under its name for recipes, and give it errors in words for forgotten or unknown arguments."""
    name = build.__name__

    @wraps(build)
    def checked(*args: P.args, **kwargs: P.kwargs) -> GradientPenalty:
        if args:
            symbols = ", ".join(f"{n}=..." for n in inspect.signature(build).parameters)
            raise TypeError(f"{name} takes its symbols by name; got {len(args)} without. Write {name}({symbols}).")
        _check_arguments(name, build, kwargs)
        return build(*args, **kwargs)

    CONSTRUCTORS[name] = checked
    return checked
