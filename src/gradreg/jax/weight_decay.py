"""Weight decay that changes over a run, for optax: a hyperparameter that follows a schedule or is set by ``AutoL2``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradreg import checks
from gradreg.extras import needing
from gradreg.schedules import Schedule, as_schedule

with needing("gradreg.jax.weight_decay", "jax"):
    import jax
    import jax.numpy as jnp
    import optax

Mask = Any | Callable[[Any], Any] | None
"""Which parameters decay: a tree of booleans like the parameters, a function that makes it from them, or None for all."""


def scheduled(
    decay: float | Schedule, *, learning_rate: Callable[[Any], Any] | None = None, peak_learning_rate: float | None = None
) -> Callable[[Any], Any]:
    """The schedule as an optax schedule: a function of the step count.

    For ``optax.inject_hyperparams(optax.adamw)(lr, weight_decay=scheduled(...))``.

    Args:
        decay: coefficient λ, ≥ 0: a number or a schedule of the optimizer step.
        learning_rate: the optax schedule of the learning rate; with it the coefficient becomes λ·η/η_max, so that the decay of a step,
            η·λ·η/η_max, follows the learning rate's square.
        peak_learning_rate: η_max, > 0; goes with ``learning_rate``.

    Raises:
        ValueError, TypeError: a coefficient below 0 or not a number, or only one of the last two arguments.

    >>> from gradreg import LogTime
    >>> float(scheduled(LogTime(value=0.5, t0=100))(100))
    0.25
    """
    schedule = decay if isinstance(decay, Schedule) else as_schedule(checks.non_negative("decay", decay))
    low, high = schedule.bounds()
    if low < 0:
        raise ValueError(f"decay must be >= 0 at every step; got the schedule {schedule}, which spans [{low:g}, {high:g}].")
    if (learning_rate is None) != (peak_learning_rate is None):
        raise ValueError(
            "learning_rate and peak_learning_rate must be given both or neither; got only one of them. "
            "Together they make the decay follow the learning rate's square."
        )
    if learning_rate is None or peak_learning_rate is None:
        return lambda count: jnp.asarray(schedule.evaluate(count, jnp))
    peak = checks.positive("peak_learning_rate", peak_learning_rate)
    return lambda count: jnp.asarray(schedule.evaluate(count, jnp) * (learning_rate(count) / peak))


def sgd(
    learning_rate: Any, weight_decay: Any = 0.0, momentum: float | None = None, nesterov: bool = False, mask: Mask = None
) -> optax.GradientTransformation:
    """SGD with coupled weight decay, as in ``torch.optim.SGD`` and not in optax's: λθ is added to the gradient before the momentum.

    Args:
        learning_rate: η, or an optax schedule of it.
        weight_decay: λ, ≥ 0; under ``optax.inject_hyperparams(sgd)`` it may be a schedule, and ``set_weight_decay`` finds it.
        momentum: μ, ≥ 0 and < 1; None for none.
        nesterov: Nesterov's form.
        mask: which parameters decay.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.sgd(learning_rate, momentum, nesterov))


def add_cautious_decayed_weights(weight_decay: Any, mask: Mask = None) -> optax.GradientTransformation:
    """Add λθ to the updates where the sign of θ is that of the update (or either is 0), so that decay never opposes the optimizer.

    Use it where AdamW uses ``optax.add_decayed_weights``: after the preconditioning, before ``scale_by_learning_rate``.

    Args:
        weight_decay: λ, ≥ 0, or a function of the step count under ``optax.inject_hyperparams``.
        mask: which parameters decay.

    Source: Chen et al. 2025, arXiv 2510.12402.
    """

    def decayed(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError("params must be given to update(), because decay needs them; got None. Call update(grads, state, params).")
        return jax.tree.map(lambda u, p: u + jnp.where(u * p >= 0, weight_decay, 0.0) * p, updates, params)

    transformation = optax.stateless(decayed)
    return transformation if mask is None else optax.masked(transformation, mask)


def set_weight_decay(state: Any, l2: float) -> Any:
    """The optimizer's state with ``weight_decay`` set to ``l2`` in every ``inject_hyperparams`` within it; values of exactly 0 stay 0.

    For coefficients that are found during training: ``state = set_weight_decay(state, auto.update(step, loss, accuracy))``. Works under
    ``jit``. Build the optimizer with a number for ``weight_decay``: a schedule would overwrite the value.

    Args:
        state: the optax state, nested as it may be.
        l2: coefficient λ, ≥ 0; a number or a traced one.

    Raises:
        ValueError: no ``weight_decay`` in the state, one that follows a schedule, or a negative number.
    """
    if not isinstance(l2, jax.Array):
        checks.non_negative("l2", l2)
    found = 0

    def injected(node: Any) -> bool:
        return hasattr(node, "hyperparams") and "weight_decay" in node.hyperparams

    def replace(node: Any) -> Any:
        nonlocal found
        if not injected(node):
            return node
        if "weight_decay" in getattr(node, "hyperparams_states", {}):
            raise ValueError(
                "weight_decay must be a number, for set_weight_decay to set it; got an optimizer whose weight_decay follows a schedule. "
                "Build it with a number, say weight_decay=1.0."
            )
        found += 1
        old = jnp.asarray(node.hyperparams["weight_decay"])
        new = jnp.where(old == 0, 0.0, l2).astype(old.dtype)
        return node._replace(hyperparams={**node.hyperparams, "weight_decay": new})

    changed = jax.tree.map(replace, state, is_leaf=injected)
    if not found:
        raise ValueError(
            "state must hold a weight_decay of optax.inject_hyperparams; got none. "
            "Build the optimizer as optax.inject_hyperparams(optax.adamw)(lr, weight_decay=1.0)."
        )
    return changed
