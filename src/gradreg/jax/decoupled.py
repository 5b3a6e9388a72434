"""The part of a decoupled result that is applied to the parameters separately from the optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gradreg.jax.norms import Tree
from gradreg.jax.perturbation import weighted_sum
from gradreg.jax.state import CORRECTION, State


def decoupled_update(params: Tree, state: State, learning_rate: Any) -> Tree:
    """``θ − learning_rate·(P − g)``: the second half of a step of a decoupled penalty, after the optimizer's.

    ::

        value, grads, state = regularized(params, x, y, step=step, state=state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = decoupled_update(optax.apply_updates(params, updates), state, learning_rate)

    Args:
        params: the parameters after the optimizer's update.
        state: what the regularized function returned at this step.
        learning_rate: that of this step, a number or a traced scalar.

    Returns:
        The parameters, in their own dtypes; at steps at which the penalty does not act, unchanged.

    Raises:
        ValueError: the state of a penalty that is not decoupled.

    Source: Yue et al. 2023, arXiv 2305.15817, algorithm 1.

    >>> float(decoupled_update(1.0, {"correction": 0.5}, 0.5))
    0.75
    """
    if not isinstance(state, dict) or CORRECTION not in state:  # type: ignore[unnecessary-isinstance]  # what a step returned, or not
        raise ValueError(
            f"state must be that of a penalty with decoupled=True; got one without {CORRECTION!r}. "
            "Use gradreg.wsam(..., decoupled=True), and pass the state that the step returned."
        )
    return weighted_sum([(1.0, jax.tree.map(jnp.asarray, params)), (-learning_rate, state[CORRECTION])])
