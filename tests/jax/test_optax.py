"""optax sees a gradient like any other in schedules, clipping and MultiSteps; its own SAM is a second oracle for ours."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg
from gradreg.jax import grad, microbatched, value_and_grad

from .cases import arrays, assert_close, problem, squared_error

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("opaque", [False, True])
def test_sam_takes_the_steps_of_optax_contrib_sam(opaque: bool) -> None:
    params, x, y = problem()
    rho, outer = 0.3, optax.sgd(0.1, momentum=0.9)
    theirs = optax.contrib.sam(outer, optax.chain(optax.contrib.normalize(), optax.sgd(rho)), sync_period=2, opaque_mode=opaque)
    plain, ours = jax.grad(squared_error), grad(squared_error, gradreg.sam(rho=rho))
    expected, their_state = params, theirs.init(params)
    actual, our_state = params, outer.init(params)
    for _ in range(3):
        for _ in range(1 if opaque else 2):
            extra = {"grad_fn": lambda at, _: plain(at, x, y)} if opaque else {}
            updates, their_state = theirs.update(plain(expected, x, y), their_state, expected, **extra)
            expected = optax.apply_updates(expected, updates)
        updates, our_state = outer.update(ours(actual, x, y), our_state)
        actual = optax.apply_updates(actual, updates)
    assert_close(actual, expected)


def test_schedules_and_clipping_of_the_final_gradient() -> None:
    """Three steps of clip → SGD with a schedule, against the same written out; the penalty's warm-up reads optax's own count."""
    params, x, y = problem()
    penalty = gradreg.fgr(gamma=0.4, epsilon=0.4).warmup("zero", steps=1)
    rate = optax.linear_schedule(0.2, 0.1, transition_steps=2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))
    oracle = value_and_grad(squared_error, penalty)

    @jax.jit
    def train(params: Any, state: Any) -> Any:
        _, gradients = oracle(params, x, y, step=optax.tree.get(state, "count"))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    actual, state, expected = params, optimizer.init(params), params
    for step, learning_rate in enumerate((0.2, 0.15, 0.1)):
        actual, state = train(actual, state)
        _, gradients = value_and_grad(squared_error, penalty if step else None)(expected, x, y, step=step)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        assert norm > 1.0  # it is clipped
        expected = jax.tree.map(lambda p, g, n=norm, lr=learning_rate: p - lr * g / n, expected, gradients)
    assert train._cache_size() == 1
    assert_close(actual, expected, tolerance=1e-7)  # optax's schedules are evaluated in float32


def test_multi_steps_perturbs_by_each_part_and_microbatched_by_their_sum() -> None:
    params, x, y = problem()
    parts = [a.reshape(2, 4, -1) for a in (x, y)]
    oracle = grad(squared_error, gradreg.fgr(gamma=0.4, epsilon=0.4))
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
    by_parts, state = params, optimizer.init(params)
    for i in range(2):
        updates, state = optimizer.update(oracle(by_parts, parts[0][i], parts[1][i], step=state.gradient_step), state, by_parts)
        by_parts = optax.apply_updates(by_parts, updates)
    each = [oracle(params, parts[0][i], parts[1][i]) for i in range(2)]
    assert_close(by_parts, jax.tree.map(lambda p, a, b: p - 0.1 * (a + b) / 2, params, *each), tolerance=1e-7)  # optax averages in float32
    together = grad(microbatched(squared_error), gradreg.fgr(gamma=0.4, epsilon=0.4))(params, *parts)
    assert_close(together, oracle(params, x, y))
    assert max(float(jnp.abs(t - (a + b) / 2).max()) for t, a, b in zip(*map(jax.tree.leaves, (together, *each)), strict=True)) > 1e-3


def test_a_zero_gradient_where_optax_contrib_normalize_gives_nan() -> None:
    zeros = jnp.zeros(3)
    updates, _ = optax.contrib.normalize().update(zeros, optax.EmptyState())
    assert np.isnan(updates).all()
    assert grad(lambda p: jnp.sum(p**2), gradreg.sam(rho=0.1))(zeros).tolist() == [0.0, 0.0, 0.0]


def test_adamw_with_decay_outside_the_penalty() -> None:
    """Decoupled weight decay is optax's own business: it enters neither the direction nor the second gradient."""
    (theta,) = map(jnp.asarray, arrays((4,)))
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0))
    gradient = grad(lambda p: 0.5 * jnp.sum(p**2), gradreg.fgr(gamma=0.5, epsilon=0.5))(theta)
    updates, _ = optimizer.update(gradient, optimizer.init(theta), theta)
    assert_close(updates, -(1.5 * theta + 0.1 * theta))
