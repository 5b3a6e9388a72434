"""The state that penalties with memory hand from step to step: its form, what it survives, and errors."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import decoupled_update, grad, value_and_grad
from gradreg.jax.state import carries_state
from tests.penalties import PENALTIES

from .cases import Counted, assert_close, assert_same_bits, problem, squared_error

WITH_STATE = {name: p for name, p in PENALTIES.items() if carries_state(p)}
every_state = pytest.mark.parametrize("penalty", WITH_STATE.values(), ids=WITH_STATE)


def train(penalty: GradientPenalty, steps: range, params: Any, state: Any, run: Any = None) -> Any:
    _, x, y = problem()
    run = run or jax.jit(value_and_grad(squared_error, penalty))
    for step in steps:
        _, gradients, state = run(params, x, y, step=jnp.int32(step), state=state)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    return params, state


def test_which_penalties_carry_a_state() -> None:
    assert {name for name, p in PENALTIES.items() if p.has_memory} | {"wsam-decoupled"} == set(WITH_STATE)
    assert {"friendly", "remembered", "sparse-fisher", "looksam"} <= set(WITH_STATE)


@pytest.mark.slow
@every_state
def test_one_compilation_for_a_hundred_steps_with_the_state_donated(penalty: GradientPenalty) -> None:
    params, x, y = problem()
    loss = Counted(squared_error)
    oracle = value_and_grad(loss, penalty)
    run = jax.jit(lambda params, step, state: oracle(params, x, y, step=step, state=state), donate_argnames="state")
    state = oracle.init(params)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
    _, _, state = run(params, jnp.int32(0), state)
    traces = loss.traces
    for step in range(1, 100):
        _, _, following = run(params, jnp.int32(step), state)
        if penalty.has_memory:  # what a decoupled step hands in is not read, and so not donated
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        state = following
    assert (loss.traces, run._cache_size()) == (traces, 1)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state) == before


@pytest.mark.slow
@every_state
def test_saved_and_loaded_the_run_resumes_with_the_same_bits(penalty: GradientPenalty, tmp_path: Path) -> None:
    params, _, _ = problem()
    oracle = value_and_grad(squared_error, penalty)
    run = jax.jit(oracle)
    expected = train(penalty, range(7), params, oracle.init(params), run)
    halfway = train(penalty, range(3), params, oracle.init(params), run)
    np.savez(tmp_path / "halfway.npz", *jax.tree.leaves(halfway))
    with np.load(tmp_path / "halfway.npz") as saved:
        loaded = jax.tree.structure(halfway).unflatten([jnp.asarray(saved[name]) for name in saved.files])
    assert_same_bits(train(penalty, range(3, 7), *loaded, run), expected)
    if penalty.has_memory:
        forgotten = train(penalty, range(3, 7), loaded[0], oracle.init(params), run)
        assert any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (forgotten[0], expected[0])), strict=True))


@every_state
def test_a_predicate_narrows_what_is_remembered(penalty: GradientPenalty) -> None:
    """Averages and masks are of perturbed leaves only; what is mixed is of all."""
    params, _, _ = problem()
    state = value_and_grad(squared_error, penalty, parameters=lambda name, _: name == "0/weight").init(params)
    for kind, tree in state.items():
        shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
        assert shapes == {"average": [(3, 5)], "mask": [(3, 5)], "period": [()]}.get(kind, [leaf.shape for leaf in jax.tree.leaves(params)])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every_state
def test_memories_of_narrow_parameters_are_float32(penalty: GradientPenalty, dtype: Any) -> None:
    params, _, _ = problem()
    state = value_and_grad(squared_error, penalty).init(jax.tree.map(lambda p: p.astype(dtype), params))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} <= {"float32", "bool", "int32"}


def test_python_floats_are_parameters_too() -> None:
    oracle = grad(lambda p: 0.5 * p["w"] ** 2, gradreg.friendly_sam(rho=0.5, sigma=0.5, beta=0.5))
    gradient, state = oracle({"w": 2.0, "nothing": None}, state=oracle.init({"w": 2.0, "nothing": None}))
    assert (float(gradient["w"]), float(state["average"]["w"])) == (2.5, 1.0)


def test_decoupled_update_completes_the_step() -> None:
    """With SGD the two halves are the coupled step: θ − η·g − η·(P − g) = θ − η·P; where the penalty rests, nothing is left to apply."""
    params, x, y = problem()
    penalty = gradreg.wsam(rho=0.3, gamma=0.6, decoupled=True).every(2)
    oracle = value_and_grad(squared_error, penalty)
    state = oracle.init(params)
    for step in (0, 1):
        _, gradients, state = jax.jit(oracle)(params, x, y, step=jnp.int32(step), state=state)
        assert_close(gradients, jax.grad(squared_error)(params, x, y), tolerance=1e-6)
        after = decoupled_update(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), state, jnp.float32(0.1))
        coupled = grad(squared_error, gradreg.wsam(rho=0.3, gamma=0.6).every(2))(params, x, y, step=step)
        assert_close(after, jax.tree.map(lambda p, g: p - 0.1 * g, params, coupled), tolerance=1e-6)
    assert not any(bool(leaf.any()) for leaf in jax.tree.leaves(state))


FRIENDLY = gradreg.friendly_sam(rho=0.1)
THETA = {"w": jnp.ones(3)}


def total(params: Any) -> Any:
    return jnp.sum(params["w"])


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, r"state must be given for a penalty that carries one.*friendly.*got None\. Call \.init\(params\) once"),
        ({}, ValueError, r"state must be what \.init\(params\) or the step before returned, of the structure PyTreeDef.*'average'.*got"),
        (
            {"average": {"w": jnp.ones(4)}},
            ValueError,
            r"state must hold float32 of shape \(3,\) at 'average/w'; got float32 of shape \(4,\)",
        ),
        ({"average": {"w": jnp.ones(3, int)}}, ValueError, r"state must hold float32 of shape \(3,\) at 'average/w'; got int32 of shape"),
    ],
)
def test_bad_states(state: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        value_and_grad(total, FRIENDLY)(THETA, state=state)


def test_a_state_without_a_correction() -> None:
    with pytest.raises(ValueError, match=r"state must be that of a penalty with decoupled=True; got one without 'correction'"):
        decoupled_update(THETA, value_and_grad(total, FRIENDLY).init(THETA), 0.1)
