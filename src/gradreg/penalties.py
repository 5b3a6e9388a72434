"""What is penalised, and how the penalty's gradient is estimated: one frozen specification that drives every engine.

A penalty on the gradient norm changes the gradient g of a loss L to g + strength · H·d, with H the Hessian and d the direction:

    =====  ======================  ==================  ===========
    power  penalty                 its gradient        direction d
    =====  ======================  ==================  ===========
    1      strength · ‖g‖          strength · H·ĝ      ĝ = g / ‖g‖
    2      (strength / 2) · ‖g‖²   strength · H·g      g
    =====  ======================  ==================  ===========

and the four ways to have H·d, with ``radius`` the step and c = strength / radius:

    ==========  =============================================================  ===========  ============
    difference  regularized gradient                                           evaluations  error in H·d
    ==========  =============================================================  ===========  ============
    forward     (1 − c)·g + c·∇L(θ + radius·d)                                 2            O(radius)
    backward    (1 + c)·g − c·∇L(θ − radius·d)                                 2            O(radius)
    central     g + (c / 2)·[∇L(θ + radius·d) − ∇L(θ − radius·d)]              3            O(radius²)
    exact       g + strength·H·d by autograd ("double backprop")               1 call, ≈ 3  0
    ==========  =============================================================  ===========  ============

One norm is taken over all regularized parameters together. The constructors (``sam``, ``gnp``, ``fgr``, ``bgr``, ``cgr``, ``exact``) speak
each paper's symbols.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, Literal, ParamSpec, cast, get_args

from gradreg import checks, schedules
from gradreg.schedules import Schedule, Value

Difference = Literal["forward", "backward", "central", "exact"]
Mixing = Literal["plain", "unit"]
WarmupKind = Literal["zero", "radius", "strength"]

_NO_PENALTY = "Use penalty=None to train without one."
_EVALUATIONS = {"forward": 2, "backward": 2, "central": 3, "exact": 3}


@dataclass(frozen=True, kw_only=True)
class GradientPenalty:
    """A gradient-norm penalty and the finite difference that estimates its gradient.

    ``g + strength · H·d`` as in this module's tables. Prefer the constructors (``sam``, ``gnp``, ``fgr``, ...); this is what they return.
    Immutable, hashable, picklable, compared by value.

    Args:
        power: 1 penalises ``strength·‖g‖``, 2 penalises ``(strength/2)·‖g‖²``.
        strength: λ (power 1) or γ (power 2), ≥ 0; a float or a ``Schedule`` of the optimizer step. Where it is 0 the gradient is the
            plain one and only one pass runs.
        radius: step of the finite difference, > 0 (a schedule may be 0 only where the strength is 0 too); for power 1 the L2 norm of the
            perturbation over all perturbed parameters, for power 2 the factor on g. ``None`` for ``difference="exact"``, and only there.
        difference: "forward", "backward", "central" or "exact".
        mixing: "plain" mixes (1 − c)·g with c·∇L(θ + radius·d). "unit" mixes (1 − c)·ĝ instead of (1 − c)·g, as the published GNP code
            does by default; power 1 with the forward difference only.

    Raises:
        ValueError, TypeError: at construction, naming the argument, the rule, the value received and the remedy.

    Cost in gradient evaluations per step: 2 (forward, backward), 3 (central; exact costs about as much), 1 where the strength is 0.

    >>> GradientPenalty(power=2, strength=0.5, radius=0.5, difference="forward") == fgr(gamma=0.5, epsilon=0.5)
    True
    """

    power: int
    strength: Value
    radius: Value | None
    difference: Difference = "forward"
    mixing: Mixing = "plain"

    def __post_init__(self) -> None:
        if isinstance(self.power, bool) or self.power not in (1, 2):
            raise ValueError(
                f"power must be 1 (penalise the norm) or 2 (half its square); got {checks.describe(self.power)}. "
                "Use sam() or gnp() for 1, fgr() for 2."
            )
        checks.choice("difference", self.difference, get_args(Difference))
        checks.choice("mixing", self.mixing, get_args(Mixing))
        object.__setattr__(self, "strength", _value("strength", self.strength, allow_zero=True))
        if self.difference == "exact":
            if self.radius is not None:
                raise ValueError(
                    f"radius must be None for difference='exact', which takes no finite step; got {self.radius}. "
                    "Leave it out, or choose 'forward', 'backward' or 'central'."
                )
        elif self.radius is None:
            raise ValueError(
                f"radius must be a number > 0 for difference={self.difference!r}; got None. Give a radius, or choose difference='exact'."
            )
        else:
            object.__setattr__(self, "radius", _value("radius", self.radius, allow_zero=isinstance(self.radius, Schedule)))
        if self.mixing == "unit" and (self.power, self.difference) != (1, "forward"):
            raise ValueError(
                f"mixing='unit' must go with power 1 and the forward difference; got power {self.power}, difference {self.difference!r}. "
                "Use gnp(..., mixing='unit'), or mixing='plain'."
            )

    def strength_at(self, step: int) -> float:
        """The strength at optimizer step ``step`` (≥ 0)."""
        return schedules.as_schedule(self.strength)(step)

    def radius_at(self, step: int) -> float | None:
        """The radius at optimizer step ``step`` (≥ 0); None for an exact penalty."""
        return None if self.radius is None else schedules.as_schedule(self.radius)(step)

    def coefficient_at(self, step: int) -> float | None:
        """c = strength / radius at ``step``, the weight of the second gradient; 0 where the strength is 0, None for an exact penalty.

        Raises:
            ValueError: if the schedules make the radius 0 at a step where the strength is not.
        """
        strength, radius = self.strength_at(step), self.radius_at(step)
        if radius is None:
            return None
        if strength == 0.0:
            return 0.0
        if radius == 0.0:
            raise ValueError(
                f"radius must be > 0 wherever the strength is; got radius 0 and strength {strength:g} at step {step}. "
                "Let both ramp together: penalty.warmup('radius', steps=...)."
            )
        return strength / radius

    def evaluations_at(self, step: int) -> int:
        """Gradient evaluations that ``step`` costs: 1 where the strength is 0, else 2 (forward, backward) or 3 (central, exact).

        "exact" calls the closure once; its double backward costs 9L − 5 matrix products on an MLP of L layers where a gradient costs
        3L − 1, and is therefore counted as 3 evaluations.
        """
        return 1 if self.strength_at(step) == 0.0 else _EVALUATIONS[self.difference]

    def warmup(self, kind: WarmupKind, *, steps: int) -> GradientPenalty:
        """The same penalty under a GR warm-up of ``steps`` optimizer steps (≥ 1); a new object.

        With s = min(1, step / steps): "radius" uses s·radius and s·strength, "strength" uses s·strength, "zero" uses no penalty, and no
        second pass, while step < steps. See ``gradreg.schedules.warmup``.

        Source: Zhao et al. 2024, arXiv 2406.09723.

        >>> late = sam(rho=0.1).warmup("zero", steps=10)
        >>> late.strength_at(9), late.strength_at(10), late.evaluations_at(9), late.evaluations_at(10)
        (0.0, 0.1, 1, 2)
        """
        strength, radius = schedules.warmup(kind, self.strength, self.radius, steps=steps)
        return replace(self, strength=strength, radius=radius)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of numbers and strings (for YAML and JSON), from which ``from_dict`` builds an equal penalty."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.to_dict() if isinstance(v, Schedule) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GradientPenalty:
        """The penalty that a dictionary describes, either by its fields or in a paper's own symbols.

        ``{"name": "gnp", "r": 0.1, "alpha": 0.8, "warmup": {"kind": "zero", "steps": 1000}}`` calls the constructor of that name; a
        dictionary without ``name`` holds the fields of ``GradientPenalty``, as ``to_dict`` returns them. Both may carry ``warmup``.

        Raises:
            ValueError: an unknown name or key (the nearest known one is named), or a bad value.
            TypeError: no mapping, a missing key, or a value of the wrong type.
        """
        if not isinstance(data, Mapping):  # type: ignore[unnecessary-isinstance]  # recipes are not type-checked
            raise TypeError(f"a penalty must be a mapping such as {{name: sam, rho: 0.05}}; got {checks.describe(data)}.")
        arguments = dict(data)
        name = arguments.pop("name", None)
        warmup = arguments.pop("warmup", None)
        for key, value in arguments.items():
            if isinstance(value, Mapping):
                arguments[key] = schedules.schedule_from_dict(cast("Mapping[str, Any]", value))
        if name is not None and not (isinstance(name, str) and name in CONSTRUCTORS):
            raise ValueError(checks.unknown("penalty", name, CONSTRUCTORS))
        build: Callable[..., GradientPenalty] = cls if name is None else CONSTRUCTORS[name]
        described = "a penalty without a name" if name is None else f"penalty {name!r}"
        _check_arguments(described, build, arguments, extra=("warmup", "name"))
        penalty = build(**arguments)
        if warmup is None:
            return penalty
        if not isinstance(warmup, Mapping):
            raise TypeError(f"warmup must be a mapping with the keys kind and steps; got {checks.describe(warmup)}.")
        keys = dict(cast("Mapping[str, Any]", warmup))
        _check_arguments("warmup", penalty.warmup, keys)
        return penalty.warmup(**keys)

    def __str__(self) -> str:
        if self.difference == "exact":
            symbol = "lambda" if self.power == 1 else "gamma"
            return f"exact(power {self.power}, {symbol} {_text(self.strength)})"
        if self.power == 2:
            name = {"forward": "F-GR", "backward": "B-GR", "central": "C-GR"}[self.difference]
            return f"{name}(gamma {_text(self.strength)}, epsilon {_text(self.radius)})"
        if self.difference != "forward":
            return f"gradient norm, {self.difference} difference(lambda {_text(self.strength)}, r {_text(self.radius)})"
        if self.strength == self.radius:
            return f"SAM(rho {_text(self.radius)})"
        unit = ", unit mixing" if self.mixing == "unit" else ""
        if isinstance(self.strength, float) and isinstance(self.radius, float):
            return f"GNP(r {self.radius:g}, alpha {self.strength / self.radius:g}{unit})"
        return f"GNP(r {_text(self.radius)}, lambda {_text(self.strength)}{unit})"


def _value(name: str, value: object, *, allow_zero: bool) -> Value:
    """``value`` as a checked float or schedule; the error speaks of ``name``, the symbol under which the caller knows it."""
    rule = ">= 0" if allow_zero else "> 0"
    if isinstance(value, Schedule):
        low, high = value.bounds()
        if low < 0 or high == 0 or (low == 0 and not allow_zero):
            raise ValueError(
                f"{name} must be {rule} at every step, and not 0 at all of them; got the schedule {value}, "
                f"which spans [{low:g}, {high:g}]. {_NO_PENALTY}"
            )
        return value
    if callable(value):
        raise TypeError(
            f"{name} must be a number or a gradreg Schedule; got {checks.describe(value)}. "
            "Compose it from gradreg.schedules, or derive a frozen dataclass from Schedule."
        )
    check = checks.non_negative if allow_zero else checks.positive
    return check(name, value, remedy=_NO_PENALTY)


def _text(value: Value | None) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else f"[{value}]"


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


@constructor
def sam(*, rho: Value = 0.05) -> GradientPenalty:
    """Sharpness-aware minimization: ``G = ∇L(θ + ρ·g/‖g‖)``.

    The forward difference of the penalty ρ‖g‖ with strength = radius = ρ, so that c = 1.

    Args:
        rho: perturbation radius ρ, the L2 norm over all perturbed parameters together, > 0; a float or a schedule. 0.05 is the authors'
            value for CIFAR-10 and ImageNet.

    Cost: 2 gradient evaluations.
    Source: Foret et al. 2021, arXiv 2010.01412, algorithm 1 (p = 2).
    Differs from the paper: a zero gradient is not perturbed, where theirs divides by zero.
    """
    radius = _value("rho", rho, allow_zero=isinstance(rho, Schedule))
    return GradientPenalty(power=1, strength=radius, radius=radius, difference="forward")


@constructor
def gnp(*, r: Value, alpha: float, mixing: Mixing = "plain") -> GradientPenalty:
    """Penalizing the gradient norm: ``G = (1 − α)·g + α·∇L(θ + r·g/‖g‖)``, the gradient of ``L + λ‖g‖`` with λ = α·r.

    Args:
        r: perturbation radius r, the L2 norm over all perturbed parameters together, > 0; a float or a schedule. 0.1 on CIFAR and 0.05 on
            ImageNet in the paper's recipes.
        alpha: balance coefficient α = λ / r, ≥ 0; 1 is SAM, 0 the plain gradient, more than 1 extrapolates. 0.8 in the paper's recipes.
        mixing: "plain" as the paper says; "unit" mixes (1 − α)·ĝ in place of (1 − α)·g, as the authors' code does by default.

    Cost: 2 gradient evaluations.
    Source: Zhao et al. 2022, arXiv 2202.03599, algorithm 1.
    Differs from the paper: a zero gradient is not perturbed.
    """
    radius = _value("r", r, allow_zero=isinstance(r, Schedule))
    balance = checks.non_negative("alpha", alpha, remedy=_NO_PENALTY)
    if isinstance(radius, Schedule) and balance == 0.0:
        return GradientPenalty(power=1, strength=0.0, radius=radius, difference="forward", mixing=mixing)
    strength = radius if balance == 1.0 else balance * radius
    return GradientPenalty(power=1, strength=strength, radius=radius, difference="forward", mixing=mixing)


@constructor
def fgr(*, gamma: Value, epsilon: Value) -> GradientPenalty:
    """Forward finite-difference gradient regularization: ``G = (1 − γ/ε)·g + (γ/ε)·∇L(θ + ε·g)``, of the penalty (γ/2)‖g‖².

    Args:
        gamma: strength γ, ≥ 0; a float or a schedule.
        epsilon: ascent step ε on the gradient as it is (not normalised), > 0; a float or a schedule. The paper finds large ε best, and
            γ = ε = 0.05 for an MLP and a ResNet on CIFAR-10.

    Cost: 2 gradient evaluations.
    Source: Karakida et al. 2023, arXiv 2210.02720, equation 3.
    """
    return _squared("forward", gamma, epsilon)


@constructor
def bgr(*, gamma: Value, epsilon: Value) -> GradientPenalty:
    """Backward finite-difference gradient regularization: ``G = (1 + γ/ε)·g − (γ/ε)·∇L(θ − ε·g)``, of the penalty (γ/2)‖g‖².

    Args:
        gamma: strength γ, ≥ 0; a float or a schedule.
        epsilon: descent step ε on the gradient as it is, > 0; a float or a schedule.

    Cost: 2 gradient evaluations.
    Source: Karakida et al. 2023, arXiv 2210.02720, section 3.
    """
    return _squared("backward", gamma, epsilon)


@constructor
def cgr(*, gamma: Value, epsilon: Value) -> GradientPenalty:
    """Central finite-difference gradient regularization: ``G = g + (γ/2ε)·[∇L(θ + ε·g) − ∇L(θ − ε·g)]``, of the penalty (γ/2)‖g‖².

    Args:
        gamma: strength γ, ≥ 0; a float or a schedule.
        epsilon: step ε on the gradient as it is, both ways, > 0; a float or a schedule.

    Cost: 3 gradient evaluations, for an error of O(ε²) where ``fgr`` has O(ε).
    Source: Karakida et al. 2023, arXiv 2210.02720, section 3.
    """
    return _squared("central", gamma, epsilon)


@constructor
def exact(*, gamma: Value, power: int = 2) -> GradientPenalty:
    """The penalty's gradient by double backpropagation: ``G = g + γ·H·g`` (power 2) or ``g + γ·H·g/‖g‖`` (power 1), no finite difference.

    Args:
        gamma: strength, γ of (γ/2)‖g‖² or λ of λ‖g‖, ≥ 0; a float or a schedule.
        power: 2 (the default) or 1.

    Cost: one closure call, about 3 gradient evaluations (9L − 5 matrix products against 3L − 1 on an MLP of L layers), and the memory of
    the backward graph. Needs every operation to be twice differentiable: fused attention kernels, some compiled models and
    ``DistributedDataParallel`` are not. There use ``fgr``, which needs neither.
    Source: Drucker and LeCun 1992 ("double backpropagation"); DB in Karakida et al. 2023, arXiv 2210.02720.
    """
    return GradientPenalty(power=power, strength=_value("gamma", gamma, allow_zero=True), radius=None, difference="exact")


def _squared(difference: Difference, gamma: Value, epsilon: Value) -> GradientPenalty:
    return GradientPenalty(
        power=2,
        strength=_value("gamma", gamma, allow_zero=True),
        radius=_value("epsilon", epsilon, allow_zero=isinstance(epsilon, Schedule)),
        difference=difference,
    )
