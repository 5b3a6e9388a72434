"""One step: where the gradient is evaluated, and how the evaluations become the regularized gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradreg import checks
from gradreg.jax.data_parallel import per_shard
from gradreg.jax.perturbation import Tree, combined, gradient_norm, moved, safe_ratio, vanishes
from gradreg.penalties import GradientPenalty
from gradreg.schedules import Value, as_schedule
from gradreg.stencils import stencil


class Evaluated(NamedTuple):
    """The loss, what the function returned beside it, and a gradient."""

    value: jax.Array
    aux: Any
    gradients: Tree


Evaluate: TypeAlias = Callable[[Tree], Evaluated]
"""Parameters to loss, aux and gradient: the function with its batch, and its mean over shards where that is wanted, inside."""


@dataclass(frozen=True)
class Amounts:
    """A penalty's numbers at one step, each a float where it is known when tracing, else a traced scalar.

    Args:
        acts: whether the strength differs from 0.
        strength: λ or γ.
        radius: r or ε; None for an exact penalty.
        coefficient: c = strength / radius; None for an exact penalty.
    """

    acts: bool | jax.Array
    strength: Any
    radius: Any
    coefficient: Any


def amounts(penalty: GradientPenalty, step: Any) -> Amounts:
    """The numbers of ``penalty`` at ``step``: an int ≥ 0, or an integer scalar array, traced or not."""
    if not isinstance(step, (jax.Array, np.ndarray)):
        step = checks.whole("step", step, minimum=0, remedy="Pass the number of optimizer steps done so far.")
        strength = penalty.strength_at(step)
        return Amounts(strength != 0.0, strength, penalty.radius_at(step), penalty.coefficient_at(step))
    if jnp.shape(step) != () or not jnp.issubdtype(step.dtype, jnp.integer):
        raise TypeError(
            f"step must be one integer; got an array of shape {jnp.shape(step)} and dtype {step.dtype}. Pass the optimizer's step count."
        )
    step = jnp.asarray(step, int)  # the default integers divide to the default floats: float64 where that is enabled
    strength, radius = _at(penalty.strength, step), None if penalty.radius is None else _at(penalty.radius, step)
    acts = strength != 0.0 if isinstance(strength, float) or as_schedule(penalty.strength).bounds()[0] <= 0.0 else True
    if radius is None:
        coefficient = None
    elif penalty.coefficient_is_one:
        coefficient = 1.0
    elif isinstance(strength, float) and isinstance(radius, float):
        coefficient = strength / radius
    else:
        coefficient = jnp.where(strength == 0.0, 0.0, strength / jnp.where(strength == 0.0, 1.0, radius))
    return Amounts(acts, strength, radius, coefficient)


def _at(value: Value, step: Any) -> Any:
    return as_schedule(value).evaluate(step, jnp)


@dataclass(frozen=True)
class Step:
    """What one call of the function that ``value_and_grad`` returned works on.

    Args:
        penalty: the specification.
        amounts: its numbers at this step.
        evaluate: loss, aux and gradient on the batch.
        ascend: the same for the function of the direction, or None for ``evaluate``.
        selected: for each leaf of the parameters, whether it is perturbed and counted in the norm.
        axes: the mapped axes along which the parameters are marked as each shard's own.
    """

    penalty: GradientPenalty
    amounts: Amounts
    evaluate: Evaluate
    ascend: Evaluate | None
    selected: Sequence[bool]
    axes: tuple[str, ...]

    def regularized(self, params: Tree) -> Evaluated:
        """Loss and aux of the first pass, and the regularized gradient; one pass where the strength is 0."""
        if self.penalty.difference == "exact":
            return self._where_it_acts(lambda: self._exact(params), lambda: self.evaluate(params))
        ascend = self.ascend
        if ascend is not None and isinstance(self.amounts.coefficient, float) and self.amounts.coefficient == 1.0:
            return self._where_it_acts(lambda: self._ascended(params, ascend), lambda: self.evaluate(params))
        first = self.evaluate(params)

        def mixed() -> Tree:
            direction = first.gradients if ascend is None else ascend(params).gradients
            return self._finite_difference(params, direction, first.gradients)

        return first._replace(gradients=self._where_it_acts(mixed, lambda: first.gradients))

    def _where_it_acts(self, regularized: Callable[[], Any], plain: Callable[[], Any]) -> Any:
        if isinstance(self.amounts.acts, bool):
            return regularized() if self.amounts.acts else plain()
        return jax.lax.cond(self.amounts.acts, regularized, plain)

    def _ascended(self, params: Tree, ascend: Evaluate) -> Evaluated:
        """c = 1 and a direction from another function: nothing but the direction is evaluated at θ."""
        first = ascend(params)
        if not isinstance(self.amounts.acts, bool):
            self._check_alike(first, jax.eval_shape(self.evaluate, params))
        return first._replace(gradients=self._finite_difference(params, first.gradients, None))

    def _check_alike(self, ascended: Evaluated, plain: Evaluated) -> None:
        ours, theirs = (jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), e[:2]) for e in (ascended, plain))
        if ours != theirs:
            raise TypeError(
                "ascent must return a loss and aux of the same structure, shapes and dtypes as fun where the strength is 0 at some steps, "
                f"because those steps return fun's; got {ours} from ascent and {theirs} from fun. "
                "Leave what depends on the size of the batch out of aux."
            )

    def _finite_difference(self, params: Tree, direction: Tree, plain: Tree | None) -> Tree:
        """The weighted gradients of the penalty's stencil; ``plain``, the gradient at θ, may be None if it has no weight."""
        penalty, radius = self.penalty, self.amounts.radius
        points = stencil(penalty.difference, self.amounts.coefficient)
        distance = radius * safe_ratio(1.0, gradient_norm(direction, self.selected)) if penalty.power == 1 else radius
        at_theta = points.at_theta
        if penalty.mixing == "unit" and not vanishes(at_theta):
            at_theta = at_theta * safe_ratio(1.0, gradient_norm(direction, self.selected))
        terms = [] if plain is None else [(at_theta, plain)]
        for place, weight in points.moved:
            terms.append((weight, self.evaluate(moved(params, direction, place * distance, self.selected)).gradients))
        return combined(terms)

    def _exact(self, params: Tree) -> Evaluated:
        """g + strength·H·d, with H·d the forward derivative of the gradient along d."""

        def gradients(at: Tree) -> tuple[Tree, tuple[jax.Array, Any]]:
            evaluated = self.evaluate(at)
            return evaluated.gradients, (evaluated.value, evaluated.aux)

        first, derivative, (value, aux) = jax.linearize(gradients, params, has_aux=True)
        leaves, structure = jax.tree.flatten(first)
        direction = [leaf if chosen else jnp.zeros_like(leaf) for leaf, chosen in zip(leaves, self.selected, strict=True)]
        scale = self.amounts.strength
        if self.penalty.power == 1:
            scale = scale * safe_ratio(1.0, gradient_norm(first, self.selected))
        product = derivative(per_shard(structure.unflatten(direction), self.axes))
        return Evaluated(value, aux, combined([(1.0, first), (scale, product)]))
