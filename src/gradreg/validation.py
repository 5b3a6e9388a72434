"""What a penalty must satisfy when it is built: no argument forgotten or misspelt, numbers in range, and parts that can be combined."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from gradreg import checks
from gradreg.auto_radius import SelfSetRadius, self_set_radius_in
from gradreg.directions import Direction
from gradreg.masks import Mask
from gradreg.mixing import GradientMixing, Reuse
from gradreg.plan import Difference
from gradreg.schedules import Schedule, Traced, Value, is_jax_scalar

NO_PENALTY = "Use penalty=None to train without one."


class Composition(Protocol):
    """What is looked at of a penalty."""

    @property
    def power(self) -> int: ...
    @property
    def strength(self) -> Value: ...
    @property
    def radius(self) -> Value | None: ...
    @property
    def difference(self) -> Difference: ...
    @property
    def direction(self) -> Direction: ...
    @property
    def mixing(self) -> GradientMixing: ...
    @property
    def mask(self) -> Mask | None: ...
    @property
    def ascent_steps(self) -> int: ...
    @property
    def reuse(self) -> Reuse | None: ...
    @property
    def decoupled(self) -> bool: ...
    @property
    def keeps_plain_apart(self) -> bool: ...
    def combined_by(self) -> str: ...


def check_composition(penalty: Composition) -> None:
    """Raise where parts of ``penalty`` cannot be combined, by what the parts declare."""
    _check_self_set_radius(penalty)
    direction, mask, mixing = penalty.direction, penalty.mask, penalty.mixing
    if mixing.plain_gradient == "normalized" and not (direction.is_gradient and (penalty.power, penalty.difference) == (1, "forward")):
        raise ValueError(
            f"mixing={str(mixing)!r} must go with power 1, the forward difference and the gradient itself as direction; got "
            f"power {penalty.power}, difference {penalty.difference!r}, direction {direction}. "
            "Use gnp(..., mixing='unit'), or mixing='plain'."
        )
    if penalty.difference not in (*mixing.differences, "exact"):
        raise ValueError(
            f"mixing={str(mixing)!r} must go with the difference {' or '.join(mixing.differences)}; got {penalty.difference!r}. Use one of "
            "them, or mixing='plain'."
        )
    if mixing.plain_gradient != "summed" and (penalty.reuse is not None or penalty.decoupled):
        raise ValueError(
            f"mixing={str(mixing)!r} must stand alone; got it with {penalty.combined_by()}. Use mixing='plain', or leave the other out."
        )
    if penalty.reuse is not None and penalty.decoupled:
        raise ValueError(
            f"decoupled must be False with {penalty.reuse}, which adds to the plain gradient; got True. Leave one of them out."
        )
    chosen_by_gradient = mask is not None and mask.level == "coordinates"
    if penalty.difference == "exact" and (
        not direction.is_gradient or penalty.keeps_plain_apart or mixing.plain_gradient != "summed" or chosen_by_gradient
    ):
        raise ValueError(
            "difference='exact' must go with the gradient itself as direction, mixing='plain' and no Sparse mask; got "
            f"direction {direction}, {penalty.combined_by()}, mask {mask}. Use difference='central'."
        )
    if penalty.ascent_steps > 1 and not (direction.is_gradient and penalty.difference == "forward"):
        raise ValueError(
            f"ascent_steps must be 1 unless the difference is forward and the direction the gradient; got {penalty.ascent_steps} with "
            f"difference {penalty.difference!r}, direction {direction}. Use sam(rho=..., steps=...) or fgr(..., steps=...)."
        )
    if penalty.power not in direction.powers:
        why = "because it has no length of its own" if direction.powers == (1,) else "because it sets its own length"
        raise ValueError(
            f"direction={direction} must go with power {direction.powers[0]}, {why}; got power "
            f"{penalty.power}. Use {'random_sam(rho=...)' if direction.powers == (1,) else 'le_sam(sigma=...) or unified_sam(rho=...)'}."
        )
    if not direction.needs_gradient and penalty.reuse is not None:
        raise ValueError(
            f"{penalty.reuse} must go with a direction that needs a gradient, because it saves passes of that; got direction "
            f"{direction}. Use looksam(rho=..., k=..., a=...)."
        )
    if direction.perturbs_adapted_layers and mask is not None:
        raise ValueError(
            f"mask must be left out with direction {direction}, which perturbs no parameters; got {mask}. Choose layers by the names of "
            "their weights: parameters=lambda name, p: ... of the regularizer."
        )
    if not direction.needs_gradient and mask is not None and mask.needs_gradient:
        raise ValueError(
            f"mask={mask} must go with a direction that needs a gradient, from which it is chosen; got direction "
            f"{direction}. Use Sparse(..., choice='random')."
        )


def _check_self_set_radius(penalty: Composition) -> None:
    """Raise where a radius that sets itself has no meaning."""
    auto, followed = self_set_radius_in(penalty.radius), self_set_radius_in(penalty.strength)
    name = type(auto or followed).__name__
    if followed is not None and followed != auto:
        raise ValueError(
            f"strength must follow the radius where it is {name}; got strength {followed} and radius {penalty.radius}. "
            f"Use one {name} for both, as fgr(epsilon={name}()) does."
        )
    if auto is None:
        return
    if not isinstance(penalty.radius, SelfSetRadius):
        raise ValueError(
            f"radius must not be a multiple of {name}, which would make up for any factor; got {penalty.radius}. "
            f"Use warm-up 'zero' or 'strength', and {name}(start=...) to begin with another radius."
        )
    if not penalty.direction.needs_gradient:
        raise ValueError(
            f"radius must be a number or a schedule for a direction that needs no gradient, because {name} compares the gradient at the "
            f"perturbed parameters with that at the unperturbed ones; got {auto} with direction {penalty.direction}. "
            f"Use sam(rho={name}()), or a number."
        )
    proportional = followed is not None and penalty.mixing.tends_to_plain and penalty.direction.scales_with_radius
    if auto.takes_difference and not proportional:
        raise ValueError(
            f"radius must be a number or a schedule where the regularized gradient does not tend to the plain one with it, because {name} "
            f"takes their difference, over the radius, for the derivative; got {auto} with strength {penalty.strength}, mixing "
            f"{penalty.mixing} and direction {penalty.direction}. Use sam(rho={name}()), gnp(r={name}(), alpha=...) or "
            f"fgr(epsilon={name}())."
        )


def check_part(name: str, value: object, kind: type, remedy: str) -> None:
    """Raise a ``TypeError`` unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}; got {checks.describe(value)}. {remedy}")


def value_of(name: str, value: object, *, allow_zero: bool) -> Value:
    """``value`` as a checked float or schedule; errors call it ``name``, the symbol that the caller used."""
    rule = ">= 0" if allow_zero else "> 0"
    if is_jax_scalar(value):
        if getattr(value, "dtype", None) in ("bool", "complex64", "complex128"):
            raise TypeError(f"{name} must be a real number; got {checks.describe(value)}. Convert it before the penalty is built.")
        return Traced(value)
    if isinstance(value, Traced):
        return value
    if isinstance(value, Schedule):
        low, high = value.bounds()
        if low < 0 or high == 0 or (low == 0 and not allow_zero):
            raise ValueError(
                f"{name} must be {rule} at every step, and not 0 at all of them; got the schedule {value}, "
                f"which spans [{low:g}, {high:g}]. {NO_PENALTY}"
            )
        return value
    if callable(value):
        raise TypeError(
            f"{name} must be a number or a gradreg Schedule; got {checks.describe(value)}. "
            "Compose it from gradreg.schedules, or derive a frozen dataclass from Schedule."
        )
    check = checks.non_negative if allow_zero else checks.positive
    return check(name, value, remedy=NO_PENALTY)


def check_arguments(what: str, function: Callable[..., Any], given: Mapping[str, Any], *, extra: tuple[str, ...] = ()) -> None:
    """Raise if the keyword arguments ``given`` lack one that ``function`` needs or contain one that it does not know.

    Args:
        what: the name of the function in errors.
        function: the function.
        given: the keyword arguments.
        extra: further known keys, for the error.

    Raises:
        ValueError: an unknown argument; the nearest known one is named.
        TypeError: a missing one.
    """
    parameters = inspect.signature(function).parameters
    for key in given:
        if key not in parameters:
            raise ValueError(checks.unknown(f"key of {what}:", key, [*parameters, *extra]))
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
    if missing:
        example = ", ".join(f"{n}=..." for n in parameters if n in missing or n in given)
        got = ", ".join(f"{k}={v!r}" for k, v in given.items()) or "nothing"
        raise TypeError(f"{what} needs {' and '.join(missing)}; got only {got}. Write {example}.")
