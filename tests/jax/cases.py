"""What the tests of the JAX engine share: one small problem that is no quadratic, comparisons, and a function that counts its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradreg.jax.state import carries_state

Loss = Callable[[Any], jax.Array]


def arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for shape in shapes]


def network(params: Any, x: Any) -> jax.Array:
    """Two layers with a tanh between them."""
    return jnp.tanh(x @ params["0"]["weight"] + params["0"]["bias"]) @ params["2"]["weight"] + params["2"]["bias"]


def squared_error(params: Any, x: Any, y: Any) -> jax.Array:
    return jnp.mean((network(params, x) - y) ** 2)


def problem() -> tuple[Any, jax.Array, jax.Array]:
    """Parameters and a batch of eight, in the precision of the moment; the loss is ``squared_error``."""
    *weights, x, y = map(jnp.asarray, arrays((3, 5), (5,), (5, 2), (2,), (8, 3), (8, 2)))
    params = {"0": {"weight": weights[0], "bias": weights[1]}, "2": {"weight": weights[2], "bias": weights[3]}}
    return params, x, 2 * y


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Equal structures, and values equal to ``tolerance`` relative to the largest."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), rtol=0, atol=tolerance * max(scale, 1e-30))


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


class Counted:
    """A function, and how often its value was computed when programs ran and how often it was traced."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._evaluations = 0
        self.traces = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.traces += 1
        jax.debug.callback(self._count)
        return self._function(*args, **kwargs)

    def _count(self) -> None:
        self._evaluations += 1

    def evaluations(self) -> int:
        """Evaluations since the last time this was asked."""
        jax.effects_barrier()
        count, self._evaluations = self._evaluations, 0
        return count


def first_state(oracle: Any, params: Any) -> dict[str, Any]:
    """``{"state": oracle.init(params)}`` where the penalty of ``oracle`` carries a state, else nothing: for ``oracle(..., **state)``."""
    return {"state": oracle.init(params)} if carries_state(oracle.penalty) else {}
