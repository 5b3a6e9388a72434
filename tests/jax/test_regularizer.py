"""The contract of ``value_and_grad`` and ``grad``: forms, transformations, selection of leaves, unknown parts and other errors."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import grad, value_and_grad
from tests.penalties import PENALTIES, each_trait

from .cases import assert_close, assert_same_bits, first_state, problem, squared_error


def next_state(following: list[Any]) -> dict[str, Any]:
    """What a step returned beside loss and gradient, for the next."""
    return {"state": following[0]} if following else {}


def with_prediction(params: Any, x: Any, y: Any) -> Any:
    return squared_error(params, x, y), {"largest": jnp.max(jnp.abs(x)), "name_free_count": len(x)}


@each_trait
def test_the_forms_of_jax(penalty: GradientPenalty) -> None:
    """value_and_grad and grad return what their namesakes in jax return, with and without aux; and last a state where there is one."""
    params, x, y = problem()
    oracle = value_and_grad(squared_error, penalty)
    state = first_state(oracle, params)
    value, gradients, *following = oracle(params, x, y, step=50, **state)
    (value_too, aux), gradients_too, *following_too = value_and_grad(with_prediction, penalty, has_aux=True)(params, x, y, step=50, **state)
    assert_same_bits((value, gradients, following), (value_too, gradients_too, following_too))
    assert len(following) == len(state)
    assert aux["largest"] == jnp.max(jnp.abs(x))
    assert aux["name_free_count"] == 8
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    alone = grad(squared_error, penalty)(params, x, y, step=50, **state)
    assert_same_bits(alone, (gradients, *following) if state else gradients)
    alone, aux, *following_alone = grad(with_prediction, penalty, has_aux=True)(params, x, y, step=50, **state)
    assert_same_bits((alone, following_alone), (gradients, following))
    assert aux["largest"] == jnp.max(jnp.abs(x))


@pytest.mark.parametrize("has_aux", [False, True])
def test_no_penalty_is_jax_value_and_grad(has_aux: bool) -> None:
    params, x, y = problem()
    fun = with_prediction if has_aux else squared_error
    ours = value_and_grad(fun, None, has_aux=has_aux)(params, x, y, step=3)
    assert_same_bits(jax.tree.map(jnp.asarray, ours), jax.tree.map(jnp.asarray, jax.value_and_grad(fun, has_aux=has_aux)(params, x, y)))


@each_trait
def test_aux_is_the_first_pass(penalty: GradientPenalty) -> None:
    """Statistics that depend on the parameters are those at θ, not at the perturbed ones, unless nothing is evaluated at θ."""
    params, x, y = problem()

    def fun(params: Any, x: Any, y: Any) -> Any:
        return squared_error(params, x, y), params["0"]["bias"] + jnp.mean(x)

    for step in (50, jnp.int32(50), jnp.int32(0)):
        oracle = value_and_grad(fun, penalty, has_aux=True)
        (_, aux), *_ = oracle(params, x, y, step=step, **first_state(oracle, params))
        at_theta = not isinstance(
            penalty.direction, gradreg.Random
        )  # perturbs before it has looked, as an average of results does once it is not 0
        assert np.array_equal(aux, fun(params, x, y)[1]) == at_theta


def test_keyword_arguments_reach_fun_and_step_does_not() -> None:
    def fun(params: Any, *, factor: float, **rest: Any) -> Any:
        assert not rest
        return jnp.sum(factor * params**2)

    value, gradient = value_and_grad(fun, gradreg.fgr(gamma=0.5, epsilon=0.5))(jnp.array(1.0), step=2, factor=0.5)
    assert (float(value), float(gradient)) == (0.5, 1.5)


def test_a_key_among_the_arguments_gives_all_passes_the_same_mask() -> None:
    def dropped(params: Any, key: Any) -> Any:
        return 0.5 * jnp.sum(jax.random.bernoulli(key, 0.5, params.shape) * params**2)

    params = jnp.arange(1.0, 65.0)
    for key in jax.random.split(jax.random.key(0), 5):
        mask = jax.random.bernoulli(key, 0.5, params.shape)
        _, gradient = value_and_grad(dropped, gradreg.cgr(gamma=0.5, epsilon=0.5))(params, key)
        np.testing.assert_array_equal(gradient, 1.5 * mask * params)


@each_trait
def test_scan_and_vmap_over_seeds(penalty: GradientPenalty) -> None:
    params, x, y = problem()
    oracle = value_and_grad(squared_error, penalty)

    def train(params: Any, scale: Any) -> Any:
        def one(carry: Any, step: jax.Array) -> Any:
            params, state = carry
            loss, gradients, *following = oracle(params, x, y, step=step, **state)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), next_state(following)), loss

        start = jax.tree.map(lambda p: scale * p, params)
        return jax.lax.scan(one, (start, first_state(oracle, start)), jnp.arange(5))

    scales = jnp.array([0.5, 1.0])
    (finals, _), losses = jax.jit(jax.vmap(train, in_axes=(None, 0)))(params, scales)
    for i, scale in enumerate(scales):
        single = jax.tree.map(lambda p, s=scale: s * p, params)
        state = first_state(oracle, single)
        for step in range(5):
            loss, gradients, *following = oracle(single, x, y, step=step, **state)
            state = next_state(following)
            np.testing.assert_allclose(losses[i, step], loss, rtol=1e-5)
            single = jax.tree.map(lambda p, g: p - 0.1 * g, single, gradients)
        assert_close(jax.tree.map(lambda p, i=i: p[i], finals), single, tolerance=1e-5)


@each_trait
def test_steps_of_any_integer_kind(penalty: GradientPenalty) -> None:
    params, x, y = problem()
    oracle = value_and_grad(squared_error, penalty)
    state = first_state(oracle, params)
    expected = oracle(params, x, y, step=4, **state)[:2]
    for step in (np.int64(4), np.array(4), jnp.int32(4), jnp.uint8(4)):
        assert_close(oracle(params, x, y, step=step, **state)[:2], expected, tolerance=1e-6)


def test_parameters_selects_leaves_by_path() -> None:
    params, x, y = problem()
    seen: dict[str, tuple[int, ...]] = {}

    def selected(name: str, leaf: Any) -> bool:
        seen[name] = leaf.shape
        return name.startswith("2/")

    actual = grad(squared_error, gradreg.sam(rho=0.3), parameters=selected)(params, x, y)
    assert seen == {"0/bias": (5,), "0/weight": (3, 5), "2/bias": (2,), "2/weight": (5, 2)}
    g = jax.grad(squared_error)(params, x, y)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g["2"])))
    there = {"0": params["0"], "2": jax.tree.map(lambda p, d: p + 0.3 * d / norm, params["2"], g["2"])}
    assert_close(actual, jax.grad(squared_error)(there, x, y), tolerance=1e-6)


def test_regrouping_the_tree_changes_nothing() -> None:
    params, x, y = problem()
    leaves, structure = jax.tree.flatten(params)
    for penalty in PENALTIES.values():
        oracle, of_list = (value_and_grad(f, penalty) for f in (squared_error, lambda at: squared_error(structure.unflatten(at), x, y)))
        nested = oracle(params, x, y, step=50, **first_state(oracle, params))
        flat = of_list(leaves, step=50, **first_state(of_list, leaves))
        assert_close(jax.tree.leaves(nested[1]), flat[1], tolerance=1e-6)


def test_python_floats_and_empty_subtrees_are_parameters_too() -> None:
    actual = grad(lambda p: 0.5 * p["w"] ** 2, gradreg.fgr(gamma=0.5, epsilon=0.5))({"w": 2.0, "nothing": None})
    assert (float(actual["w"]), actual["nothing"]) == (3.0, None)


def test_the_second_derivative_of_the_oracle() -> None:
    """The oracle is a pure function like any other: it can itself be differentiated, here by the strength's input."""
    oracle = grad(lambda theta, a: 0.5 * a * theta**2, gradreg.fgr(gamma=0.5, epsilon=0.5))
    assert float(jax.grad(oracle)(3.0, 2.0)) == pytest.approx(2.0 + 0.5 * 4.0)


FGR = gradreg.fgr(gamma=0.5, epsilon=0.5)
THETA = jnp.ones(3)


def total(params: Any) -> Any:
    return jnp.sum(params)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: value_and_grad(3, FGR), TypeError, r"fun must be callable; got 3\. Pass the loss function"),
        (
            lambda: value_and_grad(total, "sam"),
            TypeError,
            r"penalty must be a GradientPenalty or None; got 'sam' \(str\)\. Use gradreg\.sam",
        ),
        (lambda: value_and_grad(total, gradreg.sam), TypeError, r"penalty must be a GradientPenalty or None; got <function sam"),
        (lambda: value_and_grad(total, FGR, parameters="w"), TypeError, r"parameters must be a function or None; got 'w'"),
        (lambda: value_and_grad(total, FGR, ascent=1), TypeError, r"ascent must be a function or None; got 1"),
        (lambda: value_and_grad(total, gradreg.exact(gamma=1.0), ascent=total), ValueError, r"ascent must be None for an exact penalty"),
        (
            lambda: value_and_grad(total, gradreg.gnp(r=0.1, alpha=0.8, mixing="unit"), ascent=total),
            ValueError,
            r"ascent must be None with mixing='unit'",
        ),
        (
            lambda: value_and_grad(total, gradreg.gsam(rho=0.1, a=0.2), ascent=total),
            ValueError,
            r"ascent must be None with mixing='surrogate",
        ),
        (
            lambda: value_and_grad(total, gradreg.remembered(epsilon=0.1), ascent=total),
            ValueError,
            r"ascent must be None for a direction that needs no gradient, average of results\(decay 0\.5\); got a function",
        ),
        (lambda: value_and_grad(total, FGR).init(THETA), ValueError, r"init is for penalties that carry a state.*got F-GR.*without state="),
        (lambda: value_and_grad(total, None).init(THETA), ValueError, r"init is for penalties that carry a state.*got None"),
        (lambda: value_and_grad(total, FGR, axis_name=3), TypeError, r"axis_name must be a string, a tuple of strings or None; got 3"),
        (lambda: value_and_grad(total, FGR, scope="golbal"), ValueError, r"unknown scope 'golbal'\. Did you mean 'global'\?"),
        (lambda: value_and_grad(total, FGR, scope="global"), ValueError, r"scope must be 'local' without axis_name; got 'global'"),
        (lambda: grad(total, "sam"), TypeError, r"penalty must be a GradientPenalty or None"),
    ],
)
def test_bad_arguments_when_built(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


class OwnDirection(gradreg.Direction):
    """A direction that no engine has a function for."""


class LikeAdaptive(gradreg.Adaptive): ...


class LikeGradient(gradreg.Gradient): ...


class OwnMask(gradreg.Mask):
    level = "coordinates"


class OwnSelection(gradreg.Mask):
    level = "parameters"


class LikeSparse(gradreg.Sparse): ...


class LikeNorms(gradreg.OnlyNorms): ...


class OwnMixing(gradreg.GradientMixing): ...


class OwnSum(gradreg.GradientMixing):
    plain_gradient = "summed"


class LikeGap(gradreg.SurrogateGap): ...


class LikePlain(gradreg.Plain): ...


class LikeUnit(gradreg.Unit): ...


UNKNOWN = [
    ("direction", OwnDirection(), "directions.ascent_direction"),
    ("direction", LikeAdaptive(), "directions.ascent_direction"),
    ("direction", LikeGradient(), "directions.ascent_direction"),
    ("mask", OwnMask(), "masks.coordinates"),
    ("mask", OwnSelection(), "masks.selected_parameters"),
    ("mask", LikeSparse(sparsity=0.5), "masks.coordinates"),
    ("mask", LikeNorms(), "masks.selected_parameters"),
    ("mixing", OwnMixing(), "mixing.mix"),
    ("mixing", OwnSum(), "mixing.weigh_plain"),
    ("mixing", LikeGap(a=0.5), "mixing.mix"),
    ("mixing", LikePlain(), "mixing.weigh_plain"),
    ("mixing", LikeUnit(), "mixing.weigh_plain"),
]


@pytest.mark.parametrize("build", [value_and_grad, grad])
@pytest.mark.parametrize(("kind", "part", "function"), UNKNOWN, ids=[type(part).__name__ for _, part, _ in UNKNOWN])
def test_a_part_that_the_engine_does_not_know(kind: str, part: Any, function: str, build: Any) -> None:
    """An error when built, and so is a class derived from a part that it does know: never the function of another part."""
    penalty = replace(gradreg.gnp(r=0.1, alpha=0.5), **{kind: part})
    name = type(part).__name__
    message = (
        rf"^{kind} must be one that the JAX engine knows; got .*{name}.*@gradreg\.jax\.{function}\.register, then def _\({kind}: {name}, "
    )
    with pytest.raises(TypeError, match=message):
        build(total, penalty)


@pytest.mark.parametrize("penalty", [None, FGR, gradreg.exact(gamma=0.5)], ids=str)
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("fun", "params", "options", "error", "message"),
    [
        (lambda p: p, THETA, {}, ValueError, r"fun must return a scalar loss; got shape \(3,\)\. Reduce it with \.mean\(\)"),
        (lambda p: p.astype(int).sum(), THETA, {}, TypeError, r"fun must return a real floating loss; got dtype int"),
        (lambda p: (1j * p).sum(), THETA, {}, TypeError, r"fun must return a real floating loss; got dtype complex64"),
        (lambda p: None, THETA, {}, TypeError, r"fun must return a real floating loss; got None"),
        (lambda p: (p.sum(), 1), THETA, {}, TypeError, r"fun must return the loss alone; got a tuple of 2\. Pass has_aux=True"),
        (total, THETA, {"has_aux": True}, TypeError, r"fun must return \(loss, aux\) with has_aux=True; got"),
        (total, jnp.arange(3), {}, TypeError, r"params must hold real floating arrays only; got dtype int"),
        (lambda p: p["w"].sum(), {"w": THETA, "n": jnp.array(True)}, {}, TypeError, r"real floating arrays only; got dtype bool at 'n'"),
        (lambda p: p["w"].sum(), {"w": THETA, "z": 1j * THETA}, {}, TypeError, r"real floating arrays only; got dtype complex64 at 'z'"),
        (total, {}, {}, ValueError, r"parameters must select at least one leaf of params, which has 0; got none"),
        (
            lambda p: p["w"].sum(),
            {"w": THETA},
            {"parameters": lambda name, leaf: name == "v"},
            ValueError,
            r"parameters must select at least one leaf of params, which has 1; got none\. Their names look like 'w'",
        ),
        (
            total,
            THETA,
            {"axis_name": "batch"},
            ValueError,
            r"axis_name must name an axis mapped around the call; got 'batch', which is not",
        ),
    ],
)
def test_bad_input_when_traced(
    fun: Any, params: Any, options: Any, error: type[Exception], message: str, penalty: GradientPenalty | None, jitted: bool
) -> None:
    oracle = value_and_grad(fun, penalty, **options)
    with pytest.raises(error, match=message):
        (jax.jit(oracle) if jitted else oracle)(params)


def test_leaves_that_are_no_arrays() -> None:
    with pytest.raises(
        TypeError, match=r"params must hold real floating arrays only; got <built-in function abs> .* at 'activation'.*nnx\.split"
    ):
        value_and_grad(lambda p: p["w"].sum(), FGR)({"w": THETA, "activation": abs})


def test_a_bad_ascent_names_ascent() -> None:
    with pytest.raises(ValueError, match=r"ascent must return a scalar loss; got shape \(3,\)"):
        value_and_grad(total, FGR, ascent=lambda p: p)(THETA)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (-1, ValueError, r"step must be >= 0; got -1"),
        (1.0, TypeError, r"step must be a whole number >= 0; got 1\.0\. Pass the number of optimizer steps done so far"),
        (True, TypeError, r"step must be a whole number >= 0; got True"),
        (jnp.float32(1.0), TypeError, r"step must be one integer; got an array of shape \(\) and dtype float32"),
        (jnp.arange(2), TypeError, r"step must be one integer; got an array of shape \(2,\)"),
    ],
)
def test_bad_steps(step: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        value_and_grad(total, FGR.warmup("zero", steps=3))(THETA, step=step)


def test_a_radius_of_zero_where_there_is_a_strength() -> None:
    """Said at once where the step is known; not finite, never silently plain, where it is traced."""
    penalty = GradientPenalty(power=2, strength=0.5, radius=gradreg.Ramp(start=0.0, end=0.5, steps=3))
    oracle = grad(lambda p: jnp.sum(p**2), penalty)
    with pytest.raises(ValueError, match=r"radius must be > 0 wherever the strength is; got radius 0 and strength 0\.5 at step 0"):
        oracle(THETA, step=0)
    assert not jnp.isfinite(oracle(THETA, step=jnp.int32(0))).any()
    assert jnp.isfinite(oracle(THETA, step=jnp.int32(1))).all()
