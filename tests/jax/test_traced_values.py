"""Strengths and radii that a program receives when it runs, steps that it must be given, and what turns out invalid then."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import grad, value_and_grad
from gradreg.schedules import Constant, Product, Traced
from tests.penalties import OF_EACH_TRAIT, PENALTIES

from .cases import assert_close, first_state, problem, squared_error

RHOS = (0.1, 0.3, 0.7)
BY_RHO: dict[str, Any] = {
    "sam": lambda rho: gradreg.sam(rho=rho),
    "gnp": lambda rho: gradreg.gnp(r=rho, alpha=0.8),
    "alpha": lambda alpha: gradreg.gnp(r=0.3, alpha=alpha),
    "unit": lambda rho: gradreg.gnp(r=rho, alpha=0.8, mixing="unit"),
    "fgr": lambda rho: gradreg.fgr(gamma=rho, epsilon=rho),
    "gamma": lambda gamma: gradreg.fgr(gamma=gamma, epsilon=0.5),
    "epsilon": lambda epsilon: gradreg.bgr(gamma=0.2, epsilon=epsilon),
    "cgr": lambda rho: gradreg.cgr(gamma=0.3, epsilon=rho),
    "exact": lambda gamma: gradreg.exact(gamma=gamma, power=1),
    "asam": lambda rho: gradreg.asam(rho=rho),
    "late": lambda rho: gradreg.sam(rho=rho).warmup("zero", steps=2),
    "ramp": lambda rho: gradreg.fgr(gamma=rho, epsilon=rho).warmup("radius", steps=4),
    "seldom": lambda rho: gradreg.sam(rho=rho).every(2, compensate=True),
    "by-chance": lambda rho: gradreg.gnp(r=rho, alpha=0.5).with_probability(0.5),
    "gsam": lambda rho: gradreg.gsam(rho=rho, a=0.4),
}


@pytest.mark.parametrize(("name", "traced_step"), [*((name, True) for name in BY_RHO), ("late", False), ("ramp", False), ("unit", False)])
@pytest.mark.usefixtures("x64")
def test_vmap_over_a_radius_or_strength_equals_single_runs(name: str, traced_step: bool) -> None:
    params, x, y = problem()

    def by(rho: Any, step: Any) -> Any:
        return value_and_grad(squared_error, BY_RHO[name](rho))(params, x, y, step=step)

    for step in (0, 3):
        if traced_step:
            found = jax.jit(jax.vmap(by, in_axes=(0, None)))(jnp.array(RHOS), jnp.int32(step))
        else:
            found = jax.vmap(lambda rho, step=step: by(rho, step))(jnp.array(RHOS))
        for i, rho in enumerate(RHOS):
            expected = value_and_grad(squared_error, BY_RHO[name](rho))(params, x, y, step=step)
            assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], found), expected)


@pytest.mark.usefixtures("x64")
def test_a_traced_factor_of_a_schedule_and_gradients_by_the_radius() -> None:
    params, x, y = problem()
    schedule = gradreg.Cosine(steps=9)
    found = jax.jit(lambda rho: grad(squared_error, gradreg.sam(rho=Traced(rho) * schedule))(params, x, y, step=4))(0.5)
    assert_close(found, grad(squared_error, gradreg.sam(rho=0.5 * schedule(4)))(params, x, y))
    # G = θ + γ·θ on ½θ²: dG/dγ = θ.
    slope = jax.grad(lambda gamma: grad(lambda at: 0.5 * at**2, gradreg.fgr(gamma=gamma, epsilon=0.5))(3.0))
    assert float(slope(0.2)) == pytest.approx(3.0)


def test_traced_values_that_are_known_now_are_values_like_others() -> None:
    """Arrays outside a transformation: compared by identity, never equal to a number; SAM knows that its c is 1."""
    rho = jnp.float32(0.3)
    assert gradreg.sam(rho=rho) == gradreg.sam(rho=rho) != gradreg.sam(rho=0.3)
    assert hash(gradreg.sam(rho=rho)) == hash(gradreg.sam(rho=rho))
    assert gradreg.sam(rho=rho).coefficient_is_one
    assert gradreg.fgr(gamma=rho, epsilon=rho).coefficient_is_one
    assert not gradreg.fgr(gamma=rho, epsilon=jnp.float32(0.3)).coefficient_is_one
    assert str(gradreg.sam(rho=rho)) == "SAM(rho [traced])"
    with pytest.raises(TypeError, match=r"a traced value has no form as a dictionary; got 0\.3.*float\(value\)"):
        gradreg.sam(rho=rho).to_dict()
    with pytest.raises(TypeError, match=r"rho must be a real number; got .*complex64"):
        gradreg.sam(rho=jnp.complex64(1))
    with pytest.raises(TypeError, match=r"rho must be a real number; got .*bool"):
        gradreg.sam(rho=jnp.bool_(True))
    assert (Traced(rho) * 2.0 * gradreg.Cosine(steps=9)).bounds() == (0.0, float("inf"))  # 0·∞ is 0
    with pytest.raises(TypeError, match=r"rho must be a number > 0; got Array"):
        gradreg.sam(rho=jnp.ones(3))


@pytest.mark.parametrize("name", ["sam", "alpha", "gamma", "epsilon", "exact"])
def test_a_negative_traced_value_is_not_finite(name: str) -> None:
    params, x, y = problem()
    run = jax.jit(lambda rho: value_and_grad(squared_error, BY_RHO[name](rho))(params, x, y, step=3)[1])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(run(0.3)))
    assert all(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(run(-0.3)))


def test_a_traced_radius_of_zero_is_the_plain_gradient() -> None:
    params, x, y = problem()
    assert_close(
        jax.jit(lambda rho: grad(squared_error, gradreg.sam(rho=rho))(params, x, y))(0.0), jax.grad(squared_error)(params, x, y), 1e-6
    )


DEPENDENT = [name for name, penalty in PENALTIES.items() if penalty.depends_on_step]


def test_which_penalties_depend_on_the_step() -> None:
    """By comparison: those whose numbers, draws or masks differ between two steps."""
    words = ("warm-up", "log-time", "random", "sparse", "looksam", "every-2", "by-chance")
    assert [name for name in PENALTIES if name == "unified" or any(word in name for word in words)] == DEPENDENT
    assert not gradreg.sam(rho=0.1).every(1).depends_on_step
    assert not gradreg.looksam(rho=0.1, k=1).depends_on_step
    assert not gradreg.sam(rho=Product(left=Constant(value=2.0), right=0.1)).depends_on_step
    assert not gradreg.sam(rho=jnp.float32(0.1)).depends_on_step
    assert not gradreg.gnp(r=0.3, alpha=jnp.float32(0.5)).depends_on_step
    assert not gradreg.sam(rho=0.1).only_norms().depends_on_step


@pytest.mark.parametrize("name", [*DEPENDENT, "sam", "fgr", "exact", "friendly", "remembered", "gsam"])
def test_step_is_required_where_the_penalty_depends_on_it(name: str) -> None:
    params, x, y = problem()
    oracle = value_and_grad(squared_error, PENALTIES[name])
    state = first_state(oracle, params)
    if name in DEPENDENT:
        with pytest.raises(TypeError, match=r"step must be given, because .* depends on it; got none\. Pass step="):
            oracle(params, x, y, **state)
        with pytest.raises(TypeError, match=r"step must be given"):
            grad(squared_error, PENALTIES[name])(params, x, y, **state)
    else:
        assert_close(oracle(params, x, y, **state)[1], oracle(params, x, y, step=7, **state)[1])


@pytest.mark.parametrize("name", ["sam-zero-warm-up", "fgr-log-time", "random", "sparse-random", "looksam", "exact-zero-warm-up"])
def test_a_negative_step_is_an_error_or_not_finite(name: str) -> None:
    params, x, y = problem()
    oracle = value_and_grad(squared_error, PENALTIES[name])
    state = first_state(oracle, params)
    with pytest.raises(ValueError, match=r"step must be >= 0; got -3"):
        oracle(params, x, y, step=jnp.int32(-3), **state)
    run = jax.jit(lambda step: oracle(params, x, y, step=step, **state)[1:])
    gradients, *following = run(jnp.int32(-3))
    spoilt = [leaf for leaf in jax.tree.leaves((gradients, following)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert any(jnp.isnan(leaf).any() for leaf in spoilt)
    assert not any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(run(jnp.int32(3))[0]))


STRICT = {**PENALTIES, "unit-ramp": gradreg.gnp(r=0.3, alpha=0.8, mixing="unit").warmup("strength", steps=9)}


@pytest.mark.parametrize("name", [*OF_EACH_TRAIT, "fgr-log-time", "unit-ramp"])
@pytest.mark.parametrize("double", [False, True], ids=["x32", "x64"])
def test_strict_promotion_of_dtypes(name: str, double: bool) -> None:
    """Also float32 parameters where the default is float64, and leaves of two dtypes."""
    with jax.enable_x64(double), jax.numpy_dtype_promotion("strict"):
        params, x, y = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), problem())
        params = {**params, "2": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["2"])}

        def loss(params: Any, x: Any, y: Any) -> Any:
            return squared_error(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), x, y)

        oracle = value_and_grad(loss, STRICT[name])
        state = first_state(oracle, params)
        _, strict, *_ = oracle(params, x, y, step=jnp.int32(3), **state)
    with jax.enable_x64(double):
        _, standard, *_ = oracle(params, x, y, step=jnp.int32(3), **state)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(strict), jax.tree.leaves(standard), strict=True))


def test_a_loss_with_a_step_receives_it() -> None:
    def annealed(params: Any, factor: Any, step: Any) -> Any:
        return jnp.sum(factor * params**2) / (1 + step)

    theta, fgr = jnp.array(1.0), gradreg.fgr(gamma=0.5, epsilon=0.5)
    oracle = value_and_grad(annealed, fgr)
    assert float(oracle(theta, 2.0, step=3)[0]) == 0.5
    assert float(jax.jit(lambda step: oracle(theta, 2.0, step=step)[0])(jnp.int32(3))) == 0.5
    assert float(oracle(theta, 2.0, 1, step=3)[0]) == 1.0  # by position it is the caller's
    assert float(value_and_grad(annealed, None)(theta, 2.0, step=3)[0]) == 0.5
    with pytest.raises(TypeError, match=r"step must be given, because fun has a parameter of that name; got none"):
        oracle(theta, 2.0)
    ascent = grad(lambda params: 0.5 * params**2, fgr, ascent=lambda params, *, step: 0.5 * step * params**2)
    assert float(ascent(theta, step=2)) == 2.0  # θ + ε·(2θ)
    assert float(value_and_grad(lambda params, *, step=0: params * (1 + step), fgr)(theta)[0]) == 1.0
    assert float(value_and_grad(lambda params, *more, step: params * sum(more) * step, fgr)(theta, 2.0, 3.0, step=4)[0]) == 20.0
    with pytest.raises(TypeError, match=r"because ascent has a parameter of that name"):
        grad(lambda params: params, fgr, ascent=lambda params, *, step: params * step)(theta)


@pytest.mark.parametrize("keyword", ["state", "loss_scale"])
def test_keywords_that_the_oracle_keeps_are_errors(keyword: str) -> None:
    loose: Any = {
        "state": lambda params, state: params,
        "loss_scale": lambda params, *, loss_scale: params,
    }[keyword]
    message = rf"must not have a parameter named '{keyword}'; got <function.*positional-only"
    for penalty in (None, gradreg.sam(rho=0.1), gradreg.friendly_sam(rho=0.1)):
        with pytest.raises(ValueError, match="fun " + message):
            value_and_grad(loose, penalty)
    with pytest.raises(ValueError, match="ascent " + message):
        value_and_grad(lambda params, x: params, gradreg.sam(rho=0.1), ascent=loose)


def test_state_where_there_is_none() -> None:
    with pytest.raises(TypeError, match=r"state must be left out for a penalty that carries none.*under another name, or by position"):
        value_and_grad(lambda params, **rest: params, gradreg.sam(rho=0.1))(jnp.array(1.0), state={})

    def positional(params: Any, state: Any, /) -> Any:
        return params * state

    assert float(value_and_grad(positional, gradreg.sam(rho=0.1))(jnp.array(1.0), 2.0)[0]) == 2.0


SCALED = ["sam", "gnp-unit", "fgr-mixing", "bgr", "cgr", "exact", "gsam", "wsam-decoupled"]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.usefixtures("x64")
def test_a_loss_scale_that_is_known_changes_nothing(name: str) -> None:
    params, x, y = problem()
    oracle = value_and_grad(squared_error, PENALTIES[name])
    state = first_state(oracle, params)
    run = jax.jit(lambda scale: oracle(params, x, y, step=4, loss_scale=scale, **state)[:2])
    assert_close(run(jnp.float32(2.0**15)), oracle(params, x, y, step=4, **state)[:2])


def test_a_loss_scale_saves_what_half_precision_flushes_to_zero() -> None:
    """Gradients of 1e-9 in a float16 activation; the parameters are float32."""

    def loss(params: Any) -> Any:
        return jnp.sum(params.astype(jnp.float16).astype(jnp.float32) * jnp.float32(1e-9))

    params = jnp.ones(3)
    penalty = gradreg.fgr(gamma=0.5, epsilon=0.5)
    assert grad(loss, penalty)(params).tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(grad(loss, penalty)(params, loss_scale=2.0**15), 1e-9, rtol=2e-3)
    value = value_and_grad(loss, penalty)(params, loss_scale=2.0**15)[0]
    np.testing.assert_allclose(value, 3e-9, rtol=1e-6)


def test_a_loss_scale_is_that_of_the_direction_too() -> None:
    def loss(params: Any) -> Any:
        return jnp.sum(params.astype(jnp.float16).astype(jnp.float32) ** 2) * jnp.float32(0.5e-9)

    oracle = grad(loss, gradreg.sam(rho=1.0), ascent=loss)
    np.testing.assert_allclose(oracle(jnp.float32(3.0), loss_scale=2.0**15), 4e-9, rtol=2e-3)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0.0, ValueError, r"loss_scale must be finite and > 0; got 0\.0"),
        ("dynamic", TypeError, r"loss_scale must be a number > 0; got 'dynamic'"),
        (jnp.ones(2), TypeError, r"loss_scale must be one real number; got an array of shape \(2,\)"),
        (jnp.int32(2), TypeError, r"loss_scale must be one real number; got an array of shape \(\) and dtype int32"),
    ],
)
def test_bad_loss_scales(scale: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        value_and_grad(jnp.sum, gradreg.sam(rho=0.1))(jnp.ones(3), loss_scale=scale)


METRICS = ["gnp-unit", "bgr", "cgr", "exact", "gsam", "looksam", "sam-zero-warm-up", "exact-zero-warm-up", "random"]


@pytest.mark.parametrize(("name", "branch"), [*((name, "cond") for name in METRICS), ("looksam", "select"), ("sam-zero-warm-up", "select")])
@pytest.mark.usefixtures("x64")
def test_metrics(name: str, branch: Any) -> None:
    penalty: GradientPenalty = PENALTIES[name]
    params, x, y = problem()
    oracle = value_and_grad(squared_error, penalty, with_metrics=True, branch=branch)
    g = flat(jax.grad(squared_error)(params, x, y))
    for step in (0, 5):
        state = first_state(oracle, params)
        (value, metrics), gradients, *_ = jax.jit(oracle)(params, x, y, step=jnp.int32(step), **state)
        plain = value_and_grad(squared_error, penalty)(params, x, y, step=step, **state)
        assert_close((value, gradients), plain[:2])
        values = penalty.at(step)
        assert float(metrics.strength) == pytest.approx(values.strength)
        assert nan_or(values.radius) == pytest.approx(float(metrics.radius), nan_ok=True)
        assert nan_or(values.coefficient) == pytest.approx(float(metrics.coefficient), nan_ok=True)
        if not penalty.direction.needs_gradient:
            assert jnp.isnan(metrics.cosine)
            continue
        np.testing.assert_allclose(metrics.gradient_norm, jnp.linalg.norm(g), rtol=1e-12)
        if penalty.difference == "exact" or not values.fresh:
            assert jnp.isnan(metrics.cosine)
            continue
        distance = values.radius * (-1 if penalty.difference == "backward" else 1) / (jnp.linalg.norm(g) if penalty.power == 1 else 1.0)
        there = jax.tree.map(lambda p, d, s=distance: p + s * d, params, jax.grad(squared_error)(params, x, y))
        second = flat(jax.grad(squared_error)(there, x, y))
        np.testing.assert_allclose(metrics.cosine, g @ second / jnp.linalg.norm(g) / jnp.linalg.norm(second), rtol=1e-12)
        assert 0 < float(metrics.cosine) < 0.9999


def flat(tree: Any) -> Any:
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def nan_or(value: float | None) -> float:
    return float("nan") if value is None else value


def test_forms_with_metrics() -> None:
    def with_aux(params: Any) -> Any:
        return jnp.sum(params**2), "aux"

    theta = jnp.array([3.0, 4.0])
    for penalty in (None, gradreg.sam(rho=0.1)):
        (value, aux, metrics), _ = value_and_grad(with_aux, penalty, has_aux=True, with_metrics=True)(theta)
        assert (float(value), aux, float(metrics.gradient_norm)) == (25.0, "aux", 10.0)
        if penalty is None:
            assert (float(metrics.strength), *map(jnp.isnan, (metrics.radius, metrics.coefficient, metrics.cosine))) == (
                0.0,
                True,
                True,
                True,
            )
        _, aux, metrics = grad(with_aux, penalty, has_aux=True, with_metrics=True)(theta)
        assert (aux, float(metrics.gradient_norm)) == ("aux", 10.0)
        _, metrics = grad(lambda at: with_aux(at)[0], penalty, with_metrics=True)(theta)
        assert float(metrics.strength) == pytest.approx(0.0 if penalty is None else 0.1)
    oracle = grad(lambda at: with_aux(at)[0], gradreg.friendly_sam(rho=0.1), with_metrics=True)
    _, metrics, state = oracle(theta, state=oracle.init(theta))
    assert (set(state), float(metrics.gradient_norm)) == ({"average"}, 10.0)


def test_metrics_of_a_part_of_the_parameters() -> None:
    loss = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)  # noqa: E731
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([100.0])}
    (_, metrics), _ = value_and_grad(loss, gradreg.sam(rho=1.0), parameters=lambda name, leaf: name == "a", with_metrics=True)(params)
    assert float(metrics.gradient_norm) == 10.0
    assert float(metrics.cosine) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["sam", "gnp", "fgr-2-steps"])
@pytest.mark.usefixtures("x64")
def test_metrics_where_another_function_gives_the_direction(name: str) -> None:
    """The gradients that are compared are those of the loss; for c = 1, which does not evaluate it at θ, the first is the other's."""
    penalty, (params, x, y) = PENALTIES[name], problem()
    half = lambda params, x, y: squared_error(params, x[:2], y[:2])  # noqa: E731
    gradients: list[Any] = []

    def noted(fun: Any) -> Any:
        def noting(at: Any, x: Any, y: Any) -> Any:
            gradients.append((fun, flat(jax.grad(fun)(jax.lax.stop_gradient(at), x, y))))
            return fun(at, x, y)

        return noting

    oracle = value_and_grad(noted(squared_error), penalty, ascent=noted(half), with_metrics=True)
    (_, metrics), _ = oracle(params, x, y)
    of_loss = [g for fun, g in gradients if fun is squared_error]
    first, last = gradients[0][1], of_loss[-1]
    assert gradients[0][0] is (half if name == "sam" else squared_error)
    np.testing.assert_allclose(metrics.gradient_norm, jnp.linalg.norm(first), rtol=1e-12)
    np.testing.assert_allclose(metrics.cosine, first @ last / jnp.linalg.norm(first) / jnp.linalg.norm(last), rtol=1e-12)


def test_replace_keeps_a_traced_radius() -> None:
    """Modifiers build a new penalty around the same array."""
    theta = jnp.array([3.0, 4.0])
    late = jax.jit(lambda rho: grad(lambda at: 0.5 * jnp.sum(at**2), replace(gradreg.sam(rho=rho), ascent_steps=2))(theta))
    np.testing.assert_allclose(late(0.5), theta * 1.1, rtol=1e-6)
