"""Whether a penalty helps: its switch as part of the state, and what a step measures (``gradreg.held_out`` has the rule)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradreg.held_out import HeldOut, HelpState
from gradreg.jax.loss_fn import Evaluate
from gradreg.jax.norms import Tree, widened
from gradreg.penalties import GradientPenalty
from gradreg.plan import Condition, StepValues

COUNT, HELPS_NOW = "count", "helps_now"


def initial_help(rule: HeldOut, params: Tree) -> dict[str, Any]:
    """The switch before the first step: the averages, the penalized steps so far, and whether the penalty is on."""
    dtype = jnp.result_type(*(widened(leaf) for leaf in jax.tree.leaves(params)))
    averages = {name: jnp.asarray(value, dtype) for name, value in rule.initial._asdict().items()}
    return {**averages, COUNT: jnp.zeros((), jnp.int32), HELPS_NOW: jnp.ones((), bool)}


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
        return Help(jnp.where(measures, self.state["helps"] > 0.5, self.state[HELPS_NOW]), measures, self.fresh)

    def after(self, product: Any) -> dict[str, Any]:
        """The switch after a step that measured ``product``, NaN if it did not."""
        help_, before = self.help, HelpState(**{name: self.state[name] for name in HelpState._fields})
        after = self.rule.update(before, jnp.asarray(product, before.mean.dtype), jnp)
        averages = {name: value.astype(self.state[name].dtype) for name, value in after._asdict().items()}
        count = self.state[COUNT] + jnp.asarray(help_.penalized, jnp.int32)
        return {**averages, COUNT: count, HELPS_NOW: jnp.asarray(help_.helps, bool)}
