"""One step: where the gradient is evaluated, and how the evaluations become the regularized gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gradreg.directions import Friendly, Remembered
from gradreg.jax.amounts import Amounts, decided
from gradreg.jax.data_parallel import mean, per_shard
from gradreg.jax.directions import ascent
from gradreg.jax.evaluation import Evaluate, Evaluated
from gradreg.jax.masks import Masks, drawn, largest, masked
from gradreg.jax.memory import AVERAGE, MASK, PERIOD, State, averaged, leaves_of
from gradreg.jax.mixing import mixed
from gradreg.jax.perturbation import Tree, combined, gradient_norm, moved, safe_ratio, vanishes
from gradreg.masks import Sparse
from gradreg.mixing import GradientMixing
from gradreg.penalties import GradientPenalty
from gradreg.stencils import stencil


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
        unequal: those along which the evaluations still differ, and over which the result is averaged.
        state: what the steps before handed on.
    """

    penalty: GradientPenalty
    amounts: Amounts
    evaluate: Evaluate
    ascend: Evaluate | None
    selected: Sequence[bool]
    axes: tuple[str, ...]
    unequal: tuple[str, ...]
    state: State

    def run(self, params: Tree) -> tuple[Evaluated, State]:
        """Loss and aux of the first pass and the regularized gradient, averaged over shards; and the state after the step.

        One pass where the penalty does not act. What is remembered, and what gradients are mixed, is what all shards agree on.
        """
        mixing, direction = self.penalty.mixing, self.penalty.direction
        evaluated, plain, state = self._passes(params)
        kept = plain if isinstance(mixing, GradientMixing) else None
        value, result, kept = mean((evaluated.value, evaluated.gradients, kept), self.unequal)
        if isinstance(mixing, GradientMixing):
            result, state = mixed(mixing, self.amounts, kept, result, state)
        if isinstance(direction, Remembered):
            state = averaged(state, direction.decay, result)
        return Evaluated(value, evaluated.aux, result), state

    def _passes(self, params: Tree) -> tuple[Evaluated, Tree | None, State]:
        """The sum of weighted gradients, and the plain gradient if it was evaluated at every step."""
        fresh, c = self.amounts.fresh, self.amounts.coefficient
        if self.penalty.difference == "exact":
            return decided(fresh, lambda: self._exact(params), lambda: self.evaluate(params)), None, self.state
        has_direction = self.ascend is not None or not self.penalty.direction.needs_gradient
        if has_direction and isinstance(c, float) and not self.penalty.needs_plain(c):
            evaluated, state = decided(fresh, lambda: self._without_plain(params), lambda: self._plain(params))
            return evaluated, None, state
        first = self.evaluate(params)

        def penalised() -> tuple[Tree, State]:
            source = first.gradients if self.ascend is None else self.ascend(params).gradients
            evaluated, state = self._finite_difference(params, source, first.gradients)
            return evaluated.gradients, state

        gradients, state = decided(fresh, penalised, lambda: (first.gradients, self._remembering(first.gradients)))
        return first._replace(gradients=gradients), first.gradients, state

    def _plain(self, params: Tree) -> tuple[Evaluated, State]:
        evaluated = self.evaluate(params)
        return evaluated, self._remembering(evaluated.gradients)

    def _without_plain(self, params: Tree) -> tuple[Evaluated, State]:
        """c = 1 and a direction that is not the gradient of ``evaluate`` at θ, which is therefore not evaluated there."""
        if self.ascend is None:
            return self._finite_difference(params, None, None)
        first = self.ascend(params)
        if not isinstance(self.amounts.fresh, bool):
            self._check_alike(first, jax.eval_shape(self.evaluate, params))
        evaluated, state = self._finite_difference(params, first.gradients, None)
        return first._replace(gradients=evaluated.gradients), state

    def _check_alike(self, ascended: Evaluated, plain: Evaluated) -> None:
        ours, theirs = (jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), e[:2]) for e in (ascended, plain))
        if ours != theirs:
            raise TypeError(
                "ascent must return a loss and aux of the same structure, shapes and dtypes as fun where the strength is 0 at some steps, "
                f"because those steps return fun's; got {ours} from ascent and {theirs} from fun. "
                "Leave what depends on the size of the batch out of aux."
            )

    def _finite_difference(self, params: Tree, source: Tree | None, plain: Tree | None) -> tuple[Evaluated, State]:
        """The last evaluation, with the weighted gradients of the penalty's stencil, and the state with what the direction remembers.

        ``source``, the gradient that the direction is formed from, is None if it needs none; ``plain``, the gradient at θ, if it has no
        weight.
        """
        penalty = self.penalty
        points = stencil(penalty.difference, self.amounts.coefficient)
        state = self.state if source is None else self._remembering(source)
        masks, state = self._masks(params, source, state)
        at_theta = points.at_theta
        if penalty.mixing == "unit" and not vanishes(at_theta):
            at_theta = at_theta * safe_ratio(1.0, gradient_norm(source, self.selected))
        at, (vector, distance) = params, self._perturbation(params, source, masks, state)
        for _ in range(1, penalty.ascent_steps):
            at = moved(at, vector, distance, self.selected)
            vector, distance = self._perturbation(at, (self.ascend or self.evaluate)(at).gradients, masks, state)
        evaluations = [(w, self.evaluate(moved(at, vector, place * distance, self.selected))) for place, w in points.moved]
        terms = [(weight, evaluated.gradients) for weight, evaluated in evaluations]
        gradients = combined(terms if plain is None else [(at_theta, plain), *terms])
        return evaluations[-1][1]._replace(gradients=gradients), state

    def _perturbation(self, params: Tree, gradients: Tree | None, masks: Masks | None, state: State) -> tuple[Tree, Any]:
        """The vector and the distance of one ascent step."""
        average = leaves_of(params, state[AVERAGE]) if AVERAGE in state else []
        vector, measured = ascent(self.penalty.direction, params, gradients, average, self.amounts.step, self.selected)
        distance = self.amounts.radius / self.penalty.ascent_steps
        if self.penalty.power == 1:
            distance = distance * safe_ratio(1.0, gradient_norm(measured, self.selected))
        return vector if masks is None else masked(vector, masks), distance

    def _masks(self, params: Tree, gradients: Tree | None, state: State) -> tuple[Masks | None, State]:
        mask, step = self.penalty.mask, self.amounts.step
        if not isinstance(mask, Sparse):
            return None, state
        if mask.choice == "random":
            return drawn(mask, params, step, self.selected), state
        period = jnp.asarray(step // mask.every, jnp.int32)
        masks = jax.lax.cond(
            period == state[PERIOD],
            lambda: leaves_of(params, state[MASK]),
            lambda: largest(1.0 - mask.sparsity, mean(gradients, self.unequal), self.selected),
        )
        return masks, {**state, MASK: jax.tree.structure(params).unflatten(masks), PERIOD: period}

    def _remembering(self, gradients: Tree) -> State:
        """The state, with ``gradients`` taken into the average of a ``Friendly`` direction."""
        direction = self.penalty.direction
        if not isinstance(direction, Friendly):
            return self.state
        return averaged(self.state, direction.beta, mean(gradients, self.unequal))

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
