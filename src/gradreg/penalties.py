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

One norm is taken over all regularized parameters together. Relatives change one piece: the direction (``gradreg.directions``), which
coordinates are moved (``gradreg.masks``), how the gradients are mixed (``gradreg.mixing``), the number of ascent steps, or at which steps
the penalty acts (``every``, ``with_probability``, ``warmup``). The constructors (``gradreg.constructors``) speak each paper's symbols.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast, get_args, overload

from gradreg import checks, schedules
from gradreg.composition import check_composition
from gradreg.directions import Direction, Gradient
from gradreg.masks import Choice, Mask, OnlyNorms, Sparse
from gradreg.mixing import GradientMixing, Mixing, Reuse
from gradreg.naming import from_dict
from gradreg.schedules import Chance, Every, Schedule, Value

Difference = Literal["forward", "backward", "central", "exact"]
WarmupKind = Literal["zero", "radius", "strength"]

_GRADIENT = Gradient()
NO_PENALTY = "Use penalty=None to train without one."


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
            does by default; power 1, the forward difference and ``Gradient()`` only. Or a ``SurrogateGap``, ``Decoupled`` or ``Reuse``
            (``gradreg.mixing``).
        direction: what the place of the second gradient is moved along, a ``Direction`` (``gradreg.directions``); the gradient by default.
        mask: which coordinates are moved, a ``Mask`` (``gradreg.masks``); None for all.
        ascent_steps: S ≥ 1: the place is reached in S steps of ``radius / S``, each along the direction found where the last one ended, for
            S − 1 more evaluations. Forward difference and ``Gradient()`` only.

    Raises:
        ValueError, TypeError: at construction, naming the argument, the rule, the value received and the remedy; also for parts that
            have no meaning together.

    Cost in gradient evaluations per step: 2 (forward, backward), 3 (central; exact costs about as much), 1 where the strength is 0; see
    ``evaluations_at``.

    >>> from gradreg import fgr
    >>> GradientPenalty(power=2, strength=0.5, radius=0.5, difference="forward") == fgr(gamma=0.5, epsilon=0.5)
    True
    """

    power: int
    strength: Value
    radius: Value | None
    difference: Difference = "forward"
    mixing: Mixing = "plain"
    direction: Direction = _GRADIENT
    mask: Mask | None = None
    ascent_steps: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.power, bool) or self.power not in (1, 2):
            raise ValueError(
                f"power must be 1 (penalise the norm) or 2 (half its square); got {checks.describe(self.power)}. "
                "Use sam() or gnp() for 1, fgr() for 2."
            )
        checks.choice("difference", self.difference, get_args(Difference))
        if not isinstance(self.mixing, GradientMixing):
            checks.choice("mixing", self.mixing, ("plain", "unit"))
        _part("direction", self.direction, Direction, "Use gradreg.Adaptive(), say, or leave it out.")
        if self.mask is not None:
            _part("mask", self.mask, Mask, "Use gradreg.Sparse(sparsity=0.5), say, or None.")
        object.__setattr__(self, "ascent_steps", checks.whole("ascent_steps", self.ascent_steps, minimum=1))
        object.__setattr__(self, "strength", value_of("strength", self.strength, allow_zero=True))
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
            object.__setattr__(self, "radius", value_of("radius", self.radius, allow_zero=isinstance(self.radius, Schedule)))
        check_composition(self)

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

    @property
    def coefficient_is_one(self) -> bool:
        """Whether c = strength / radius is 1 at every step at which the strength is not 0, whatever the schedules."""
        return self.radius is not None and schedules.where_it_acts(self.strength) == schedules.as_schedule(self.radius)

    @property
    def has_memory(self) -> bool:
        """Whether a step depends on earlier ones, through the direction, the mask or the mixing."""
        return self.direction.has_memory or (self.mask is not None and self.mask.has_memory) or isinstance(self.mixing, Reuse)

    def reuses_at(self, step: int) -> bool:
        """Whether ``step`` reuses what an earlier one found (``Reuse``) and takes nothing but the plain gradient."""
        return isinstance(self.mixing, Reuse) and step % self.mixing.k != 0

    def needs_plain(self, coefficient: float) -> bool:
        """Whether the plain gradient is part of the result of a finite difference with c = ``coefficient``."""
        return self.mixing != "plain" or self.difference != "forward" or coefficient != 1.0

    def starts_unmoved_at(self, step: int) -> bool:
        """Whether the first pass of ``step`` is at the unmoved parameters: its loss, norm and batch statistics are plain training's."""
        if self.direction.needs_gradient or self.strength_at(step) == 0.0:
            return True
        return self.needs_plain(cast(float, self.coefficient_at(step)))

    @overload
    def evaluations_at(self, step: int, *, ascent_share: None = None) -> int: ...
    @overload
    def evaluations_at(self, step: int, *, ascent_share: float) -> float: ...
    def evaluations_at(self, step: int, *, ascent_share: float | None = None) -> float:
        """Gradient evaluations that ``step`` costs.

        1 where the strength is 0 and where ``Reuse`` reuses. Else one for each moved place (central: two), one for the plain gradient if
        it is part of the result (``needs_plain``), and one for each ascent step, the first of which shares the plain gradient.
        A direction that needs no gradient has no ascent step. Forward and backward so cost 2, central 3.

        "exact" calls the closure once; its double backward costs 9L − 5 matrix products on an MLP of L layers where a gradient costs
        3L − 1, and is therefore counted as 3 evaluations.

        Args:
            step: the optimizer step, ≥ 0.
            ascent_share: if the direction comes from a part of the batch, that part, > 0: an ascent step then costs this much, and shares
                nothing with the plain gradient.

        Returns:
            A whole number unless ``ascent_share`` is a fraction.

        >>> from gradreg import gnp, sam
        >>> sam().evaluations_at(0, ascent_share=0.25), gnp(r=0.1, alpha=0.8).evaluations_at(0, ascent_share=0.25)
        (1.25, 2.25)
        """
        if self.strength_at(step) == 0.0 or self.reuses_at(step):
            return 1
        if self.difference == "exact":
            return 3
        places = 2 if self.difference == "central" else 1
        plain = 1 if self.needs_plain(cast(float, self.coefficient_at(step))) else 0
        if not self.direction.needs_gradient:
            return places + plain
        if ascent_share is None:
            return places + self.ascent_steps
        return places + plain + ascent_share * self.ascent_steps

    def check_ascent(self, received: str) -> None:
        """Fail in words if the direction cannot come from closures of its own.

        Raises:
            ValueError: for an exact penalty, a mixing that needs the plain gradient first, and a direction that needs no gradient.
        """
        if self.difference == "exact":
            raise ValueError(f"ascent must be None for an exact penalty, which takes no finite step; got {received}. Use fgr() or gnp().")
        if self.mixing != "plain":
            raise ValueError(
                f"ascent must be None with mixing={str(self.mixing)!r}, which needs the plain gradient first; got {received}. "
                "Use mixing='plain'."
            )
        if not self.direction.needs_gradient:
            raise ValueError(
                f"ascent must be None for a direction that needs no gradient, {self.direction}; got {received}. "
                "Leave it out, or use direction=Gradient()."
            )

    def warmup(self, kind: WarmupKind, *, steps: int) -> GradientPenalty:
        """The same penalty under a GR warm-up of ``steps`` optimizer steps (≥ 1); a new object.

        With s = min(1, step / steps): "radius" uses s·radius and s·strength, "strength" uses s·strength, "zero" uses no penalty, and no
        second pass, while step < steps. See ``gradreg.schedules.warmup``.

        Source: Zhao et al. 2024, arXiv 2406.09723.

        >>> from gradreg import sam
        >>> late = sam(rho=0.1).warmup("zero", steps=10)
        >>> late.strength_at(9), late.strength_at(10), late.evaluations_at(9), late.evaluations_at(10)
        (0.0, 0.1, 1, 2)
        """
        strength, radius = schedules.warmup(kind, self.strength, self.radius, steps=steps)
        return replace(self, strength=strength, radius=radius)

    def every(self, k: int, *, compensate: bool = False) -> GradientPenalty:
        """The same penalty at steps that are multiples of ``k``, and none (one pass) between them; a new object.

        Args:
            k: optimizer steps, ≥ 1; 1 changes nothing.
            compensate: multiply the strength by k, so that it is the same on average.

        Cost: a k-th of the further evaluations. Memories take in the plain gradients between.

        >>> from gradreg import sam
        >>> seldom = sam(rho=0.1).every(5)
        >>> [seldom.evaluations_at(step) for step in range(6)]
        [2, 1, 1, 1, 1, 2]
        """
        k = checks.whole("k", k, minimum=1, remedy="Leave .every() out to have the penalty at every step.")
        checks.flag("compensate", compensate)
        return self._acting(Every(k=k, value=k if compensate else 1.0)) if k > 1 else self

    def with_probability(self, p: float, *, seed: int = 0, compensate: bool = False) -> GradientPenalty:
        """The same penalty at each step with probability ``p``, else none (one pass); a new object.

        Whether it acts at a step depends on the seed and the step alone; applied twice with one seed it draws the same twice.

        Args:
            p: probability, in (0, 1]; 1 changes nothing.
            seed: a whole number from 0 to 2³² − 1.
            compensate: multiply the strength by 1 / p, so that it is the same on average.

        Cost: on average a p-th of the further evaluations. Memories take in the plain gradients between.
        """
        p = checks.probability("p", p, remedy=NO_PENALTY)
        checks.flag("compensate", compensate)
        chance = Chance(p=p, seed=seed, value=1.0 / p if compensate else 1.0)
        return self._acting(chance) if p < 1.0 else self

    def _acting(self, gate: Schedule) -> GradientPenalty:
        return self if self.strength == 0.0 else replace(self, strength=schedules.as_schedule(self.strength) * gate)

    def only_norms(self) -> GradientPenalty:
        """The same penalty moving only normalization layers' parameters (SAM-ON); all are updated. See ``gradreg.masks.OnlyNorms``."""
        return replace(self, mask=OnlyNorms())

    def sparse(self, sparsity: float, *, choice: Choice = "fisher", every: int = 100, seed: int = 0) -> GradientPenalty:
        """The same penalty moving a share ``1 − sparsity`` of the coordinates (SSAM); all are updated. See ``gradreg.masks.Sparse``."""
        return replace(self, mask=Sparse(sparsity=sparsity, choice=choice, every=every, seed=seed))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of numbers, strings and dictionaries (for YAML and JSON), from which ``from_dict`` builds an equal penalty.

        The parts in which relatives differ are there where they are not the default.
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OMITTED or getattr(self, f.name) != f.default}
        return {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GradientPenalty:
        """The penalty that a dictionary describes, either by its fields or in a paper's own symbols.

        ``{"name": "gnp", "r": 0.1, "alpha": 0.8, "warmup": {"kind": "zero", "steps": 1000}}`` calls the constructor of that name; a
        dictionary without ``name`` holds the fields of ``GradientPenalty``, as ``to_dict`` returns them. Both may carry ``mask``, and,
        applied in this order, ``warmup`` (``{kind, steps}``), ``every`` (a whole number) and ``probability`` (a number, or ``{p, seed}``),
        the last two with ``compensate``.

        Raises:
            ValueError: an unknown name or key (the nearest known one is named), or a bad value.
            TypeError: no mapping, a missing key, or a value of the wrong type.
        """
        return from_dict(cls, data)

    def __str__(self) -> str:
        parts = [self._base_text()]
        if isinstance(self.mixing, GradientMixing):
            parts.append(str(self.mixing))
        if self.direction != _GRADIENT:
            parts.append(f"direction {self.direction}")
        if self.mask is not None:
            parts.append(str(self.mask))
        if self.ascent_steps > 1:
            parts.append(f"{self.ascent_steps} ascent steps")
        return ", ".join(parts)

    def _base_text(self) -> str:
        if self.difference == "exact":
            symbol = "lambda" if self.power == 1 else "gamma"
            return f"exact(power {self.power}, {symbol} {_text(self.strength)})"
        if self.power == 2:
            name = {"forward": "F-GR", "backward": "B-GR", "central": "C-GR"}[self.difference]
            return f"{name}(gamma {_text(self.strength)}, epsilon {_text(self.radius)})"
        if self.difference != "forward":
            return f"gradient norm, {self.difference} difference(lambda {_text(self.strength)}, r {_text(self.radius)})"
        if self.coefficient_is_one:
            return f"SAM(rho {_text(self.strength)})"
        unit = ", unit mixing" if self.mixing == "unit" else ""
        if isinstance(self.strength, float) and isinstance(self.radius, float):
            return f"GNP(r {self.radius:g}, alpha {self.strength / self.radius:g}{unit})"
        return f"GNP(r {_text(self.radius)}, lambda {_text(self.strength)}{unit})"


_OMITTED = ("direction", "mask", "ascent_steps")
"""The fields that a dictionary leaves out where they are the default."""


def _part(name: str, value: object, kind: type, remedy: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}; got {checks.describe(value)}. {remedy}")


def value_of(name: str, value: object, *, allow_zero: bool) -> Value:
    """``value`` as a checked float or schedule; the error speaks of ``name``, the symbol under which the caller knows it."""
    rule = ">= 0" if allow_zero else "> 0"
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


def _text(value: Value | None) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else f"[{value}]"
