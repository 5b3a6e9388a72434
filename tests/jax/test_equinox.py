"""Against the real Equinox: partition and combine, state from the first pass, one dropout mask for all passes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import value_and_grad

from .cases import arrays, assert_close
from .twin import Twin

penalties = pytest.mark.parametrize(
    "penalty",
    [gradreg.fgr(gamma=0.2, epsilon=0.5), gradreg.sam(rho=0.3), gradreg.cgr(gamma=0.2, epsilon=0.5), gradreg.exact(gamma=0.2)],
    ids=str,
)


class Model(eqx.Module):
    """Linear, BatchNorm, an activation that is a function in the tree, dropout, linear."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    second: eqx.nn.Linear
    activation: Any

    def __init__(self, key: jax.Array) -> None:
        one, two = jax.random.split(key)
        self.first = eqx.nn.Linear(4, 8, key=one)
        self.norm = eqx.nn.BatchNorm(8, axis_name="examples", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)
        self.second = eqx.nn.Linear(8, 2, key=two)
        self.activation = jax.nn.tanh

    def __call__(self, x: jax.Array, state: eqx.nn.State, key: jax.Array) -> tuple[jax.Array, eqx.nn.State]:
        x, state = self.norm(self.first(x), state)
        return self.second(self.dropout(self.activation(x), key=key)), state


@penalties
def test_partition_state_and_dropout(penalty: GradientPenalty) -> None:
    x, y = (jnp.asarray(a, jnp.float32) for a in arrays((16, 4), (16, 2)))
    model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any, model_state: Any, x: Any, y: Any, key: Any) -> Any:
        model = eqx.combine(params, static)
        keys = jax.random.split(key, len(x))
        prediction, model_state = jax.vmap(model, axis_name="examples", in_axes=(0, None, 0), out_axes=(0, None))(x, model_state, keys)
        return jnp.mean((prediction - y) ** 2), model_state

    arguments = (state, x, y, jax.random.key(1))
    (value, new_state), gradients = eqx.filter_jit(value_and_grad(loss, penalty, has_aux=True))(params, *arguments)
    first_value, first_state = eqx.filter_jit(loss)(params, *arguments)
    np.testing.assert_allclose(value, first_value, rtol=1e-6)
    ours, first, before = (jax.tree.leaves(s) for s in (new_state, first_state, state))
    for a, b in zip(ours, first, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert any(not np.allclose(a, b) for a, b in zip(ours, before, strict=True))
    assert_close(gradients, Twin(penalty).step([lambda params: loss(params, *arguments)[0]], params), tolerance=1e-4)
    updated = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradients))
    assert updated.activation is jax.nn.tanh
    assert not np.allclose(updated.first.weight, model.first.weight)
