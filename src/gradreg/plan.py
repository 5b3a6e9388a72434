"""What one step does, as values that both engines run: a penalty's numbers at the step, and the plan of its passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

Difference: TypeAlias = Literal["forward", "backward", "central", "exact"]

Condition: TypeAlias = Any
"""A bool where it is known, else a traced one."""


@dataclass(frozen=True)
class StepValues:
    """A penalty's numbers at one step: Python numbers, or traced scalars in a JAX program that receives the step when it runs.

    Args:
        step: the optimizer step.
        strength: λ or γ.
        radius: r or ε; None for an exact penalty.
        coefficient: c = strength / radius, the weight of the perturbed gradient; None for an exact penalty.
        acts: whether the strength differs from 0.
        fresh: whether it acts and computes its part of the gradient at this step, instead of reusing that of an earlier step.
    """

    step: Any
    strength: Any
    radius: Any
    coefficient: Any
    acts: Condition
    fresh: Condition


def resting(values: StepValues) -> StepValues:
    """``values`` of a step at which the penalty does not act."""
    return replace(values, strength=0.0, coefficient=None if values.coefficient is None else 0.0, acts=False, fresh=False)


@dataclass(frozen=True)
class Pass:
    """One evaluation of the loss and its gradient.

    Args:
        offset: it is evaluated at θ + offset·radius·d.
        weight: the factor with which its gradient enters the result.
        of: "loss", or "ascent" for a separate function that the direction comes from.
        gives_direction: whether the (next) perturbation is formed from its gradient.
        keeps: what becomes of its gradient: "sum", it is added up; "apart", it is held separately, for what needs it in addition to the
            sum; "nothing", it is dropped once the direction is formed.
    """

    offset: float = 0
    weight: Any = 1.0
    of: Literal["loss", "ascent"] = "loss"
    gives_direction: bool = False
    keeps: Literal["sum", "apart", "nothing"] = "sum"


@dataclass(frozen=True)
class Plan:
    """The passes of one step, in order. Loss and auxiliary values are those of the first.

    Args:
        passes: at least one. Those at the perturbed parameters come after those that give the direction.
        plain_weight: the factor of the plain gradient where a pass keeps it apart, or divides it by its norm.
        exact: the single pass is differentiated twice ("double backpropagation").
        reuses: the penalty's part from an earlier step is added to the plain gradient.
    """

    passes: tuple[Pass, ...] = (Pass(),)
    plain_weight: Any = 0.0
    exact: bool = False
    reuses: bool = False

    @property
    def is_one_plain_pass(self) -> bool:
        """Whether the loss is evaluated once, at θ, as without a penalty."""
        return len(self.passes) == 1 and self.passes[0].offset == 0 and not self.exact

    @property
    def has_plain_pass(self) -> bool:
        """Whether a pass of its own gives the plain gradient of the loss."""
        return not self.exact and any(p.of == "loss" and p.offset == 0 for p in self.passes)

    def evaluations(self, ascent_share: float = 1.0) -> float:
        """Gradient evaluations: one per pass, ``ascent_share`` for a pass of ``ascent``, 3 for an exact one. An int if it is whole.

        "exact" calls the loss once; its double backward costs 9L − 5 matrix products on an MLP of L layers where a gradient costs 3L − 1.
        """
        if self.exact:
            return 3
        own = [p.of for p in self.passes].count("loss")
        others = len(self.passes) - own
        return own + ascent_share * others if others else own


PLAIN = Plan()
"""One pass, as without a penalty."""


def vanishes(weight: Any) -> bool:
    """Whether ``weight`` is known to be 0 now; a traced weight is not."""
    return isinstance(weight, (int, float)) and weight == 0.0


def stencil(difference: Difference, coefficient: Any) -> tuple[Any, tuple[tuple[int, Any], ...]]:
    """A finite difference as numbers: the weight of the gradient at θ, and pairs (offset, weight) of those at perturbed points.

    ``G = plain·g + Σ weight·∇L(θ + offset·radius·d)`` with c = ``coefficient``, a number or a traced one; "exact" has none.

    >>> stencil("forward", 0.75)
    (0.25, ((1, 0.75),))
    """
    c = coefficient
    if difference == "forward":
        return 1.0 - c, ((+1, c),)
    if difference == "backward":
        return 1.0 + c, ((-1, -c),)
    if difference == "central":
        return 1.0, ((+1, c / 2), (-1, -c / 2))
    raise ValueError(f"difference must be 'forward', 'backward' or 'central'; got {difference!r}, which evaluates at no other point.")


def finite_difference(
    difference: Difference,
    coefficient: Any,
    *,
    needs_gradient: bool,
    plain_gradient: Literal["summed", "normalized", "apart"],
    ascent_steps: int,
    separate_ascent: bool,
) -> Plan:
    """The passes of a step that acts.

    With a separate ascent function the plain gradient, where it has a weight at all, is evaluated first, so that loss, auxiliary values and
    batch statistics are those at θ.

    Args:
        difference: which finite difference, not "exact".
        coefficient: c = strength / radius, a number or a traced one.
        needs_gradient: whether the direction is formed from a gradient at θ.
        plain_gradient: what the mixing does with the plain gradient: see ``GradientMixing.plain_gradient``.
        ascent_steps: how many steps lead to the perturbed point; each but the first begins with a pass of its own.
        separate_ascent: whether the direction comes from another function than the loss.
    """
    plain, perturbed = stencil(difference, coefficient)
    source: Literal["loss", "ascent"] = "ascent" if separate_ascent else "loss"
    first: tuple[Pass, ...] = ()
    if separate_ascent:
        first = (*(() if vanishes(plain) else (Pass(weight=plain),)), Pass(of=source, gives_direction=True, keeps="nothing"))
    elif plain_gradient == "apart":
        first = (Pass(gives_direction=needs_gradient, keeps="apart"),)
    elif not vanishes(plain):
        # To divide by its norm, the plain gradient is needed as it is: its weight is applied afterwards.
        first = (Pass(weight=1.0 if plain_gradient == "normalized" else plain, gives_direction=needs_gradient),)
    elif needs_gradient:
        first = (Pass(gives_direction=True, keeps="nothing"),)
    towards = perturbed[0][0]
    climbs = [Pass(offset=towards * i / ascent_steps, of=source, gives_direction=True, keeps="nothing") for i in range(1, ascent_steps)]
    passes = (*first, *climbs, *(Pass(offset=offset, weight=weight) for offset, weight in perturbed))
    return Plan(passes, plain_weight=0.0 if plain_gradient == "summed" else plain)
