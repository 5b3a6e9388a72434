"""A radius that is learned from held-out data, in JAX: against derivatives of the gap itself, and a loop of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gradreg
from gradreg import LETS, GradientPenalty, HeldOut
from gradreg.jax import grad, value_and_grad
from tests.adam import LogRadius

from .cases import assert_close, problem, squared_error

START, RATE = 0.3, 0.1
LEARNED = LETS(start=START, rate=RATE, momentum=0.8, memory=0.9, every=1)
Loss = Callable[..., jax.Array]


def fit(params: Any, x: Any, y: Any) -> jax.Array:
    return squared_error(params, x[:5], y[:5])


def kept(params: Any, x: Any, y: Any) -> jax.Array:
    return squared_error(params, x[5:], y[5:])


def quadratic(params: Any, x: Any, y: Any, rows: slice = slice(None)) -> jax.Array:
    """Of which finite differences are exact."""
    return jnp.mean((x[rows] @ params["w"] - y[rows]) ** 2)


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


def along(params: Any, factor: Any, direction: Any) -> Any:
    return jax.tree.map(lambda p, d: p + factor * d, params, direction)


def sam(loss: Loss, params: Any, rho: Any) -> Any:
    g = jax.grad(loss)(params)
    return jax.grad(loss)(along(params, rho / jnp.linalg.norm(ravel_pytree(g)[0]), g))


def gnp(loss: Loss, params: Any, r: Any) -> Any:
    return jax.tree.map(lambda g, moved: 0.2 * g + 0.8 * moved, jax.grad(loss)(params), sam(loss, params, r))


def fgr(loss: Loss, params: Any, epsilon: Any) -> Any:
    return jax.grad(loss)(along(params, epsilon, jax.grad(loss)(params)))


def cgr(loss: Loss, params: Any, epsilon: Any) -> Any:
    g = jax.grad(loss)(params)
    ahead, behind = (jax.grad(loss)(along(params, sign * epsilon, g)) for sign in (1.0, -1.0))
    return jax.tree.map(lambda own, a, b: own + 0.5 * a - 0.5 * b, g, ahead, behind)


PENALTIES: dict[str, tuple[Callable[[Any], GradientPenalty], Callable[[Loss, Any, Any], Any]]] = {
    "sam": (lambda radius: gradreg.sam(rho=radius), sam),
    "gnp": (lambda radius: gradreg.gnp(r=radius, alpha=0.8), gnp),
    "fgr": (lambda radius: gradreg.fgr(epsilon=radius), fgr),
    "cgr": (lambda radius: gradreg.cgr(epsilon=radius), cgr),
}
"""Name -> the penalty with a radius, and its gradient as the paper writes it."""


def slope_by_differentiation(batch: Loss, other: Loss, params: Any, regularized: Any, radius: float) -> float:
    """d/dη of d/d log ρ of ½·(L_h − L)² at θ − η·G(ρ), at η = 0: JAX differentiates the whole step, its gradients included."""

    def after_the_step(eta: Any, log_radius: Any) -> jax.Array:
        there = along(params, -eta, regularized(batch, params, jnp.exp(log_radius)))
        return 0.5 * (other(there) - batch(there)) ** 2

    return float(jax.grad(lambda at: jax.grad(after_the_step)(0.0, at))(math.log(radius)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("penalty", "regularized"), PENALTIES.values(), ids=PENALTIES)
def test_the_slope_is_the_derivative_of_the_squared_gap(penalty: Any, regularized: Any) -> None:
    """On a quadratic loss at any radius; else as far as the gradient is linear between the two points, so at a small one."""
    params, x, y = problem()
    straight = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(x.shape[1], y.shape[1])))}
    first, last = slice(0, 5), slice(5, 8)
    cases = (
        (lambda p, *a: quadratic(p, *a, first), lambda p, *a: quadratic(p, *a, last), straight, 0.3, 1e-9),
        (fit, kept, params, 1e-3, 1e-2),
    )
    for batch, other, at, radius, tolerance in cases:
        looking = value_and_grad(batch, penalty(LETS(start=radius, every=1)), held_out=other)
        _, _, state = jax.jit(looking)(at, x, y, state=looking.init(at))
        expected = slope_by_differentiation(lambda p, f=batch: f(p, x, y), lambda p, f=other: f(p, x, y), at, regularized, radius)
        assert float(state["radius"]["mean"] / state["radius"]["weight"]) == pytest.approx(expected, rel=tolerance)
        assert abs(expected) > 1e-6


def slope_of(losses: tuple[float, float], g: np.ndarray, h: np.ndarray, result: np.ndarray) -> float:
    return -(losses[1] - losses[0]) * float((h - g) @ (result - g))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("branch", ["cond", "select"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("penalty", "regularized"), PENALTIES.values(), ids=PENALTIES)
def test_twenty_steps_are_those_of_a_loop_of_ones_own(penalty: Any, regularized: Any, every: int, branch: Any) -> None:
    params, x, y = problem()
    twin = LogRadius(math.log(START), RATE)
    looking = value_and_grad(
        fit,
        penalty(LETS(start=START, rate=RATE, momentum=0.8, memory=0.9, every=every)),
        held_out=kept,
        branch=branch,
        with_metrics=True,
    )
    run, state, looked, radii = jax.jit(looking), looking.init(params), list[bool](), list[float]()
    for step in range(20):
        radius = twin.radius
        radii.append(radius)
        expected = regularized(lambda p: fit(p, x, y), params, radius)
        if step % every == 0:
            losses = float(fit(params, x, y)), float(kept(params, x, y))
            twin.follow(slope_of(losses, flat(jax.grad(fit)(params, x, y)), flat(jax.grad(kept)(params, x, y)), flat(expected)))
        (_, metrics), found, following = run(params, x, y, state=state)
        assert_close(found, expected, 1e-9)
        assert float(metrics.radius) == pytest.approx(radius, rel=1e-9)
        looked.append(looking.looked(state, following))
        assert looking.is_on(following)
        state, params = following, along(params, -0.05, found)
    assert float(state["radius"]["log_radius"]) == pytest.approx(twin.log_radius, abs=1e-9)
    assert max(radii) - min(radii) > 0.02
    assert looked == [step % every == 0 for step in range(20)]


OTHERS = {
    "friendly": gradreg.friendly_sam(rho=LEARNED, sigma=0.7),
    "gsam": gradreg.gsam(rho=LEARNED, a=0.4),
    "looksam": gradreg.looksam(rho=LEARNED, k=3),
    "wsam": gradreg.wsam(rho=LEARNED, gamma=0.6, decoupled=True),
    "every": gradreg.fgr(epsilon=LEARNED).every(2, compensate=True),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("penalty", OTHERS.values(), ids=OTHERS)
def test_with_other_parts_the_slope_is_that_of_what_they_add(penalty: GradientPenalty) -> None:
    params, x, y = problem()
    looking, twin = value_and_grad(fit, penalty, held_out=kept), LogRadius(math.log(START), RATE)
    run, state = jax.jit(looking), looking.init(params)
    g, h = flat(jax.grad(fit)(params, x, y)), flat(jax.grad(kept)(params, x, y))
    for step in range(7):
        _, found, following = run(params, x, y, step=jnp.int32(step), state=state)
        result = flat(found) + (flat(following["correction"]) if penalty.decoupled else 0.0)
        if penalty.at(step, radius=0.1).fresh:
            twin.follow(slope_of((float(fit(params, x, y)), float(kept(params, x, y))), g, h, result))
            assert float(following["radius"]["log_radius"]) == pytest.approx(twin.log_radius, abs=1e-9)
        else:
            assert_close(following["radius"], state["radius"])
        state = following


@pytest.mark.usefixtures("x64")
def test_grad_gives_the_same() -> None:
    params, x, y = problem()
    both, alone = (make(fit, gradreg.sam(rho=LEARNED), held_out=kept) for make in (value_and_grad, grad))
    _, *expected = both(params, x, y, state=both.init(params))
    assert_close(list(alone(params, x, y, state=alone.init(params))), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scope", ["local", "global"])
def test_shards_learn_the_same_radius(scope: Any) -> None:
    """From the averaged gradients and losses, with the perturbation of each shard its own or not."""
    params, x, y = problem()
    xs, ys = x.reshape(2, 4, 3), y.reshape(2, 4, 2)

    def mine(p: Any, a: Any, b: Any) -> jax.Array:
        return squared_error(p, a[:2], b[:2])

    def theirs(p: Any, a: Any, b: Any) -> jax.Array:
        return squared_error(p, a[2:], b[2:])

    looking = value_and_grad(mine, gradreg.sam(rho=LEARNED), held_out=theirs, axis_name="shards", scope=scope)
    initial = looking.init(params)
    _, found, state = jax.vmap(lambda a, b: looking(params, a, b, state=initial), axis_name="shards")(xs, ys)
    assert_close(jax.tree.map(lambda leaf: leaf[0], state), jax.tree.map(lambda leaf: leaf[1], state))
    losses = [np.mean([float(f(params, a, b)) for a, b in zip(xs, ys, strict=True)]) for f in (mine, theirs)]
    g, h = (np.mean([flat(jax.grad(f)(params, a, b)) for a, b in zip(xs, ys, strict=True)], axis=0) for f in (mine, theirs))
    result = flat(jax.tree.map(lambda leaf: leaf[0], found))
    slope = float(state["radius"]["mean"][0] / state["radius"]["weight"][0])
    assert slope == pytest.approx(slope_of((losses[0], losses[1]), g, h, result), rel=1e-9)


@pytest.mark.usefixtures("x64")
def test_a_loss_scale_does_not_enter() -> None:
    params, x, y = problem()
    looking = value_and_grad(fit, gradreg.fgr(epsilon=LEARNED), held_out=kept)
    states = [looking(params, x, y, state=looking.init(params), loss_scale=scale)[2] for scale in (1.0, 1024.0)]
    assert_close(states[1], states[0], 1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [None, 8.0])
def test_a_step_over_the_edge_halves_the_radius_except_under_a_scale(scale: float | None) -> None:
    params = {"w": jnp.array([0.6, 0.8])}

    def cliff(p: Any, target: float = 0.0) -> jax.Array:
        return 0.5 * jnp.sum((p["w"] - target) ** 2) * jnp.where(jnp.linalg.norm(p["w"]) > 2.0, jnp.inf, 1.0)

    looking = value_and_grad(cliff, gradreg.sam(rho=LETS(start=3.0, every=1)), held_out=lambda p: cliff(p, 1.0))
    _, _, state = looking(params, state=looking.init(params), loss_scale=scale)
    assert math.exp(state["radius"]["log_radius"]) == pytest.approx(3.0 if scale else 1.5)
    assert (float(state["radius"]["weight"]), int(state["radius"]["steps"])) == (0.0, 1)


@pytest.mark.usefixtures("x64")
def test_what_says_nothing_moves_nothing() -> None:
    """Held-out data that are those trained on, and an infinite held-out loss, as in PyTorch."""
    params = {"w": jnp.ones(3)}

    def half_square(p: Any) -> jax.Array:
        return 0.5 * jnp.sum(p["w"] ** 2)

    for other in (half_square, lambda p: jnp.sum(p["w"]) + jnp.inf, lambda p: jnp.sum(p["w"]) - jnp.inf):
        looking = value_and_grad(half_square, gradreg.sam(rho=LEARNED), held_out=other)
        _, _, state = looking(params, state=looking.init(params))
        assert float(state["radius"]["log_radius"]) == math.log(START)
        assert float(state["radius"]["weight"]) == 0.0


def test_a_transformation_that_sees_no_held_out_data_refuses_it() -> None:
    from gradreg.jax.transformation import regularize

    with pytest.raises(ValueError, match=r"^penalty must not learn its radius from held-out data, .*; got SAM.* Use AutoRadius"):
        regularize(gradreg.sam(rho=LETS()))


def test_what_is_missing_or_too_much_is_said() -> None:
    with pytest.raises(ValueError, match=r"^held_out must be given with SAM.* from held-out data, and rule left out; got held_out N"):
        value_and_grad(fit, gradreg.sam(rho=LETS()))
    with pytest.raises(ValueError, match=r"^held_out must be given with SAM.* and rule left out; .* and rule HeldOut"):
        value_and_grad(fit, gradreg.sam(rho=LETS()), held_out=kept, rule=HeldOut())
    params, x, y = problem()
    looking = value_and_grad(fit, gradreg.sam(rho=LETS()), held_out=kept)
    other = value_and_grad(fit, gradreg.sam(rho=gradreg.AutoRadius())).init(params)
    with pytest.raises(ValueError, match=r"^state must be what \.init\(params\)"):
        looking(params, x, y, state=other)
