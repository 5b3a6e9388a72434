"""The arithmetic over trees: one norm, no division by zero, and 32 bits at least."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import value_and_grad
from gradreg.jax.norms import gradient_norm, safe_ratio
from gradreg.jax.perturbation import perturbed, weighted_sum
from tests.penalties import each_trait

from .cases import assert_close, first_state, problem, squared_error


def test_one_norm_over_the_selected_leaves() -> None:
    tree = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]]), "c": jnp.array(12.0)}
    assert float(gradient_norm(tree, [True, True, True])) == 13.0
    assert float(gradient_norm(tree, [True, True, False])) == 5.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_norm_of_narrow_gradients_is_taken_in_float32(dtype: jnp.dtype) -> None:
    """In bfloat16 the sum would stop growing at 256, in float16 it would overflow at 65504."""
    many = jnp.full(2**18, 1.0, dtype)
    norm = gradient_norm([many], [True])
    assert norm.dtype == jnp.float32
    assert float(norm) == 512.0


def test_safe_ratio_has_a_finite_value_and_derivative_at_zero() -> None:
    assert float(safe_ratio(2.0, jnp.array(4.0))) == 0.5
    assert float(safe_ratio(2.0, jnp.array(0.0))) == 0.0
    assert float(jax.grad(lambda norm: safe_ratio(2.0, norm))(0.0)) == 0.0


def test_narrow_parameters_are_perturbed_in_float32_and_rounded_once() -> None:
    """1 + 0.3·0.013 rounds to 1.0078125 (two units in the last place are 1/64); the product first rounded to bfloat16 must not matter."""
    start = jnp.linspace(0.5, 1.5, 101, dtype=jnp.bfloat16)
    direction = jnp.linspace(-0.02, 0.02, 101, dtype=jnp.bfloat16)
    (actual,) = perturbed([start], [direction], 0.3, [True])
    expected = (np.asarray(start, np.float32) + np.float32(0.3) * np.asarray(direction, np.float32)).astype(jnp.bfloat16)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual, expected)


def test_leaves_that_are_not_selected_are_the_same_arrays() -> None:
    start = jnp.ones(3)
    assert perturbed([start], [jnp.ones(3)], 0.3, [False])[0] is start


def test_a_weight_of_zero_leaves_a_non_finite_gradient_out() -> None:
    (actual,) = weighted_sum([(0.0, [jnp.array(jnp.inf)]), (1.0, [jnp.array(2.0)])])
    assert float(actual) == 2.0


def dtypes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


@each_trait
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradients_have_the_dtypes_of_the_parameters(penalty: GradientPenalty, dtype: jnp.dtype) -> None:
    params, x, y = problem()
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    params["2"] = jax.tree.map(lambda p: p.astype(dtype), params["2"])
    for step in (50, jnp.int32(50)):
        oracle = value_and_grad(squared_error, penalty)
        state = first_state(oracle, params)
        _, gradients, *following = oracle(params, x, y, step=step, **state)
        assert dtypes(gradients) == dtypes(params)
        assert dtypes(following) == dtypes(list(state.values()))
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


def test_bfloat16_compute_with_float32_parameters() -> None:
    """The usual mixed precision: only ``fun`` sees bfloat16, and the gradient agrees with float32 to its precision."""

    def mixed(params, x, y):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return squared_error(half, x.astype(jnp.bfloat16), y).astype(jnp.float32)

    params, x, y = problem()
    penalty = gradreg.sam(rho=0.3)
    _, actual = value_and_grad(mixed, penalty)(params, x, y)
    _, expected = value_and_grad(squared_error, penalty)(params, x, y)
    assert {g.dtype for g in jax.tree.leaves(actual)} == {jnp.dtype("float32")}
    assert_close(actual, expected, tolerance=0.03)


def test_bfloat16_parameters_agree_with_float32_to_their_precision() -> None:
    params, x, y = problem()
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    penalty = gradreg.fgr(gamma=0.4, epsilon=0.4)
    _, actual = value_and_grad(squared_error, penalty)(narrow, x, y)
    _, expected = value_and_grad(squared_error, penalty)(jax.tree.map(lambda p: p.astype(jnp.float32), narrow), x, y)
    assert_close(actual, expected, tolerance=0.02)
