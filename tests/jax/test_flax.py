"""Against the real Flax, Linen and NNX: batch statistics from the first pass, one dropout mask for all passes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import value_and_grad

from .cases import arrays, assert_close, assert_same_bits
from .twin import Twin

PENALTY = gradreg.fgr(gamma=0.2, epsilon=0.5)
penalties = pytest.mark.parametrize(
    "penalty", [PENALTY, gradreg.sam(rho=0.3), gradreg.cgr(gamma=0.2, epsilon=0.5), gradreg.exact(gamma=0.2)], ids=str
)


def batch() -> tuple[jax.Array, jax.Array]:
    x, y = (jnp.asarray(a, jnp.float32) for a in arrays((16, 4), (16, 2)))
    return x, y


class Linen(nn.Module):
    """Dense, BatchNorm, tanh, dropout, dense."""

    @nn.compact
    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        x = jnp.tanh(nn.BatchNorm(use_running_average=not training, momentum=0.9)(nn.Dense(8)(x)))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not training)(x))


@penalties
def test_linen_with_batch_statistics_and_dropout(penalty: GradientPenalty) -> None:
    x, y = batch()
    model = Linen()
    variables = model.init(jax.random.key(0), x, training=False)

    def loss(params: Any, batch_stats: Any, x: Any, y: Any, key: Any) -> Any:
        prediction, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, training=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return jnp.mean((prediction - y) ** 2), updated["batch_stats"]

    arguments = (variables["batch_stats"], x, y, jax.random.key(1))
    (value, statistics), gradients = jax.jit(value_and_grad(loss, penalty, has_aux=True))(variables["params"], *arguments)
    (first_value, first_statistics), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"], *arguments)
    np.testing.assert_allclose(value, first_value, rtol=1e-6)
    assert_close(statistics, first_statistics, tolerance=1e-6)
    # The oracle holds the key fixed: agreement means that every pass dropped the same units.
    assert_close(gradients, Twin(penalty).step([lambda params: loss(params, *arguments)[0]], variables["params"]), tolerance=1e-4)


class Nnx(nnx.Module):
    """The same as ``Linen``, with the state inside."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.dropout(jnp.tanh(self.norm(self.first(x)))))


@penalties
def test_nnx_split_and_merge(penalty: GradientPenalty) -> None:
    x, y = batch()
    model = Nnx(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, rest: Any, x: Any, y: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        value = jnp.mean((model(x) - y) ** 2)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    (value, new_rest), gradients = jax.jit(value_and_grad(loss, penalty, has_aux=True))(params, rest, x, y)
    first_value, first_rest = jax.jit(loss)(params, rest, x, y)
    np.testing.assert_allclose(value, first_value, rtol=1e-6)
    assert int(new_rest["dropout"]["rngs"]["count"].get_value()) == int(rest["dropout"]["rngs"]["count"].get_value()) + 1
    for name in ("mean", "var"):
        np.testing.assert_allclose(new_rest["norm"][name].get_value(), first_rest["norm"][name].get_value(), rtol=1e-6)
        assert not np.allclose(new_rest["norm"][name].get_value(), rest["norm"][name].get_value())
    assert_close(gradients, Twin(penalty).step([lambda params: loss(params, rest, x, y)[0]], params), tolerance=1e-4)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), new_rest)
    assert_same_bits(model.norm.mean.get_value(), new_rest["norm"]["mean"].get_value())
