"""What a step measures on held-out data, and the switch, as part of the state, by which it tells whether a penalty helps.

The rules are those of ``gradreg.held_out``, and of ``gradreg.lets`` for a radius that is learned from held-out data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradreg.auto_radius import Guards
from gradreg.held_out import HeldOut, HelpState
from gradreg.jax.loss_fn import Evaluate
from gradreg.jax.norms import Tree, inner_product, widened
from gradreg.lets import LETS, LetsState, Slope
from gradreg.penalties import GradientPenalty
from gradreg.plan import Condition, StepValues

COUNT, HELPS_NOW, NOISE = "count", "helps_now", "noise"


class MeasuredHelp(NamedTuple):
    """What one step measured, NaN if it did not: ⟨G − g, h⟩, and ``HeldOut.excess``, None without a second condition."""

    product: Any
    excess: Any


def initial_help(rule: HeldOut, params: Tree) -> dict[str, Any]:
    """The switch before the first step: the averages, the penalized steps so far, and whether the penalty is on."""
    dtype = jnp.result_type(*(widened(leaf) for leaf in jax.tree.leaves(params)))

    def averages(state: HelpState) -> dict[str, Any]:
        return {name: jnp.asarray(value, dtype) for name, value in state._asdict().items()}

    waiting = {} if rule.waiting is None else {NOISE: averages(rule.waiting)}
    return {**averages(rule.initial), **waiting, COUNT: jnp.zeros((), jnp.int32), HELPS_NOW: jnp.asarray(rule.waiting is None)}


def check_measurable(penalty: GradientPenalty, *, separate_ascent: bool) -> None:
    """Raise if no pass of a step gives the plain gradient, to which the regularized one is compared.

    Raises:
        ValueError: for an exact penalty, and with c = 1 for a direction that needs no gradient or comes from another function.
    """
    hidden = penalty.coefficient_is_one and (separate_ascent or not penalty.direction.needs_gradient)
    if penalty.difference == "exact" or hidden:
        raise ValueError(
            f"held_out must be left out where no pass gives the plain gradient, to which the regularized one is compared; got it with "
            f"{penalty}. Use sam(), fgr() or gnp() without ascent."
        )


class Help(NamedTuple):
    """The switch in one step.

    Args:
        helps: whether the penalty is on.
        measures: whether the step measures, if it is penalized.
        penalized: whether it would be, if the penalty is on.
    """

    helps: Condition
    measures: Condition
    penalized: Condition

    def values(self, values: StepValues) -> StepValues:
        """``values`` of the passes: those of a step without a penalty where it is off and nothing is measured."""
        runs = self.helps | self.measures
        return replace(values, acts=values.acts & runs, fresh=values.fresh & runs)

    def shown(self, values: StepValues) -> StepValues:
        """``values`` as metrics tell them: without strength while the penalty is off, whatever is measured."""
        return replace(values, strength=jnp.where(self.helps, values.strength, 0.0), acts=values.acts & self.helps)


@dataclass(frozen=True)
class HeldOutStep:
    """The held-out side of one step.

    Args:
        rule: the specification.
        evaluate: loss and gradient on held-out data.
        state: the switch after the step before.
        fresh: whether the penalty computes its part of the gradient at this step, if it is on.
    """

    rule: HeldOut
    evaluate: Evaluate
    state: dict[str, Any]
    fresh: Condition

    @property
    def help(self) -> Help:
        """A decision holds from the next measurement on, as in PyTorch."""
        due = self.state[COUNT] % self.rule.every == 0
        measures = due & self.fresh
        decided = self.state["helps"] > 0.5
        if NOISE in self.state:
            decided &= self.state[NOISE]["helps"] > 0.5
        return Help(jnp.where(measures, decided, self.state[HELPS_NOW]), measures, self.fresh)

    def measured(self, change: Tree, plain: Tree, held_out: Tree, shards: Sequence[Any]) -> MeasuredHelp:
        """From G − g, g and h; nothing is measured where one of the two vectors of a product is 0, as in PyTorch."""
        dtype = self.state["mean"].dtype

        def inner(first: Tree, second: Tree) -> Any:
            return jnp.asarray(inner_product(first, second, shards), dtype)

        own, changed = inner(held_out, held_out), inner(change, change)
        product = jnp.where((own > 0) & (changed > 0), inner(change, held_out), jnp.nan)
        if self.rule.waiting is None:
            return MeasuredHelp(product, None)
        squared, along = inner(plain, plain), inner(plain, held_out)
        reached = (own > 0) & (squared > 0) & (along != 0)  # a product of exactly 0: no parameter has both gradients
        return MeasuredHelp(product, jnp.where(reached, self.rule.excess(squared, along), jnp.nan))

    @property
    def unmeasured(self) -> MeasuredHelp:
        """Of a step that does not measure."""
        nan = jnp.asarray(jnp.nan, self.state["mean"].dtype)
        return MeasuredHelp(nan, None if self.rule.waiting is None else nan)

    def after(self, measured: MeasuredHelp) -> dict[str, Any]:
        """The switch after a step that measured this."""
        count = self.state[COUNT] + jnp.asarray(self.help.penalized, jnp.int32)
        product = jnp.asarray(measured.product, self.state["mean"].dtype)
        averages = _kept(self.rule.update(_state(self.state), product, jnp), self.state)
        if self.rule.waiting is not None:
            waiting = _state(self.state[NOISE])
            excess = jnp.asarray(measured.excess, waiting.mean.dtype)
            averages[NOISE] = _kept(self.rule.wait(waiting, excess, self.state[COUNT], jnp), self.state[NOISE])
        return {**averages, COUNT: count, HELPS_NOW: jnp.asarray(self.help.helps, bool)}


@dataclass(frozen=True)
class LearnedRadius:
    """The held-out side of one step for a radius that is learned.

    Args:
        rule: the specification.
        evaluate: loss and gradient on held-out data.
        state: that of the radius after the step before.
        fresh: whether the penalty computes its part of the gradient at this step.
    """

    rule: LETS
    evaluate: Evaluate
    state: dict[str, Any]
    fresh: Condition

    @property
    def measures(self) -> Condition:
        """Whether the step measures."""
        return (self.state["steps"] % self.rule.every == 0) & self.fresh

    @property
    def unmeasured(self) -> Any:
        """Of a step that does not measure."""
        return jnp.asarray(jnp.nan, self.state["log_radius"].dtype)

    def slope(self, change: Tree, plain: Tree, held_out: Tree, losses: tuple[Any, Any], shards: Sequence[Any]) -> Any:
        """From G − g, g, h and the losses on held-out data and on the batch: see ``LETS.slope`` and ``Slope``."""
        dtype = self.state["log_radius"].dtype
        between = jax.tree.map(lambda h, g: widened(h) - widened(g), held_out, plain)

        def inner(first: Tree, second: Tree) -> Any:
            return jnp.asarray(inner_product(first, second, shards), dtype)

        squared, changed = inner(between, between), inner(change, change)
        held_out_loss, loss = (jnp.asarray(one, dtype) for one in losses)
        slope = self.rule.slope(held_out_loss, loss, inner(between, change))
        # A vector of 0 says nothing, as in PyTorch.
        slope = jnp.where((changed > 0) & (squared > 0) & jnp.isfinite(slope), slope, jnp.nan)
        return jnp.where(jnp.isfinite(squared + loss) & ~jnp.isfinite(changed), jnp.inf, slope)

    def after(self, slope: Any, guards: Guards, *, scaled: bool) -> dict[str, Any]:
        """The state after a step that measured this."""
        before = LetsState(**self.state)
        after = self.rule.update(before, Slope(slope), guards, jnp, scaled=scaled)
        kept = LetsState(*(jnp.where(self.measures, new, old) for new, old in zip(after, before, strict=True)))
        kept = kept._replace(steps=before.steps + jnp.asarray(self.fresh, jnp.int32))
        return {name: value.astype(self.state[name].dtype) for name, value in kept._asdict().items()}


def _state(kept: dict[str, Any]) -> HelpState:
    return HelpState(**{name: kept[name] for name in HelpState._fields})


def _kept(state: HelpState, before: dict[str, Any]) -> dict[str, Any]:
    """``state`` in the types that it had, as ``scan`` needs."""
    return {name: value.astype(before[name].dtype) for name, value in state._asdict().items()}
