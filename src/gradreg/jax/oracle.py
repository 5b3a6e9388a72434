"""What ``value_and_grad`` and ``grad`` return: functions of parameters, batch and state to the regularized gradient and the next state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from gradreg.jax.amounts import amounts
from gradreg.jax.data_parallel import check_bound, mean, per_shard
from gradreg.jax.evaluation import evaluation
from gradreg.jax.memory import State, carries_state, check_state, initial
from gradreg.jax.perturbation import Tree
from gradreg.jax.selection import selection
from gradreg.jax.step import Step
from gradreg.penalties import GradientPenalty

Scope = Literal["local", "global"]


@dataclass(frozen=True, eq=False)
class RegularizedValueAndGrad:
    """From ``(params, *args, step=0, **kwargs)`` to loss and gradient; for a penalty that carries a state, with ``state=``, to it too.

    Made by ``value_and_grad``, whose arguments these are.
    """

    fun: Callable[..., Any]
    penalty: GradientPenalty | None
    has_aux: bool
    parameters: Callable[[str, Any], bool] | None
    ascent: Callable[..., Any] | None
    axes: tuple[str, ...]
    scope: Scope

    def init(self, params: Tree) -> State:
        """The state before the first step, for penalties that carry one: a dictionary of arrays, placed as ``params`` are.

        Raises:
            ValueError: the penalty carries none, and is called without.
        """
        if self.penalty is None or not carries_state(self.penalty):
            raise ValueError(
                f"init is for penalties that carry a state from step to step; got {self.penalty}. "
                "Leave it out, and call the function without state=; penalty.has_memory says which is which."
            )
        return initial(self.penalty, params, self._selected(params))

    def __call__(self, params: Tree, /, *args: Any, step: Any = 0, **kwargs: Any) -> tuple[Any, ...]:
        selected, penalty = self._selected(params), self.penalty
        state: State = {}
        if penalty is not None and carries_state(penalty):
            state = kwargs.pop("state", None)
            check_state(state, penalty, params, selected)
        check_bound(self.axes)
        shared, unequal = (self.axes, ()) if self.scope == "global" else ((), self.axes)
        evaluate = evaluation(self.fun, "fun", self.has_aux, shared, args, kwargs)
        params = per_shard(params, self.axes)
        if penalty is None:
            value, aux, gradients = evaluate(params)
            value, gradients = mean((value, gradients), unequal)
        else:
            ascend = None if self.ascent is None else evaluation(self.ascent, "ascent", self.has_aux, shared, args, kwargs)
            this = Step(penalty, amounts(penalty, step), evaluate, ascend, selected, self.axes, unequal, state)
            (value, aux, gradients), state = this.run(params)
        found = ((value, aux) if self.has_aux else value), gradients
        return (*found, state) if carries_state(penalty) else found

    def _selected(self, params: Tree) -> list[bool]:
        return selection(params, self.parameters, None if self.penalty is None else self.penalty.mask)


@dataclass(frozen=True, eq=False)
class RegularizedGrad:
    """What ``both`` returns without the loss. Made by ``grad``."""

    both: RegularizedValueAndGrad

    def init(self, params: Tree) -> State:
        """As ``RegularizedValueAndGrad.init``."""
        return self.both.init(params)

    def __call__(self, params: Tree, /, *args: Any, step: Any = 0, **kwargs: Any) -> Any:
        value, gradients, *state = self.both(params, *args, step=step, **kwargs)
        found = [gradients, value[1]] if self.both.has_aux else [gradients]
        return tuple(found + state) if len(found + state) > 1 else gradients
