"""The numbers of a penalty at a step that a program may be told only when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradreg import checks
from gradreg.penalties import GradientPenalty
from gradreg.plan import StepValues
from gradreg.schedules import PYTHON


class _WherePossible:
    """``gradreg.schedules.Operations`` of plain numbers, and of arrays where a strength or a radius is one."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            return getattr(jnp if any(isinstance(arg, jax.Array) for arg in args) else PYTHON, name)(*args)

        return operation


def step_values(penalty: GradientPenalty, step: Any, radius: Any = None) -> StepValues:
    """The numbers of ``penalty`` at ``step``: an int ≥ 0, an integer scalar array, traced or not, or None where it does not matter.

    ``radius``: what a radius that sets itself is worth at this step.
    """
    operations: Any = _WherePossible()
    if step is None:
        if penalty.depends_on_step:
            raise TypeError(
                f"step must be given, because {penalty} depends on it; got none. Pass step=, the number of optimizer steps done so far."
            )
        return _not_finite_unless_valid(replace(penalty.at(0, radius=radius, ops=operations), step=None), True)
    if not isinstance(step, (jax.Array, np.ndarray)):
        number = checks.whole("step", step, minimum=0, remedy="Pass the number of optimizer steps done so far.")
        return _not_finite_unless_valid(penalty.at(number, radius=radius, ops=operations), True)
    if jnp.shape(step) != () or not jnp.issubdtype(step.dtype, jnp.integer):
        raise TypeError(
            f"step must be one integer; got an array of shape {jnp.shape(step)} and dtype {step.dtype}. Pass the optimizer's step count."
        )
    if not isinstance(step, Tracer):
        checks.whole("step", int(step), minimum=0, remedy="Pass the number of optimizer steps done so far.")
    # The default integers divide to the default floats: float64 where that is enabled.
    values = penalty.at(jnp.asarray(step, int), radius=radius, ops=jnp)
    signed = isinstance(step, Tracer) and jnp.issubdtype(step.dtype, jnp.signedinteger)
    return _not_finite_unless_valid(values, step >= 0 if signed and penalty.depends_on_step else True)


def _not_finite_unless_valid(values: StepValues, valid: Any) -> StepValues:
    """``values``, NaN where a number that is known only when the program runs turns out negative, so that the gradient is not finite."""
    if values.acts is False:
        return values
    for number in (values.strength, values.radius):
        if isinstance(number, jax.Array):
            valid = valid & (number >= 0)
    if valid is True:
        return values

    def checked(number: Any) -> Any:
        return None if number is None else jnp.where(valid, number, jnp.nan)

    acts, fresh = (True if given is True else given | ~valid for given in (values.acts, values.fresh))
    coefficient = values.coefficient if isinstance(values.coefficient, float) else checked(values.coefficient)
    strength, radius = checked(values.strength), checked(values.radius)
    return replace(values, strength=strength, radius=radius, coefficient=coefficient, acts=acts, fresh=fresh)
