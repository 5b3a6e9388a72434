"""``value_and_grad(..., held_out=)``: the product that a step measures, the switch as state, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gradreg
from gradreg import LETS, AutoRadius, GradientPenalty, HeldOut
from gradreg.auto_radius import NUMBERS
from gradreg.jax import grad, value_and_grad

from .cases import assert_close, assert_same_bits, problem, squared_error

PENALTIES = {
    "sam": gradreg.sam(rho=0.3),
    "gnp": gradreg.gnp(r=0.3, alpha=0.8),
    "fgr": gradreg.fgr(gamma=0.2, epsilon=0.5),
    "cgr": gradreg.cgr(gamma=0.3, epsilon=0.4),
    "friendly": gradreg.friendly_sam(rho=0.3, sigma=0.7),
    "gsam": gradreg.gsam(rho=0.3, a=0.4),
    "looksam": gradreg.looksam(rho=0.4, k=1, a=0.7),
    "auto": gradreg.sam(rho=AutoRadius(start=0.3)),
    "wsam": gradreg.wsam(rho=0.3, gamma=0.6, decoupled=True),
}


def fit(params: Any, x: Any, y: Any) -> jax.Array:
    return squared_error(params, x[:5], y[:5])


def kept(params: Any, x: Any, y: Any) -> jax.Array:
    return squared_error(params, x[5:], y[5:])


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


def measured(switch: Any) -> Any:
    """The product of the first measurement, by its averages, which are in units of the scale."""
    return switch["mean"] / switch["weight"] * switch["scale"]


def switched_off(state: Any) -> Any:
    off = {"mean": -0.5, "square": 0.25, "weight": 1.0, "weight_squares": 0.1, "scale": 1.0, "helps": 0.0, "helps_now": False}
    return {**state, "held_out": {n: jnp.asarray(off[n], v.dtype) if n in off else v for n, v in state["held_out"].items()}}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_step_measures_the_product_and_is_unchanged(penalty: GradientPenalty) -> None:
    params, x, y = problem()
    alone = value_and_grad(fit, penalty)
    _, expected, *following = alone(params, x, y, **({"state": alone.init(params)} if alone.carries_state else {}))
    looking = value_and_grad(fit, penalty, held_out=kept)
    _, found, state = jax.jit(looking)(params, x, y, state=looking.init(params))
    assert_close(found, expected)
    g, h = flat(jax.grad(fit)(params, x, y)), flat(jax.grad(kept)(params, x, y))
    change = flat(following[0]["correction"]) if penalty.decoupled else flat(expected) - g
    switch = state["held_out"]
    assert float(measured(switch)) == pytest.approx(change @ h, rel=1e-9)
    assert abs(change @ h) > 1e-4
    assert (int(switch["count"]), bool(switch["helps_now"])) == (1, True)
    assert_close({k: v for k, v in state.items() if k != "held_out"}, following[0] if following else {}) if following else None


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("branch", ["cond", "select"])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_that_is_off_gives_the_plain_gradient(penalty: GradientPenalty, branch: Any) -> None:
    params, x, y = problem()
    g = jax.grad(fit)(params, x, y)
    looking = value_and_grad(fit, penalty, held_out=kept, rule=HeldOut(every=3), with_metrics=True, branch=branch)
    state, run, looked = switched_off(looking.init(params)), jax.jit(looking), []
    for _ in range(4):
        (_, metrics), found, following = run(params, x, y, state=state)
        assert_close(found, g)
        if penalty.decoupled:
            assert not np.any(flat(following["correction"]))
        assert float(metrics.strength) == 0.0
        looked.append((looking.looked(state, following), looking.is_on(following)))
        state = following
    assert looked == [(True, False), (False, False), (False, False), (True, False)]


@pytest.mark.usefixtures("x64")
def test_the_switch_follows_the_rule_over_many_steps() -> None:
    """A held-out loss that wants the opposite from step 30 on: off after some measurements, and the decision holds from the next one."""
    params, rule = {"w": jnp.ones(3)}, HeldOut(every=2, memory=5)
    a = jnp.array([4.0, 1.0, 0.5])

    def loss(p: Any, sign: Any) -> jax.Array:
        return 0.5 * jnp.sum(a * p["w"] ** 2)

    looking = value_and_grad(loss, gradreg.fgr(gamma=0.1, epsilon=0.1), held_out=lambda p, sign: sign * jnp.sum(a * p["w"]), rule=rule)
    run, state, expected, holds = jax.jit(looking), looking.init(params), rule.initial, True
    seen: list[bool] = []
    for step in range(100):
        sign = 1.0 if step < 30 else -1.0
        g = np.asarray(a * params["w"])
        _, found, state = run(params, jnp.asarray(sign), state=state)
        if step % 2 == 0:
            holds = expected.helps > 0.5
            expected = rule.update(expected, float(0.1 * (a * g) @ (sign * a)), NUMBERS)
        np.testing.assert_allclose(found["w"], g * (1 + 0.1 * a) if holds else g, rtol=1e-12)
        assert bool(state["held_out"]["helps_now"]) == holds
        seen.append(holds)
        params = {"w": params["w"] - 0.01 * found["w"]}
    np.testing.assert_allclose([state["held_out"][n] for n in expected._fields], expected, rtol=1e-9)
    assert seen[:30] == [True] * 30
    assert seen[-1] is False


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("branch", ["cond", "select"])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_that_waits_begins_off_and_measures_both(penalty: GradientPenalty, branch: Any) -> None:
    params, x, y = problem()
    rule = HeldOut(every=3, steps_per_epoch=7, noise=0.5)
    g, h = flat(jax.grad(fit)(params, x, y)), flat(jax.grad(kept)(params, x, y))
    alone = value_and_grad(fit, penalty, held_out=kept)
    _, _, acting = alone(params, x, y, state=alone.init(params))
    looking = value_and_grad(fit, penalty, held_out=kept, rule=rule, with_metrics=True, branch=branch)
    state, run = looking.init(params), jax.jit(looking)
    for step in range(4):
        (_, metrics), found, state = run(params, x, y, state=state)
        np.testing.assert_allclose(flat(found), g, rtol=1e-9, atol=1e-12)
        assert float(metrics.strength) == 0.0
        if step == 0:
            switch = state["held_out"]
            assert float(measured(switch)) == pytest.approx(float(measured(acting["held_out"])), rel=1e-9)
            assert float(measured(switch["noise"])) == pytest.approx(g @ g - (1 + 0.5 * 7) * (g @ h), rel=1e-9)
    assert (int(state["held_out"]["count"]), bool(state["held_out"]["helps_now"])) == (4, False)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("correction", [0.0, 1.0])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_penalty_is_on_where_both_conditions_hold(correction: float, noise: float) -> None:
    params, x, y = problem()
    looking = value_and_grad(fit, gradreg.sam(rho=0.3), held_out=kept, rule=HeldOut(every=3, steps_per_epoch=7), with_metrics=True)
    state, firm = looking.init(params), {"mean": 0.0, "square": 1e6, "weight": 1.0, "weight_squares": 0.1, "scale": 1.0}
    given = {**firm, "helps": correction, "noise": {**firm, "helps": noise}, "count": 0, "helps_now": correction * noise > 0}
    state = {**state, "held_out": jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), state["held_out"], given)}
    for _ in range(4):
        (_, metrics), _, state = looking(params, x, y, state=state)
        assert float(metrics.strength) == pytest.approx(0.3 * correction * noise)
        assert float(state["held_out"]["noise"]["helps"]) == noise


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("latest", "begins"), [(None, True), (20, True), (5, False)])
def test_it_begins_by_the_latest_step_or_not_at_all(latest: int | None, begins: bool) -> None:
    """The held-out gradient is the training one, so that r is 0, and from the fourth step on its opposite."""
    params, x, y = problem()
    rule = HeldOut(every=1, memory=4, steps_per_epoch=7, latest=latest)

    def loss(p: Any, x: jax.Array, y: jax.Array, sign: jax.Array) -> jax.Array:
        return fit(p, x, y)

    looking = value_and_grad(loss, gradreg.sam(rho=0.3), held_out=lambda p, x, y, sign: sign * fit(p, x, y), rule=rule)
    state, run = looking.init(params), jax.jit(looking)
    for sign in [1.0] * 3 + [-1.0] * 15:
        _, _, state = run(params, x, y, jnp.asarray(sign), state=state)
    assert float(state["held_out"]["noise"]["helps"]) == float(begins)


@pytest.mark.usefixtures("x64")
def test_a_loss_scale_weighs_neither_condition() -> None:
    params, x, y = problem()
    looking = value_and_grad(fit, gradreg.sam(rho=0.3), held_out=kept, rule=HeldOut(steps_per_epoch=7))
    switches = [looking(params, x, y, state=looking.init(params), loss_scale=scale)[2]["held_out"] for scale in (1.0, 1024.0)]
    for own, scaled in (switches, [switch["noise"] for switch in switches]):
        assert float(measured(scaled)) == pytest.approx(float(measured(own)), rel=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("which", ["the training gradient", "the held-out gradient", "every common parameter"])
def test_a_vector_that_is_zero_is_no_measurement(which: str) -> None:
    """As in PyTorch, where such a product is NaN: no weight of it is in the averages of either condition."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}

    def loss(p: Any) -> jax.Array:
        return 0.5 * jnp.sum(p["a"] ** 2) * (which != "the training gradient")

    def other(p: Any) -> jax.Array:
        return jnp.sum(p["b" if which == "every common parameter" else "a"] ** 2) * (which != "the held-out gradient")

    looking = value_and_grad(loss, gradreg.sam(rho=0.3), held_out=other, rule=HeldOut(steps_per_epoch=7))
    _, _, state = looking(params, state=looking.init(params))
    assert float(state["held_out"]["noise"]["weight"]) == 0.0
    assert int(state["held_out"]["count"]) == 1
    if which != "every common parameter":
        assert float(state["held_out"]["weight"]) == 0.0


@pytest.mark.usefixtures("x64")
def test_rests_of_the_penalty_do_not_count() -> None:
    params, x, y = problem()
    looking = value_and_grad(fit, gradreg.sam(rho=0.3).every(2), held_out=kept)
    state, run = looking.init(params), jax.jit(looking)
    for step in range(4):
        _, found, state = run(params, x, y, step=jnp.int32(step), state=state)
        if step % 2:
            assert_close(found, jax.grad(fit)(params, x, y))
    assert int(state["held_out"]["count"]) == 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("penalty", "rule"),
    [(gradreg.sam(rho=0.3), HeldOut(every=2)), (gradreg.sam(rho=LETS(start=0.3, every=2)), None)],
    ids=["switch", "lets"],
)
def test_under_scan_and_vmap(penalty: GradientPenalty, rule: HeldOut | None) -> None:
    params, x, y = problem()
    looking = value_and_grad(fit, penalty, held_out=kept, rule=rule)

    def step(carry: Any, _: Any) -> Any:
        at, state = carry
        value, gradients, state = looking(at, x, y, state=state)
        return (jax.tree.map(lambda p, g: p - 0.05 * g, at, gradients), state), value

    (scanned, state), _ = jax.lax.scan(step, (params, looking.init(params)), None, length=5)
    at, expected = params, looking.init(params)
    for _ in range(5):
        (at, expected), _ = step((at, expected), None)
    assert_close(scanned, at)
    assert_close(state, expected)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (params, looking.init(params)))
    (mapped, _), _ = jax.vmap(lambda carry: step(carry, None))(both)
    assert_close(jax.tree.map(lambda leaf: leaf[1], mapped), step((params, looking.init(params)), None)[0][0])


@pytest.mark.usefixtures("x64")
def test_shards_agree() -> None:
    """Over a mapped axis the products are those of the averaged gradients, with the perturbation of each shard its own."""
    params, x, y = problem()
    xs, ys = x.reshape(2, 4, 3), y.reshape(2, 4, 2)

    def mine(p: Any, a: Any, b: Any) -> jax.Array:
        return squared_error(p, a[:2], b[:2])

    def theirs(p: Any, a: Any, b: Any) -> jax.Array:
        return squared_error(p, a[2:], b[2:])

    rule = HeldOut(steps_per_epoch=7, noise=0.5)
    waits = value_and_grad(mine, gradreg.sam(rho=0.3), held_out=theirs, rule=rule, axis_name="shards")
    initial = waits.init(params)
    _, _, waited = jax.vmap(lambda a, b: waits(params, a, b, state=initial), axis_name="shards")(xs, ys)
    looking = value_and_grad(mine, gradreg.sam(rho=0.3), held_out=theirs, axis_name="shards")
    state = looking.init(params)
    _, found, following = jax.vmap(lambda a, b: looking(params, a, b, state=state), axis_name="shards")(xs, ys)
    alone = value_and_grad(mine, gradreg.sam(rho=0.3))
    G, g, h = (
        np.mean([flat(f(params, a, b)) for a, b in zip(xs, ys, strict=True)], axis=0)
        for f in (lambda *given: alone(*given)[1], jax.grad(mine), jax.grad(theirs))
    )
    switch = following["held_out"]
    np.testing.assert_allclose(measured(switch), 2 * [(G - g) @ h], rtol=1e-9)
    np.testing.assert_allclose(measured(waited["held_out"]["noise"]), 2 * [g @ g - (1 + 0.5 * 7) * (g @ h)], rtol=1e-9)
    assert_close(jax.tree.map(lambda leaf: leaf[0], found), jax.tree.map(lambda leaf: leaf[1], found))


def test_what_it_returns() -> None:
    params, x, y = problem()
    looking = value_and_grad(fit, gradreg.sam(rho=0.3), held_out=kept)
    _, found, _ = looking(params, x, y, state=looking.init(params))
    assert_close(found, value_and_grad(fit, gradreg.sam(rho=0.3))(params, x, y)[1], tolerance=1e-6)
    gradients, state = grad(fit, gradreg.sam(rho=0.3), held_out=kept)(params, x, y, state=looking.init(params))
    assert_same_bits(gradients, found)
    assert set(state) == {"held_out"}
    plain = value_and_grad(fit, None, held_out=kept)
    assert len(plain(params, x, y)) == 2


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: value_and_grad(fit, gradreg.exact(gamma=0.1), held_out=kept), ValueError, "^held_out must be left out where no pass"),
        (lambda: value_and_grad(fit, gradreg.msam(rho=0.1), held_out=kept), ValueError, "^held_out must be left out where no pass"),
        (lambda: value_and_grad(fit, gradreg.sam(), held_out=kept, ascent=fit), ValueError, "^held_out must be left out where no pass"),
        (lambda: value_and_grad(fit, gradreg.sam(), held_out=3), TypeError, "^held_out must be a function or None"),  # type: ignore[arg-type]
        (lambda: value_and_grad(fit, gradreg.sam(), rule=HeldOut()), TypeError, "^rule must be a HeldOut, and go with held_out"),
    ],
)
def test_what_it_refuses(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
