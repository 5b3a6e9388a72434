"""The optax form takes the steps of ``value_and_grad``: the same penalties, states and clock, in a loop that takes only an optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import gradreg
from gradreg.jax import value_and_grad
from gradreg.jax.transformation import regularize
from tests.penalties import PENALTIES
from tests.unknown_parts import OwnGradient

from .cases import Counted, assert_close, first_state, problem, squared_error

NAMES = [
    "sam",
    "gnp-unit",
    "fgr-strength-warm-up",
    "cgr",
    "exact",
    "asam",
    "friendly",
    "remembered",
    "random",
    "sparse-fisher",
    "gsam",
    "looksam",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_it_trains_as_value_and_grad_does(name: str) -> None:
    params, x, y = problem()
    penalty = PENALTIES[name]
    tx = optax.chain(regularize(penalty), optax.clip_by_global_norm(5.0), optax.sgd(0.1, momentum=0.9))
    plain = jax.grad(squared_error)

    @jax.jit
    def train(params: Any, state: Any) -> Any:
        updates, state = tx.update(plain(params, x, y), state, params, grad_fn=lambda at: plain(at, x, y))
        return optax.apply_updates(params, updates), state

    oracle = value_and_grad(squared_error, penalty)
    optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.1, momentum=0.9))
    actual, state = params, tx.init(params)
    expected, their_state, memory = params, optimizer.init(params), first_state(oracle, params)
    for step in range(4):
        actual, state = train(actual, state)
        _, gradients, *following = oracle(expected, x, y, step=step, **memory)
        memory = {"state": following[0]} if following else {}
        updates, their_state = optimizer.update(gradients, their_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_close(actual, expected, tolerance=1e-7)  # optax keeps counts and clips in float32
    assert int(state[0].count) == 4


def test_the_loops_own_gradient_is_the_first_pass() -> None:
    params, x, y = problem()
    loss = Counted(squared_error)
    tx = regularize(gradreg.sam(rho=0.3))
    grads = jax.grad(squared_error)(params, x, y)
    jax.block_until_ready(tx.update(grads, tx.init(params), params, grad_fn=lambda at: jax.grad(loss)(at, x, y)))
    assert loss.evaluations() == 1


def test_some_parameters() -> None:
    tx = regularize(gradreg.sam(rho=1.0), parameters=lambda name, leaf: name == "a")
    params = {"a": jnp.array(2.0), "b": jnp.array(5.0)}
    found, _ = tx.update(params, tx.init(params), params, grad_fn=lambda at: at)
    assert jax.tree.map(float, found) == {"a": 3.0, "b": 5.0}


def test_errors() -> None:
    tx, theta = regularize(gradreg.sam(rho=0.1)), jnp.ones(2)
    with pytest.raises(TypeError, match=r"penalty must be a GradientPenalty; got 'sam'"):
        regularize("sam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"penalty must not be decoupled.*Use gradreg\.jax\.value_and_grad and decoupled_update"):
        regularize(gradreg.wsam(rho=0.1, gamma=0.6, decoupled=True))
    with pytest.raises(TypeError, match="OwnGradient"):
        regularize(gradreg.GradientPenalty(power=1, strength=0.1, radius=0.1, direction=OwnGradient()))
    with pytest.raises(TypeError, match=r"grad_fn must be given to update\(\).*got None"):
        tx.update(theta, tx.init(theta), theta)
    with pytest.raises(ValueError, match=r"params must be given to update\(\)"):
        tx.update(theta, tx.init(theta), grad_fn=lambda at: at)
