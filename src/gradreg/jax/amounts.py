"""A penalty's numbers at one step, known when the program is traced or found when it runs, and decisions that depend on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gradreg import checks
from gradreg.mixing import Reuse
from gradreg.penalties import GradientPenalty
from gradreg.schedules import Value, as_schedule

T = TypeVar("T")
Condition = bool | jax.Array
"""A bool where it is known when tracing, else a traced one."""


@dataclass(frozen=True)
class Amounts:
    """A penalty's numbers at one step, each a Python number where it is known when tracing, else a traced scalar.

    Args:
        step: the optimizer step.
        acts: whether the strength differs from 0.
        fresh: whether it acts and finds its part of the gradient at this step, instead of reusing it (``Reuse``).
        strength: λ or γ.
        radius: r or ε; None for an exact penalty.
        coefficient: c = strength / radius; None for an exact penalty.
    """

    step: int | jax.Array
    acts: Condition
    fresh: Condition
    strength: Any
    radius: Any
    coefficient: Any


def amounts(penalty: GradientPenalty, step: Any) -> Amounts:
    """The numbers of ``penalty`` at ``step``: an int ≥ 0, or an integer scalar array, traced or not."""
    if not isinstance(step, (jax.Array, np.ndarray)):
        step = checks.whole("step", step, minimum=0, remedy="Pass the number of optimizer steps done so far.")
        strength = penalty.strength_at(step)
        acts = strength != 0.0
        fresh = acts and not penalty.reuses_at(step)
        return Amounts(step, acts, fresh, strength, penalty.radius_at(step), penalty.coefficient_at(step))
    if jnp.shape(step) != () or not jnp.issubdtype(step.dtype, jnp.integer):
        raise TypeError(
            f"step must be one integer; got an array of shape {jnp.shape(step)} and dtype {step.dtype}. Pass the optimizer's step count."
        )
    step = jnp.asarray(step, int)  # the default integers divide to the default floats: float64 where that is enabled
    strength, radius = _at(penalty.strength, step), None if penalty.radius is None else _at(penalty.radius, step)
    acts = strength != 0.0 if isinstance(strength, float) or as_schedule(penalty.strength).bounds()[0] <= 0.0 else True
    fresh = _both(acts, step % penalty.mixing.k == 0) if isinstance(penalty.mixing, Reuse) and penalty.mixing.k > 1 else acts
    if radius is None:
        coefficient = None
    elif penalty.coefficient_is_one:
        coefficient = 1.0
    elif isinstance(strength, float) and isinstance(radius, float):
        coefficient = strength / radius
    else:
        coefficient = jnp.where(strength == 0.0, 0.0, strength / jnp.where(strength == 0.0, 1.0, radius))
    return Amounts(step, acts, fresh, strength, radius, coefficient)


def decided(condition: Condition, if_true: Callable[[], T], if_false: Callable[[], T]) -> T:
    """The result of one of the two functions; where ``condition`` is traced, the program decides when it runs and pays for that one."""
    if isinstance(condition, bool):
        return if_true() if condition else if_false()
    return jax.lax.cond(condition, if_true, if_false)


def _both(first: Condition, second: jax.Array) -> Condition:
    if isinstance(first, bool):
        return second if first else False
    return first & second


def _at(value: Value, step: Any) -> Any:
    return as_schedule(value).evaluate(step, jnp)
