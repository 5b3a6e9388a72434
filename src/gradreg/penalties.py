"""What is penalized, and how the penalty's gradient is estimated: one frozen specification that drives every engine.

A penalty on the gradient norm changes the gradient g of a loss L to g + strength · H·d, with H the Hessian and d the direction:

    =====  ======================  ==================  ===========
    power  penalty                 its gradient        direction d
    =====  ======================  ==================  ===========
    1      strength · ‖g‖          strength · H·ĝ      ĝ = g / ‖g‖
    2      (strength / 2) · ‖g‖²   strength · H·g      g
    =====  ======================  ==================  ===========

and the four ways to compute H·d, with ``radius`` the step and c = strength / radius:

    ==========  =============================================================  ===========  ============
    difference  regularized gradient                                           evaluations  error in H·d
    ==========  =============================================================  ===========  ============
    forward     (1 − c)·g + c·∇L(θ + radius·d)                                 2            O(radius)
    backward    (1 + c)·g − c·∇L(θ − radius·d)                                 2            O(radius)
    central     g + (c / 2)·[∇L(θ + radius·d) − ∇L(θ − radius·d)]              3            O(radius²)
    exact       g + strength·H·d by autograd ("double backprop")               1 call, ≈ 3  0
    ==========  =============================================================  ===========  ============

One norm is taken over all regularized parameters together. Relatives change one piece: the direction (``gradreg.directions``), which
coordinates are perturbed (``gradreg.masks``), how the gradients are mixed (``gradreg.mixing``), the number of ascent steps, or at which
steps the penalty acts (``every``, ``with_probability``, ``warmup``). The constructors (``gradreg.constructors``) use each paper's
symbols. ``GradientPenalty.at`` gives the numbers of one step, and ``GradientPenalty.plan`` the passes that both engines then run.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args, overload

from gradreg import checks, gates, plan, registry, schedules, validation
from gradreg.auto_radius import AutoRadius, Guards, SelfSetRadius, self_set_radius_in, with_radius
from gradreg.directions import Direction, Gradient
from gradreg.gates import Chance, Every
from gradreg.lets import LETS
from gradreg.masks import Choice, Mask, OnlyNorms, Sparse
from gradreg.mixing import GradientMixing, Plain, Reuse
from gradreg.plan import Difference, Plan, StepValues
from gradreg.schedules import PYTHON, Operations, Schedule, Value

WarmupKind = Literal["zero", "radius", "strength"]

_GRADIENT = Gradient()

_known_difference = lru_cache(maxsize=64)(plan.finite_difference)
"""The plan for a coefficient that is a number, which is the same at most steps."""
_PLAIN = Plain()


@dataclass(frozen=True, kw_only=True)
class GradientPenalty:
    """A gradient-norm penalty and the finite difference that estimates its gradient.

    ``g + strength · H·d`` as in this module's tables. Prefer the constructors (``sam``, ``gnp``, ``fgr``, ...), which return one.
    Immutable, hashable, picklable, compared by value.

    Args:
        power: 1 penalizes ``strength·‖g‖``, 2 penalizes ``(strength/2)·‖g‖²``.
        strength: λ (power 1) or γ (power 2), ≥ 0; a float or a ``Schedule`` of the optimizer step. Where it is 0 the gradient is the
            plain one and only one pass runs.
        radius: step of the finite difference, > 0 (a schedule may be 0 only where the strength is 0 too); for power 1 the L2 norm of the
            perturbation over all perturbed parameters, for power 2 the factor on g. ``None`` for ``difference="exact"``, and only there.
            ``AutoRadius()`` and ``LETS()`` set themselves; the strength may be a multiple of the same one, so that c = strength / radius
            does not change.
        difference: "forward", "backward", "central" or "exact".
        direction: what the parameters are perturbed along, a ``Direction`` (``gradreg.directions``); the gradient by default.
        mixing: how the gradients become the result, a ``GradientMixing`` (``gradreg.mixing``) or the name of one without arguments:
            "plain" adds (1 − c)·g and c·∇L(θ + radius·d); "unit" has (1 − c)·ĝ in place of (1 − c)·g, as the published GNP code does by
            default; power 1, the forward difference and ``Gradient()`` only.
        mask: which coordinates are perturbed, a ``Mask`` (``gradreg.masks``); None for all.
        ascent_steps: S ≥ 1: the perturbed point is reached in S steps of ``radius / S``, each along the direction found where the last one
            ended, for S − 1 more evaluations. Forward difference and ``Gradient()`` only.
        reuse: when the penalty's part of the gradient is computed: at every k-th step, and reused in between (``Reuse``); None computes
            it at every step.
        decoupled: where the result goes. True gives the optimizer g alone; P − g, with P the weighted sum, is subtracted from the
            parameters separately, times the learning rate, so that momentum and preconditioner never see the penalty. The engine applies
            it after the optimizer's step (``GradientRegularizer.decoupled_step``, ``gradreg.jax.decoupled_update``).
            Source: Yue et al. 2023, arXiv 2305.15817, algorithm 1.

    Raises:
        ValueError, TypeError: at construction, naming the argument, the rule, the value received and the remedy; also for parts that
            cannot be combined.

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
    direction: Direction = _GRADIENT
    mixing: GradientMixing = _PLAIN
    mask: Mask | None = None
    ascent_steps: int = 1
    reuse: Reuse | None = None
    decoupled: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.power, bool) or self.power not in (1, 2):
            raise ValueError(
                f"power must be 1 (penalise the norm) or 2 (half its square); got {checks.describe(self.power)}. "
                "Use sam() or gnp() for 1, fgr() for 2."
            )
        checks.choice("difference", self.difference, get_args(Difference))
        if isinstance(self.mixing, str):
            object.__setattr__(self, "mixing", GradientMixing.from_dict(self.mixing))
        validation.check_part("mixing", self.mixing, GradientMixing, "Use mixing='plain', or gradreg.SurrogateGap(a=0.3), say.")
        validation.check_part("direction", self.direction, Direction, "Use gradreg.Adaptive(), say, or leave it out.")
        if self.mask is not None:
            validation.check_part("mask", self.mask, Mask, "Use gradreg.Sparse(sparsity=0.5), say, or None.")
        if self.reuse is not None and type(self.reuse) is not Reuse:
            raise TypeError(f"reuse must be a Reuse or None; got {checks.describe(self.reuse)}. Use gradreg.Reuse(k=5, a=0.7), say.")
        checks.flag("decoupled", self.decoupled)
        object.__setattr__(self, "ascent_steps", checks.whole("ascent_steps", self.ascent_steps, minimum=1))
        object.__setattr__(self, "strength", validation.value_of("strength", self.strength, allow_zero=True))
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
            object.__setattr__(self, "radius", validation.value_of("radius", self.radius, allow_zero=isinstance(self.radius, Schedule)))
        validation.check_composition(self)

    def at(self, step: Any, *, radius: Any = None, ops: Operations = PYTHON) -> StepValues:
        """The penalty's numbers at optimizer step ``step``, each schedule evaluated once.

        Args:
            step: a whole number ≥ 0, or with ``ops`` a traced one.
            radius: what a radius that sets itself is worth at this step, > 0, a number or a scalar of the engine; None for other
                penalties. Whether the step acts, and c where the strength follows the radius, do not depend on it, so they are known
                without its value.
            ops: the functions that schedules compute with: Python's, or ``jax.numpy``.

        Raises:
            ValueError: if the schedules make the radius 0 at a step where the strength is not. Of a traced step that cannot be told.
                Without ``radius`` where the penalty sets it itself, and with it where it does not.

        >>> from gradreg import gnp
        >>> values = gnp(r=0.1, alpha=0.8).warmup("zero", steps=3).at(3)
        >>> values.acts, values.radius, round(values.coefficient, 12)
        (True, 0.1, 0.8)
        """
        auto = self.auto_radius
        if radius is not None:
            if auto is None:
                raise ValueError(f"radius must be left out for a penalty that does not set it itself; got {radius} for {self}.")
            if not isinstance(radius, (int, float)):
                return self._at_unknown_radius(step, radius, auto, ops)
            ops = with_radius(ops, checks.positive("radius", radius))
        strength = _value_at(self.strength, step, ops)
        radius = strength if self.radius == self.strength else _value_at(self.radius, step, ops)  # one schedule is evaluated once
        never_zero = not isinstance(strength, float) and isinstance(self.strength, Schedule) and self.strength.bounds()[0] > 0.0
        acts = True if never_zero else strength != 0.0
        fresh = acts
        if self.reuse is not None and self.reuse.k > 1:
            found = step % self.reuse.k == 0
            fresh = (acts and found) if isinstance(acts, bool) else acts & found
        return StepValues(step, strength, radius, self._coefficient(step, strength, radius, ops), acts, fresh)

    def _at_unknown_radius(self, step: Any, radius: Any, auto: SelfSetRadius, ops: Operations) -> StepValues:
        """The numbers where the radius is a scalar of an engine: what does not depend on it is found at another radius."""
        known, given = self.at(step, radius=auto.start, ops=ops), with_radius(ops, radius)
        values = replace(known, radius=radius)
        if self.strength_follows_radius:
            return replace(values, strength=_value_at(self.strength, step, given) if known.acts is not False else 0.0)
        coefficient = 0.0 if known.acts is False else self._coefficient(step, values.strength, values.radius, ops)
        return replace(values, coefficient=coefficient)

    def nominal_at(self, step: int) -> StepValues:
        """The numbers at ``step``, those of a radius that sets itself as they are at its start: whether it acts, and at what cost."""
        auto = self.auto_radius
        return self.at(step, radius=None if auto is None else auto.start)

    def _coefficient(self, step: Any, strength: Any, radius: Any, ops: Operations) -> Any:
        if radius is None:
            return None
        if isinstance(strength, float) and isinstance(radius, (int, float)):
            if strength == 0.0:
                return 0.0
            if radius == 0.0:
                raise ValueError(
                    f"radius must be > 0 wherever the strength is; got radius 0 and strength {strength:g} at step {step}. "
                    "Let both ramp together: penalty.warmup('radius', steps=...)."
                )
            return strength / radius
        if self.coefficient_is_one:
            return 1.0
        return ops.where(strength == 0.0, 0.0, strength / ops.where(strength == 0.0, 1.0, radius))

    def plan(self, values: StepValues, *, separate_ascent: bool = False) -> Plan:
        """The passes of a step with these ``values``; if it is not known whether the step acts, those that it has if it does.

        Args:
            values: what ``at`` returned.
            separate_ascent: whether the direction comes from another function (``ascent``) than the loss.
        """
        if values.acts is False:
            return plan.PLAIN
        if values.fresh is False:
            return Plan(reuses=True)
        if self.difference == "exact":
            return Plan(exact=True)
        make = _known_difference if isinstance(values.coefficient, float) else plan.finite_difference
        return make(
            self.difference,
            values.coefficient,
            needs_gradient=self.direction.needs_gradient,
            plain_gradient="apart" if self.keeps_plain_apart else self.mixing.plain_gradient,
            ascent_steps=self.ascent_steps,
            separate_ascent=separate_ascent,
        )

    def strength_at(self, step: int) -> float:
        """The strength at optimizer step ``step`` (≥ 0); raises where it follows a radius that sets itself."""
        return schedules.as_schedule(self.strength)(step)

    def radius_at(self, step: int) -> float | None:
        """The radius at optimizer step ``step`` (≥ 0); None for an exact penalty. Raises for one that sets itself, which is state."""
        return None if self.radius is None else schedules.as_schedule(self.radius)(step)

    def coefficient_at(self, step: int) -> float | None:
        """c = strength / radius at ``step``, the weight of the perturbed gradient; 0 where the strength is 0, None for an exact penalty.

        Raises:
            ValueError: as ``at``.
        """
        return (self.nominal_at(step) if self.strength_follows_radius else self.at(step)).coefficient

    @property
    def auto_radius(self) -> SelfSetRadius | None:
        """The rule of a radius that sets itself; None for any other."""
        return self_set_radius_in(self.radius)

    @property
    def aligned_radius(self) -> AutoRadius | None:
        """The rule of a radius that follows the alignment of a step's two gradients; None for any other."""
        auto = self.auto_radius
        return auto if isinstance(auto, AutoRadius) else None

    @property
    def learned_radius(self) -> LETS | None:
        """The rule of a radius that is learned from held-out data; None for any other."""
        auto = self.auto_radius
        return auto if isinstance(auto, LETS) else None

    @property
    def guards(self) -> Guards:
        """What a radius that sets itself can expect of the loss at the perturbed point."""
        mask = self.mask is not None and self.mask.level == "coordinates"
        predicts = self.direction.is_gradient and not mask and self.ascent_steps == 1
        return Guards(self.direction.ascends, self.power if predicts else None, self.difference == "backward")

    @property
    def strength_follows_radius(self) -> bool:
        """Whether the strength is a multiple of a radius that sets itself, so that c = strength / radius does not depend on it."""
        return self.auto_radius is not None and self_set_radius_in(self.strength) is not None

    @property
    def coefficient_is_one(self) -> bool:
        """Whether c = strength / radius is 1 at every step at which the strength is not 0, whatever the schedules."""
        return self.radius is not None and gates.where_it_acts(self.strength) == schedules.as_schedule(self.radius)

    @property
    def keeps_plain_apart(self) -> bool:
        """Whether the whole plain gradient is held in addition to the weighted sum: one more gradient in memory during a step."""
        return self.mixing.plain_gradient == "apart" or self.reuse is not None or self.decoupled

    @property
    def has_memory(self) -> bool:
        """Whether a step depends on earlier ones, through the direction, the mask, ``reuse`` or a radius that sets itself."""
        return self.keeps_tensors or self.auto_radius is not None

    @property
    def keeps_tensors(self) -> bool:
        """Whether tensors like the parameters are kept from step to step, for the direction, the mask or ``reuse``."""
        return self.direction.has_memory or (self.mask is not None and self.mask.has_memory) or self.reuse is not None

    @property
    def depends_on_step(self) -> bool:
        """Whether two steps may differ by their number alone: by a schedule, ``every``, ``reuse``, a draw, or the refresh of a mask."""
        parts = self.direction.depends_on_step or (self.mask is not None and self.mask.depends_on_step)
        reuses = self.reuse is not None and self.reuse.k > 1
        return parts or reuses or not (schedules.is_constant(self.strength) and schedules.is_constant(self.radius))

    @property
    def depends_on_length(self) -> bool:
        """Whether it acts in the tail of a run whose length it does not know yet: see ``over``."""
        return any(isinstance(s, gates.Tail) for s in schedules.inside(schedules.as_schedule(self.strength)))

    def starts_unperturbed_at(self, step: int) -> bool:
        """Whether the first pass of ``step`` is at the unperturbed parameters: its loss and norm are plain training's."""
        return self.plan(self.nominal_at(step)).passes[0].offset == 0

    @overload
    def evaluations_at(self, step: int, *, ascent_share: None = None) -> int: ...
    @overload
    def evaluations_at(self, step: int, *, ascent_share: float) -> float: ...
    def evaluations_at(self, step: int, *, ascent_share: float | None = None) -> float:
        """Gradient evaluations that ``step`` costs: one for each pass of its plan.

        1 where the strength is 0 and between the fresh steps of ``reuse``. Otherwise one for each perturbed point (central: two), one for
        the plain gradient if it is part of the result, and one for each ascent step, the first of which shares the plain gradient.
        A direction that needs no gradient has no ascent step. So forward and backward cost 2, central 3; "exact" counts as 3.

        Args:
            step: the optimizer step, ≥ 0.
            ascent_share: if the direction comes from part of the batch, that share, > 0: an ascent step then costs this much, and does
                not share the plain gradient.

        Returns:
            A whole number unless ``ascent_share`` is a fraction.

        >>> from gradreg import gnp, sam
        >>> sam().evaluations_at(0, ascent_share=0.25), gnp(r=0.1, alpha=0.8).evaluations_at(0, ascent_share=0.25)
        (1.25, 2.25)
        """
        separate = ascent_share is not None and self.difference != "exact" and self.direction.needs_gradient
        return self.plan(self.nominal_at(step), separate_ascent=separate).evaluations(1.0 if ascent_share is None else ascent_share)

    def check_ascent(self, received: str) -> None:
        """Raise if the direction cannot come from separate closures.

        Raises:
            ValueError: for an exact penalty, one that needs the plain gradient of the same pass, a direction that needs no gradient, and a
                radius that sets itself.
        """
        if self.auto_radius is not None:
            raise ValueError(
                "ascent must be None with a radius that sets itself, which compares the two gradients of one loss; those of a part and of "
                f"the whole batch differ by sampling at any radius; got {received} with {self}. Leave it out, or give a number as radius."
            )
        if self.difference == "exact":
            raise ValueError(f"ascent must be None for an exact penalty, which takes no finite step; got {received}. Use fgr() or gnp().")
        if self.keeps_plain_apart or self.mixing.plain_gradient != "summed":
            raise ValueError(
                f"ascent must be None with {self.combined_by()}, which needs the plain gradient first; got {received}. "
                "Use mixing='plain', without reuse and decoupled."
            )
        if not self.direction.needs_gradient:
            raise ValueError(
                f"ascent must be None for a direction that needs no gradient, {self.direction}; got {received}. "
                "Leave it out, or use direction=Gradient()."
            )

    def check_each(self) -> None:
        """Raise if the micro-batches of a step cannot each have a perturbation of their own (``perturb="each"``).

        Raises:
            ValueError: for a penalty that keeps tensors from step to step, a mixing of other than the plain sum, and a direction that does
                not depend on the batch.
        """
        remedy = "Use perturb='all', or sam(), gnp(), fgr() or asam()."
        if self.keeps_tensors or self.keeps_plain_apart or self.mixing.plain_gradient != "summed":
            what = self.combined_by() if self.keeps_plain_apart or self.mixing.plain_gradient != "summed" else "memory"
            raise ValueError(
                "perturb must be 'all' for a penalty with memory, or that mixes gradients otherwise than by a sum, which are those of the "
                f"whole step; got 'each' with {self} ({what}). {remedy}"
            )
        if not self.direction.needs_gradient:
            raise ValueError(
                f"perturb must be 'all' for a direction that needs no gradient, and so is the same for every micro-batch; got 'each' with "
                f"direction {self.direction}. {remedy}"
            )

    def combined_by(self) -> str:
        """What departs from the plain weighted sum, for errors and descriptions."""
        if self.reuse is not None:
            return str(self.reuse)
        return "decoupled" if self.decoupled else f"mixing={str(self.mixing)!r}"

    def warmup(self, kind: WarmupKind, *, steps: int) -> GradientPenalty:
        """The same penalty under a GR warm-up of ``steps`` optimizer steps (≥ 1); a new object.

        With s = min(1, step / steps): "radius" uses s·radius and s·strength, "strength" uses s·strength, "zero" uses no penalty, and no
        second pass, while step < steps. See ``gradreg.gates.warmup``.

        Source: Zhao et al. 2024, arXiv 2406.09723.

        >>> from gradreg import sam
        >>> late = sam(rho=0.1).warmup("zero", steps=10)
        >>> late.strength_at(9), late.strength_at(10), late.evaluations_at(9), late.evaluations_at(10)
        (0.0, 0.1, 1, 2)
        """
        strength, radius = gates.warmup(kind, self.strength, self.radius, steps=steps)
        return replace(self, strength=strength, radius=radius)

    def every(self, k: int, *, compensate: bool = False) -> GradientPenalty:
        """The same penalty at steps that are multiples of ``k``, and none (one pass) between them; a new object.

        Args:
            k: optimizer steps, ≥ 1; 1 changes nothing.
            compensate: multiply the strength by k, so that it is the same on average.

        Cost: a k-th of the further evaluations. EMAs are updated with the plain gradients in between.

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

        Cost: on average the share p of the further evaluations. EMAs are updated with the plain gradients in between.
        """
        p = checks.probability("p", p, remedy=validation.NO_PENALTY)
        checks.flag("compensate", compensate)
        chance = Chance(p=p, seed=seed, value=1.0 / p if compensate else 1.0)
        return self._acting(chance) if p < 1.0 else self

    def _acting(self, gate: Schedule) -> GradientPenalty:
        return self if self.strength == 0.0 else replace(self, strength=schedules.as_schedule(self.strength) * gate)

    def tail(self, share: float, *, total_steps: int | None = None) -> GradientPenalty:
        """The same penalty in the last ``share`` of a run's steps alone, and none (one pass) before; a new object.

        Meant for the part of a run in which the learning rate decays to its end.

        Args:
            share: in (0, 1]; 1 changes nothing.
            total_steps: optimizer steps of the run, ≥ 1; None leaves them open until ``over``, as recipes do.

        Cost: the share of the further evaluations. EMAs are updated with the plain gradients before.
        Source: Zhou et al. 2025, arXiv 2410.10373 (the last epochs have nearly all of SAM's effect); arXiv 2609.17575.

        Raises:
            ValueError: a share that is no step of ``total_steps``, or in whose steps the penalty never acts.

        >>> from gradreg import sam
        >>> late = sam(rho=0.1).tail(0.3, total_steps=10)
        >>> [late.evaluations_at(step) for step in range(10)]
        [1, 1, 1, 1, 1, 1, 1, 2, 2, 2]
        """
        share = checks.probability("share", share, remedy="Leave .tail() out to have the penalty at every step.")
        late = self
        if share < 1.0 and self.strength != 0.0:
            late = replace(self, strength=gates.Tail(value=self.strength, share=share))
        return late if total_steps is None else late.over(total_steps)

    def over(self, total_steps: int) -> GradientPenalty:
        """The same penalty in a run of ``total_steps`` optimizer steps (≥ 1), which a ``tail`` is a share of.

        Raises:
            ValueError: if the penalty has a strength, and a warm-up, a tail or another schedule leaves no step of the run at which it acts.
        """
        total_steps = checks.whole("total_steps", total_steps, minimum=1)
        strength = gates.over(self.strength, total_steps)
        found = self if strength is self.strength else replace(self, strength=strength)
        if isinstance(strength, Schedule) and not any(found.nominal_at(step).acts for step in range(total_steps - 1, -1, -1)):
            raise ValueError(
                f"a penalty must act at a step of the run, of which there are {total_steps}; got {self}, whose strength is 0 at all. "
                "Warm up over fewer steps, give the tail a larger share, or train longer."
            )
        return found

    def only_norms(self) -> GradientPenalty:
        """The same penalty perturbing only normalization layers (SAM-ON); all parameters are updated. See ``gradreg.masks.OnlyNorms``."""
        return replace(self, mask=OnlyNorms())

    def sparse(self, sparsity: float, *, choice: Choice = "fisher", every: int = 100, seed: int = 0) -> GradientPenalty:
        """The same penalty perturbing a share ``1 − sparsity`` of the coordinates (SSAM); all are updated. See ``gradreg.masks.Sparse``."""
        return replace(self, mask=Sparse(sparsity=sparsity, choice=choice, every=every, seed=seed))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of numbers, strings and dictionaries (for YAML and JSON), from which ``from_dict`` builds an equal penalty.

        Parts that are the default are left out; a mixing without arguments is its name.
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OMITTED or getattr(self, f.name) != f.default}
        written = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in plain.items()}
        if len(written["mixing"]) == 1:
            written["mixing"] = written["mixing"]["mixing"]
        if self.reuse is not None:
            written["reuse"] = {"k": self.reuse.k, "a": self.reuse.a}
        return written

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GradientPenalty:
        """The penalty that a dictionary describes, either by its fields or in a paper's own symbols.

        ``{"name": "gnp", "r": 0.1, "alpha": 0.8, "warmup": {"kind": "zero", "steps": 1000}}`` calls the constructor of that name; a
        dictionary without ``name`` holds the fields of ``GradientPenalty``, as ``to_dict`` returns them. Both may carry ``mask``, and,
        applied in this order, ``warmup`` (``{kind, steps}``), ``tail`` (a share, or ``{share, total_steps}``), ``every`` (a whole number)
        and ``probability`` (a number, or ``{p, seed}``), the last two with ``compensate``.

        Raises:
            ValueError: an unknown name or key (the nearest known one is named), or a bad value.
            TypeError: not a mapping, a missing key, or a value of the wrong type.
        """
        return registry.from_dict(cls, data)

    def __str__(self) -> str:
        parts = [self._base_text()]
        if self.mixing.plain_gradient == "apart":
            parts.append(str(self.mixing))
        if self.reuse is not None:
            parts.append(str(self.reuse))
        if self.decoupled:
            parts.append("decoupled")
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
        unit = ", unit mixing" if self.mixing.plain_gradient == "normalized" else ""
        if isinstance(self.strength, float) and isinstance(self.radius, float):
            return f"GNP(r {self.radius:g}, alpha {self.strength / self.radius:g}{unit})"
        return f"GNP(r {_text(self.radius)}, lambda {_text(self.strength)}{unit})"


_OMITTED = ("direction", "mask", "ascent_steps", "reuse", "decoupled")
"""The fields that a dictionary leaves out where they are the default."""


def _value_at(value: Value | None, step: Any, ops: Operations) -> Any:
    """``value`` at ``step``: a schedule's, as a float if it is a Python number, or itself."""
    if isinstance(value, float) or not isinstance(value, Schedule):  # asking an abstract class takes longer
        return value
    found = value.evaluate(step, ops)
    return float(found) if isinstance(found, numbers.Real) else found


def _text(value: Value | None) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else f"[{value}]"
