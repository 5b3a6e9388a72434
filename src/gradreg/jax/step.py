"""One step: the passes of the plan in order, and how their gradients become the regularized gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from gradreg.auto_radius import Measurement, RadiusState
from gradreg.jax.directions import DirectionInputs, ascent_direction
from gradreg.jax.held_out import HeldOutStep, LearnedRadius, MeasuredHelp
from gradreg.jax.loss_fn import Evaluate, Evaluated
from gradreg.jax.masks import MaskInputs, coordinates, masked
from gradreg.jax.mixing import MixingInputs, add_reused, correction, mix, orthogonal_part, weigh_plain
from gradreg.jax.norms import Tree, gradient_norm, inner_product, safe_ratio, widened
from gradreg.jax.parallel import mean, per_shard
from gradreg.jax.perturbation import perturbed, weighted_sum
from gradreg.jax.shards import Shards
from gradreg.jax.state import (
    AVERAGE,
    CORRECTION,
    HELD_OUT,
    MASK,
    PERIOD,
    RADIUS,
    REUSED,
    State,
    filled,
    leaves_like,
    update_ema,
    with_dtypes_of,
)
from gradreg.penalties import GradientPenalty
from gradreg.plan import Condition, Pass, Plan, StepValues

T = TypeVar("T")


def maybe_cond(condition: Condition, if_true: Callable[[], T], if_false: Callable[[], T], *, both: bool = False) -> T:
    """The result of one of the two functions.

    Where ``condition`` is traced, by ``jax.lax.cond``, which runs only that one; with ``both``, both run and the result is selected.
    """
    if isinstance(condition, bool):
        return if_true() if condition else if_false()
    if both:
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true(), if_false())
    return jax.lax.cond(condition, if_true, if_false)


class Measured(NamedTuple):
    """What ``with_metrics`` adds, and what a radius that sets itself is updated with; None otherwise."""

    gradient_norm: Any = None
    cosine: Any = None
    alignment: Measurement | None = None


@dataclass(frozen=True)
class Step:
    """What one call of the function that ``value_and_grad`` returned works on.

    Args:
        penalty: the specification.
        values: its numbers at this step.
        evaluate: loss, aux and gradient on the batch.
        ascend: the same for the function of the direction, or None for ``evaluate``.
        selected: for each leaf of the parameters, whether it is perturbed and counted in the norm.
        axes: the mapped axes along which the parameters are marked as varying from shard to shard.
        unequal: those along which the evaluations still differ, and over which the result is averaged.
        state: the state after the previous step.
        shards: how the parameters are divided over devices.
        both: whether both sides of a step that may rest are computed, in place of a ``cond``.
        measures: whether the norm and the cosine are measured.
        scaled: whether the loss is scaled before it is differentiated, so that the caller must see what is not finite.
        held_out: looks at held-out data, to tell whether the penalty helps; None for none.
        learned: looks at them to learn the radius; None for one that is not learned from them.
    """

    penalty: GradientPenalty
    values: StepValues
    evaluate: Evaluate
    ascend: Evaluate | None
    selected: Sequence[bool]
    axes: tuple[str, ...]
    unequal: tuple[str, ...]
    state: State
    shards: Shards
    both: bool = False
    measures: bool = False
    scaled: bool = False
    held_out: HeldOutStep | None = None
    learned: LearnedRadius | None = None

    def run(self, params: Tree) -> tuple[Evaluated, State, Measured]:
        """Loss and aux of the first pass and the regularized gradient, averaged over shards; the state after the step; measurements.

        One pass where the penalty does not act. The state, and the gradients that are mixed, are the same on all shards.
        """
        direction = self.penalty.direction
        evaluated, first, state, measured = self._passes(params)
        plain = first if self.penalty.keeps_plain_apart else None
        value, total, plain, measured = mean((evaluated.value, evaluated.gradients, plain, measured), self.unequal)
        result, state = self._mixed(plain, total, state)
        state = self._with_next_radius(state, measured)
        given, averaged = (first, False) if plain is None else (plain, True)
        if self.held_out is not None:
            result, state = self._looked_at(params, given, result, state, averaged=averaged)
        if self.learned is not None:
            state = self._learned(self.learned, params, given, value, result, state, averaged=averaged)
        if direction.averages == "results":
            state = update_ema(state, direction.average_decay, result)
        return Evaluated(value, evaluated.aux, result), state, measured

    def _passes(self, params: Tree) -> tuple[Evaluated, Tree | None, State, Measured]:
        """Loss and aux of the first pass with the sum of weighted gradients, the plain gradient if a pass gives it, and the state."""
        fresh = self.values.fresh
        plan = self.penalty.plan(self.values, separate_ascent=self.ascend is not None)
        if plan.exact:
            evaluated, state, measured = maybe_cond(
                fresh, lambda: self._exact(params), lambda: self._rest(self.evaluate(params)), both=self.both
            )
            return evaluated, None, state, measured
        start = plan.passes[0]
        if start.of != "loss" or start.offset != 0:
            evaluated, state, measured = maybe_cond(
                fresh, lambda: self._run(plan, params), lambda: self._rest(self.evaluate(params)), both=self.both
            )
            return evaluated, None, state, measured
        # The first pass is the plain one, whether the penalty acts or not. Outside the condition it is compiled only once.
        first = self.evaluate(params)
        gradients, state, measured = maybe_cond(
            fresh, lambda: _gradients(self._run(plan, params, first)), lambda: _gradients(self._rest(first)), both=self.both
        )
        return first._replace(gradients=gradients), first.gradients, state, measured

    def _looked_at(self, params: Tree, plain: Tree, result: Tree, state: State, *, averaged: bool) -> tuple[Tree, State]:
        """The result, or the plain gradient while the penalty is off, and the state with what held-out data say, if this step asks them."""
        assert self.held_out is not None
        help_, decoupled = self.held_out.help, self.penalty.decoupled

        def measured() -> tuple[MeasuredHelp, Tree, Tree]:
            g = plain if averaged else mean(plain, self.unequal)
            h = mean(self.held_out.evaluate(params).gradients, self.unequal)  # type: ignore[union-attr]
            found = self.held_out.measured(self._change(result, g, state), g, h, self.shards.leaves)  # type: ignore[union-attr]
            kept = jax.tree.map(lambda ours, instead: jnp.where(help_.helps, ours, instead.astype(ours.dtype)), result, g)
            return found, kept, jax.tree.map(lambda c: jnp.where(help_.helps, c, 0), state[CORRECTION]) if decoupled else None

        def rests() -> tuple[MeasuredHelp, Tree, Tree]:
            return self.held_out.unmeasured, result, state[CORRECTION] if decoupled else None  # type: ignore[union-attr]

        found, result, correction = maybe_cond(help_.measures, measured, rests, both=self.both)
        state = {**state, HELD_OUT: self.held_out.after(found)}
        return result, {**state, CORRECTION: correction} if decoupled else state

    def _learned(
        self, learned: LearnedRadius, params: Tree, plain: Tree, loss: Any, result: Tree, state: State, *, averaged: bool
    ) -> State:
        """``state`` with the next radius, after a look at held-out data, if this step takes one."""

        def measured() -> Any:
            g = plain if averaged else mean(plain, self.unequal)
            held_out_loss, h = mean((found := learned.evaluate(params)).value, self.unequal), mean(found.gradients, self.unequal)
            return learned.slope(self._change(result, g, state), g, h, (held_out_loss, loss), self.shards.leaves)

        slope = maybe_cond(learned.measures, measured, lambda: learned.unmeasured, both=self.both)
        return {**state, RADIUS: learned.after(slope, self.penalty.guards, scaled=self.scaled)}

    def _change(self, result: Tree, plain: Tree, state: State) -> Tree:
        """G − g, of gradients that are the same on all shards."""
        return state[CORRECTION] if self.penalty.decoupled else jax.tree.map(lambda a, b: widened(a) - widened(b), result, plain)

    def _measured(self, first: Tree, second: Tree | None = None, rise: Any = jnp.nan) -> Measured:
        """The norm of ``first``, and its cosine with ``second``, NaN without; ``rise``: see ``Measurement``."""
        alignment = self._alignment(first, second, rise)
        if not self.measures:
            return Measured(alignment=alignment)
        norm = self._norm(first)
        if second is None:
            return Measured(norm, jnp.nan * norm, alignment)
        product = inner_product(self._selected(first), self._selected(second), self._selected_shards())
        return Measured(norm, safe_ratio(product, norm * self._norm(second)), alignment)

    def _alignment(self, first: Tree, second: Tree | None, rise: Any) -> Measurement | None:
        """What the radius is updated with, averaged over shards, if it sets itself."""
        if self.penalty.aligned_radius is None:
            return None
        dtype = self.state[RADIUS]["log_radius"].dtype
        numbers: list[Any] = [jnp.nan] * 4
        if second is not None:
            pairs = ((first, first), (first, second), (second, second))
            products = [inner_product(self._selected(a), self._selected(b), self._selected_shards()) for a, b in pairs]
            numbers = mean([*products, rise], self.unequal)
        return Measurement(*(jnp.asarray(number, dtype) for number in numbers))

    def _guarded(self, total: Tree, plain: Tree, measured: Measured) -> Tree:
        """``total``, or ``plain`` if what a perturbed point gave cannot be used where the radius sets itself."""
        alignment, rule = measured.alignment, self.penalty.aligned_radius
        if alignment is None or rule is None or self.scaled:
            return total
        usable = rule.usable(alignment, self.penalty.guards, jnp)
        if self.penalty.difference == "central":  # a second perturbed point is part of the result
            usable &= mean(jnp.isfinite(self._norm(total)).astype(alignment.rise.dtype), self.unequal) == 1
        if rule.every > 1:
            usable |= self.state[RADIUS]["steps"] % rule.every != 0
        return jax.tree.map(lambda ours, instead: jnp.where(usable, ours, instead.astype(ours.dtype)), total, plain)

    def _with_next_radius(self, state: State, measured: Measured) -> State:
        """``state`` with the radius of the next step, where it sets itself."""
        rule, alignment = self.penalty.aligned_radius, measured.alignment
        if rule is None or alignment is None:
            return state
        before = RadiusState(**state[RADIUS])
        after = rule.update(before, alignment, self.penalty.guards, jnp, scaled=self.scaled)
        if rule.every > 1:
            rests = before.steps % rule.every != 0
            held = RadiusState(*(jnp.where(rests, old, new) for old, new in zip(before, after, strict=True)))
            after = held._replace(steps=after.steps)
        after = maybe_cond(self.values.fresh, lambda: after, lambda: before, both=True)
        return {**state, RADIUS: {name: value.astype(state[RADIUS][name].dtype) for name, value in after._asdict().items()}}

    def _norm(self, gradients: Tree) -> jax.Array:
        return gradient_norm(gradients, self.selected, self.shards.leaves)

    def _selected(self, tree: Tree) -> list[Any]:
        return [leaf for leaf, chosen in zip(jax.tree.leaves(tree), self.selected, strict=True) if chosen]

    def _selected_shards(self) -> list[tuple[str, ...]]:
        return [axes for axes, chosen in zip(self.shards.leaves, self.selected, strict=True) if chosen]

    def _run(self, plan: Plan, params: Tree, first: Evaluated | None = None) -> tuple[Evaluated, State, Measured]:
        """The passes of ``plan``, of a step that acts; ``first``: the result of the first one, if it has been evaluated already.

        Returns:
            Loss and aux of the first pass with the sum of weighted gradients, the state with what the direction and the mask keep, and
            what was measured.
        """
        evaluate = {"loss": self.evaluate, "ascent": self.ascend or self.evaluate}
        terms: list[tuple[Any, Tree]] = []
        results: Any = first
        state = self.state
        point, offset = params, 0.0  # where the direction was formed: later passes are evaluated that much further along it
        perturb: Callable[[Tree, Tree | None], tuple[Tree, Any]] | None = None
        vector: Tree = None
        distance: Any = 0.0
        plain: Tree = None  # the gradients between which the cosine is measured
        moved: Tree = None
        rise: Any = jnp.nan
        for i, this in enumerate(plan.passes):
            at = params
            if this.offset != 0:
                if perturb is None:  # no pass gave the direction, because it needs no gradient
                    perturb, state = self._prepared(params, None)
                    vector, distance = perturb(params, None)
                at = perturbed(point, vector, (this.offset - offset) * distance, self.selected)
            evaluated = first if i == 0 and first is not None else evaluate[this.of](at)
            if this.offset == 0 and plain is None:
                plain = evaluated.gradients
            elif this.offset != 0 and this.of == "loss" and this.keeps == "sum" and moved is None:
                moved = evaluated.gradients
                rise = 0.0 if results is None else (evaluated.value - results.value) * (1.0 if this.offset > 0 else -1.0)
            if results is None:
                self._check_alike(this, evaluated, params)
                results = evaluated
            if this.gives_direction:
                if perturb is None:
                    perturb, state = self._prepared(params, evaluated.gradients)
                point, offset = at, this.offset
                vector, distance = perturb(at, evaluated.gradients)
            if this.keeps == "apart":
                terms.append((plan.plain_weight, evaluated.gradients))
            elif this.keeps == "sum":
                terms.append((self._weight(plan, this, evaluated.gradients), evaluated.gradients))
        total = weighted_sum(terms)
        if plain is None:
            return results._replace(gradients=total), state, self._measured(results.gradients)
        measured = self._measured(plain, moved, rise)
        return results._replace(gradients=self._guarded(total, plain, measured)), state, measured

    def _weight(self, plan: Plan, this: Pass, gradients: Tree) -> Any:
        """The factor of a pass's gradient in the sum; for the plain gradient the mixing determines it."""
        mixing = self.penalty.mixing
        if this.offset != 0:
            return this.weight
        if mixing.plain_gradient == "normalized":
            return weigh_plain(mixing, plan.plain_weight, self._norm(gradients))
        return weigh_plain(mixing, this.weight, None)

    def _prepared(self, params: Tree, gradients: Tree | None) -> tuple[Callable[[Tree, Tree | None], tuple[Tree, Any]], State]:
        """The function that forms a perturbation, and the state with this step's average and mask, which are computed once a step.

        ``gradients``: what the direction is formed from at θ, None if it needs none. The function takes a point and the gradient there,
        and returns the vector and the distance along it that corresponds to an offset of 1.
        """
        penalty = self.penalty
        state = self.state if gradients is None else self._averaging(gradients)
        masks, state = self._masks(params, gradients, state)
        average = filled(params, state[AVERAGE]) if AVERAGE in state else None

        def perturb(at: Tree, gradients: Tree | None) -> tuple[Tree, Any]:
            inputs = DirectionInputs(at, gradients, average, self.values.step, self.selected, self.shards.leaves, self.values.radius)
            vector, measured = ascent_direction(penalty.direction, inputs)
            distance = self.values.radius
            if penalty.power == 1:
                ratio = safe_ratio(1.0, self._norm(measured))
                distance = jnp.asarray(distance, ratio.dtype) * ratio
            return vector if masks is None else masked(vector, masks), distance

        return perturb, state

    def _masks(self, params: Tree, gradients: Tree | None, state: State) -> tuple[list[jax.Array | None] | None, State]:
        """Leaf by leaf, whether each coordinate is perturbed; None without a mask of coordinates."""
        mask = self.penalty.mask
        if mask is None or mask.level != "coordinates":
            return None, state
        refresh = self.values.step // mask.refresh_every

        def chosen(gradients: Tree | None) -> list[jax.Array | None]:
            found = leaves_like(params, coordinates(mask, MaskInputs(params, gradients, refresh, self.selected)))
            return [leaf if wanted else None for leaf, wanted in zip(found, self.selected, strict=True)]

        if not mask.needs_gradient:
            return chosen(None), state
        period = jnp.asarray(refresh, jnp.int32)
        masks = jax.lax.cond(
            period == state[PERIOD], lambda: leaves_like(params, state[MASK]), lambda: chosen(mean(gradients, self.unequal))
        )
        return masks, {**state, MASK: jax.tree.structure(params).unflatten(masks), PERIOD: period}

    def _rest(self, evaluated: Evaluated) -> tuple[Evaluated, State, Measured]:
        """A step at which the penalty does not act: the EMA is still updated with the gradient."""
        return evaluated, self._averaging(evaluated.gradients), self._measured(evaluated.gradients)

    def _averaging(self, gradients: Tree) -> State:
        """The state, its EMA updated with ``gradients`` if the direction averages those."""
        direction = self.penalty.direction
        if direction.averages != "gradients":
            return self.state
        return update_ema(self.state, direction.average_decay, mean(gradients, self.unequal))

    def _mixed(self, plain: Tree | None, total: Tree, state: State) -> tuple[Tree, State]:
        """The result, from the plain gradient and the weighted sum, which is the plain gradient too where the penalty does not act."""
        penalty, values = self.penalty, self.values
        plan = penalty.plan(values, separate_ascent=self.ascend is not None)
        inputs = MixingInputs(total, plain, self.shards.leaves, plan.plain_weight)
        if penalty.decoupled:
            return plain, {**state, CORRECTION: with_dtypes_of(state[CORRECTION], correction(inputs))}
        if penalty.reuse is not None:
            kept, a = state[REUSED], penalty.reuse.a
            result, kept = maybe_cond(
                values.fresh,
                lambda: (total, with_dtypes_of(kept, orthogonal_part(inputs))),
                lambda: (maybe_cond(values.acts, lambda: add_reused(plain, kept, a, self.shards.leaves), lambda: plain), kept),
            )
            return result, {**state, REUSED: kept}
        if penalty.mixing.plain_gradient == "apart":
            return maybe_cond(values.fresh, lambda: mix(penalty.mixing, inputs), lambda: plain), state
        return total, state

    def _check_alike(self, this: Pass, evaluated: Evaluated, params: Tree) -> None:
        """Raise if loss and aux come from ``ascent`` or ``fun``, depending on a traced condition, and differ in form."""
        if this.of == "loss" or isinstance(self.values.fresh, bool):
            return
        plain = jax.eval_shape(self.evaluate, params)
        ours, theirs = (jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), e[:2]) for e in (evaluated, plain))
        if ours != theirs:
            raise TypeError(
                "ascent must return a loss and aux of the same structure, shapes and dtypes as fun where the strength is 0 at some steps, "
                f"because those steps return fun's; got {ours} from ascent and {theirs} from fun. "
                "Leave what depends on the size of the batch out of aux."
            )

    def _exact(self, params: Tree) -> tuple[Evaluated, State, Measured]:
        """g + strength·H·d, with H·d the forward derivative of the gradient along d."""

        def gradients(at: Tree) -> tuple[Tree, tuple[jax.Array, Any]]:
            evaluated = self.evaluate(at)
            return evaluated.gradients, (evaluated.value, evaluated.aux)

        first, derivative, (value, aux) = jax.linearize(gradients, params, has_aux=True)
        leaves, structure = jax.tree.flatten(first)
        direction = [leaf if chosen else jnp.zeros_like(leaf) for leaf, chosen in zip(leaves, self.selected, strict=True)]
        scale = self.values.strength
        if self.penalty.power == 1:
            ratio = safe_ratio(1.0, self._norm(first))
            scale = jnp.asarray(scale, ratio.dtype) * ratio
        product = derivative(per_shard(structure.unflatten(direction), self.axes))
        return Evaluated(value, aux, weighted_sum([(1.0, first), (scale, product)])), self.state, self._measured(first)


def _gradients(found: tuple[Evaluated, State, Measured]) -> tuple[Tree, State, Measured]:
    """All but loss and aux, which need not pass through a ``cond`` that does not change them."""
    return found[0].gradients, *found[1:]
