"""JAX's functions against PyTorch's, and against whole Hessians."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradreg import sharpness
from gradreg.sharpness import jax as sharpness_jax

from .cases import known


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def problem():
    """The same network, batch and loss as the case "mlp"."""
    case = known("mlp").case
    params = {name: jnp.asarray(p.numpy()) for name, p in case.values.items()}
    x, y = jnp.asarray(case.x.numpy()), jnp.asarray(case.y.numpy())

    def loss(params, x, y):
        h = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
        h = jnp.tanh(h @ params["2.weight"].T + params["2.bias"])
        logits = h @ params["4.weight"].T + params["4.bias"]
        return -jax.nn.log_softmax(logits)[jnp.arange(len(y)), y].mean()

    return loss, params, x, y


def test_eigenvalues_and_trace_are_those_of_the_whole_hessian() -> None:
    truth = known("mlp")
    found = sharpness_jax.largest_eigenvalues(*problem(), k=2, tolerance=1e-8)
    np.testing.assert_allclose(found, truth.values.flip(0)[:2], rtol=1e-6)
    value, error = sharpness_jax.trace(*problem(), samples=20)
    assert abs(value - float(truth.matrix.trace())) < 3 * error
    assert error == pytest.approx(sharpness.trace(truth.case.model, truth.case.closure(), samples=20).standard_error, rel=0.5)


def test_sam_sharpness_is_pytorchs() -> None:
    truth = known("mlp")
    loss, params, x, y = problem()
    found = jax.jit(jax.vmap(lambda rho: sharpness_jax.sam_sharpness(loss, params, x, y, rho=rho)))(jnp.array([0.1, 0.3]))
    expected = [sharpness.sam_sharpness(truth.case.model, truth.case.closure(), rho=rho).value for rho in (0.1, 0.3)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="params must be a tree of real floating arrays; got one of int"):
        sharpness_jax.trace(lambda p: p.sum(), jnp.arange(3))
    with pytest.raises(ValueError, match="k must be below the number of coordinates, 3"):
        sharpness_jax.largest_eigenvalues(lambda p: (p**2).sum(), jnp.ones(3), k=3)
    for measure in (sharpness_jax.largest_eigenvalues, sharpness_jax.trace):
        with pytest.raises(ValueError, match="curvature must be finite"):
            measure(lambda p: (p**1.5).sum(), jnp.zeros(3))
