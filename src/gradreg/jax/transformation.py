"""The penalty as an optax transformation, for training loops that take an optimizer and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gradreg import checks
from gradreg.extras import needing
from gradreg.penalties import GradientPenalty

with needing("gradreg.jax.transformation", "jax"):
    import jax.numpy as jnp
    import optax

    from gradreg.jax.loss_fn import Evaluated
    from gradreg.jax.masks import selected_leaves
    from gradreg.jax.regularizer import check_parts
    from gradreg.jax.shards import Shards
    from gradreg.jax.state import State, carries_state, initial, radius_of
    from gradreg.jax.step import Step
    from gradreg.jax.step_values import step_values


class RegularizeState(NamedTuple):
    """What ``regularize`` carries from step to step.

    Args:
        count: the optimizer steps so far, the clock of schedules and draws.
        memory: the penalty's state; empty for one without.
    """

    count: Any
    memory: State


def regularize(penalty: GradientPenalty, *, parameters: Callable[[str, Any], bool] | None = None) -> optax.GradientTransformationExtraArgs:
    """Turn the plain gradient into the regularized one: the first link of a chain, before clipping and the optimizer.

    ::

        tx = optax.chain(regularize(gradreg.sam(rho=0.05)), optax.adamw(1e-3))
        updates, state = tx.update(grads, state, params, grad_fn=lambda at: jax.grad(loss)(at, x, y))

    The gradient that the loop has computed is the first pass; the others are evaluations of ``grad_fn`` at perturbed parameters, with the
    same batch. The step is counted here, so that schedules and warm-ups need no ``step=``.

    Args:
        penalty: what is penalized; not a decoupled one, or one whose radius is learned from held-out data.
        parameters: ``(name, leaf) -> bool``: as in ``gradreg.jax.value_and_grad``.

    Returns:
        A transformation whose ``update(updates, state, params, *, grad_fn)`` takes the gradient at ``params`` and ``grad_fn``, from
        parameters to the gradient there. Both are those of the whole batch: under ``shard_map``, averaged over the shards.

    Cost: the evaluations of the penalty, the loop's own among them. A direction that needs no gradient (``remembered``, ``random_sam``)
    has no use for that one, and costs 1 more here.

    Raises:
        TypeError, ValueError: for a penalty of the wrong kind; when called, without ``params`` or ``grad_fn``.

    SAM on ½θ², where every gradient is the point at which it is taken: G = θ + ρ·sign(θ).

    >>> import gradreg, jax.numpy as jnp
    >>> tx = regularize(gradreg.sam(rho=0.5))
    >>> theta = jnp.array(-2.0)
    >>> float(tx.update(theta, tx.init(theta), theta, grad_fn=lambda at: at)[0])
    -2.5
    """
    if not isinstance(penalty, GradientPenalty):  # type: ignore[unnecessary-isinstance]  # loops are not type-checked
        raise TypeError(f"penalty must be a GradientPenalty; got {checks.describe(penalty)}. Use gradreg.sam(rho=0.05), say.")
    if penalty.decoupled:
        raise ValueError(
            f"penalty must not be decoupled, because one part of its result passes by the optimizer; got {penalty}. "
            "Use gradreg.jax.value_and_grad and decoupled_update."
        )
    if penalty.learned_radius is not None:
        raise ValueError(
            f"penalty must not learn its radius from held-out data, of which a transformation of gradients sees none; got {penalty}. Use "
            "AutoRadius(), or gradreg.jax.value_and_grad with held_out."
        )
    check_parts(penalty)

    def selected(params: Any) -> list[bool]:
        return selected_leaves(params, parameters, penalty.mask)

    def init(params: Any) -> RegularizeState:
        return RegularizeState(jnp.zeros((), jnp.int32), initial(penalty, params, selected(params)) if carries_state(penalty) else {})

    def update(updates: Any, state: Any, params: Any = None, *, grad_fn: Any = None, **_: Any) -> tuple[Any, RegularizeState]:
        if params is None:
            raise ValueError(
                "params must be given to update(), because they are perturbed; got None. Call update(grads, state, params, ...)."
            )
        if not callable(grad_fn):
            raise TypeError(
                f"grad_fn must be given to update(), because the penalty evaluates further gradients; got {checks.describe(grad_fn)}. "
                "Call update(grads, state, params, grad_fn=lambda at: jax.grad(loss)(at, batch))."
            )

        def evaluate(at: Any) -> Evaluated:
            return Evaluated(jnp.zeros(()), None, updates if at is params else grad_fn(at))

        chosen = selected(params)
        shards = Shards([()] * len(chosen))
        this = Step(
            penalty, step_values(penalty, state.count, radius_of(state.memory)), evaluate, None, chosen, (), (), state.memory, shards
        )
        found, memory, _measured = this.run(params)
        return found.gradients, RegularizeState(optax.safe_increment(state.count), memory)

    return optax.GradientTransformationExtraArgs(init, update)
