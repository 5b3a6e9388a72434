"""The gradient oracle of a JAX task, which counts what it spends; JAX is imported when one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gradreg.penalties import GradientPenalty
from gradreg.study.tasks import TaskError


class CountedValueAndGrad:
    """``gradreg.jax.value_and_grad`` whose calls outside ``jax.jit`` are counted."""

    def __init__(self, fun: Callable[..., Any], penalty: GradientPenalty | None, state: bool, options: Mapping[str, Any]) -> None:
        from gradreg.jax import value_and_grad

        self._both = value_and_grad(fun, penalty, **options)
        stateful = self._both.carries_state
        if stateful and not state:
            raise TaskError(
                f"state must be True for a penalty that carries a state; got {penalty}. Write run.value_and_grad(loss, state=True), pass "
                "state=state, and take three values."
            )
        self._penalty, self._stateful, self._state = penalty, stateful, state
        self.calls = 0
        self.evaluations: float = 0

    def init(self, params: Any) -> Any:
        """The state before the first step; empty for a penalty that has none."""
        return self._both.init(params) if self._stateful else {}

    def __call__(self, params: Any, /, *args: Any, **kwargs: Any) -> Any:
        import jax
        from jax.core import Tracer

        given = {"state": kwargs.pop("state")} if "state" in kwargs and self._state else {}
        returned = self._both(params, *args, **kwargs, **(given if self._stateful else {}))
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, args, kwargs))):
            step = int(kwargs.get("step", self.calls))
            own = 1 if self._penalty is None else self._penalty.evaluations_at(step)
            self.evaluations += own if self._both.held_out is None else self._looked(own, given["state"], returned[-1])
            self.calls += 1
        return (*returned, {}) if self._state and not self._stateful else returned

    def _looked(self, own: float, before: Any, after: Any) -> float:
        """The evaluations of a step that may look at held-out data, and at which the penalty may be off."""
        looked = self._both.looked(before, after)
        return (own if looked or self._both.is_on(after) else 1) + looked
