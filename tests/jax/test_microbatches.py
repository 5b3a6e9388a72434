"""Micro-batches equal the undivided batch, with one perturbation for all, and hold one part's activations at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import microbatched, value_and_grad
from tests.penalties import each_trait

from .cases import Counted, arrays, assert_close, first_state, problem, squared_error


def divided(parts: int, *whole: jax.Array) -> list[jax.Array]:
    return [a.reshape(parts, -1, *a.shape[1:]) for a in whole]


@each_trait
@pytest.mark.usefixtures("x64")
def test_equals_the_undivided_batch(penalty: GradientPenalty) -> None:
    """Loss, gradient and what is remembered, over two steps."""
    params, x, y = problem()
    whole, divided_in_four = (value_and_grad(fun, penalty) for fun in (squared_error, microbatched(squared_error)))
    state = expected_state = first_state(whole, params)
    run, run_whole = jax.jit(divided_in_four), jax.jit(whole)
    for step in (50, 51):
        value, gradients, *following = run(params, *divided(4, x, y), step=jnp.int32(step), **state)
        expected_value, expected, *expected_following = run_whole(params, x, y, step=jnp.int32(step), **expected_state)
        np.testing.assert_allclose(value, expected_value, rtol=1e-14)
        assert_close(gradients, expected)
        for ours, theirs in zip(following, expected_following, strict=True):
            assert_close(ours, theirs)
            state, expected_state = {"state": ours}, {"state": theirs}


@pytest.mark.usefixtures("x64")
def test_each_part_has_its_own_key_and_both_passes_the_same() -> None:
    def dropped(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum((params * jax.random.bernoulli(key, 0.5, x.shape) * x) ** 2)

    (x,) = map(jnp.asarray, arrays((4, 6)))
    params, keys = jnp.ones(6), jax.random.split(jax.random.key(0), 4)
    penalty = gradreg.fgr(gamma=0.1, epsilon=0.1)
    masks = jnp.stack([jax.random.bernoulli(k, 0.5, (6,)) for k in keys])
    assert not (masks == masks[0]).all()
    A = 2 * jnp.mean(masks * x**2, 0)  # the loss is ½·Σ A·θ²
    _, actual = value_and_grad(microbatched(dropped), penalty)(params, x, keys)
    assert_close(actual, A * params + 0.1 * A**2 * params)


def test_an_argument_for_all_parts_and_keywords() -> None:
    def scaled(params: Any, x: jax.Array, scale: jax.Array, *, training: bool) -> jax.Array:
        assert training is True  # still a Python value
        return jnp.mean(scale * params * x)

    loss = microbatched(scaled, in_axes=(0, None))
    value, gradient = jax.value_and_grad(loss)(jnp.array(2.0), jnp.arange(4.0).reshape(2, 2), jnp.array(3.0), training=True)
    assert (float(value), float(gradient)) == (9.0, 4.5)


def test_aux_is_stacked() -> None:
    def with_aux(params: Any, x: jax.Array) -> Any:
        return jnp.mean(params * x), {"largest": x.max(), "count": len(x)}

    parts = jnp.arange(6.0).reshape(3, 2)
    (value, aux), gradient = value_and_grad(microbatched(with_aux, has_aux=True), gradreg.sam(rho=0.1), has_aux=True)(jnp.array(1.0), parts)
    assert (float(value), float(gradient)) == (2.5, 2.5)
    assert aux["largest"].tolist() == [1.0, 3.0, 5.0]
    assert aux["count"].tolist() == [2, 2, 2]
    loss, aux = microbatched(with_aux, has_aux=True)(jnp.array(1.0), parts)
    assert (float(loss), aux["largest"].tolist()) == (2.5, [1.0, 3.0, 5.0])


def test_evaluations() -> None:
    params, x, y = problem()
    loss = Counted(squared_error)
    jax.block_until_ready(value_and_grad(microbatched(loss), gradreg.fgr(gamma=0.4, epsilon=0.4))(params, *divided(4, x, y)))
    assert loss.evaluations() == 2 * 4


def test_under_vmap_over_seeds() -> None:
    params, x, y = problem()
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    oracle = value_and_grad(microbatched(squared_error), gradreg.fgr(gamma=0.4, epsilon=0.4))
    parts = divided(4, x, y)
    _, actual = jax.vmap(oracle, in_axes=(0, None, None))(several, *parts)
    for i in range(2):
        _, expected = oracle(jax.tree.map(lambda p, i=i: p[i], several), *parts)
        assert_close(jax.tree.map(lambda p, i=i: p[i], actual), expected, tolerance=1e-5)


def test_memory_of_one_part() -> None:
    """The activations of a wide layer dominate; undivided they take eight times the room."""

    def wide(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["in"]) @ params["out"]) ** 2)

    params = {"in": jnp.ones((4, 512)), "out": jnp.ones((512, 4))}
    penalty = gradreg.sam(rho=0.1)

    def temporary(loss: Any, x: jax.Array) -> int:
        return jax.jit(value_and_grad(loss, penalty)).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    x = jnp.ones((1024, 4))
    assert temporary(microbatched(wide), x.reshape(8, 128, 4)) < 0.25 * temporary(wide, x)


def with_hidden(params: Any, x: jax.Array, numbers: jax.Array, scale: jax.Array, *, factor: jax.Array) -> Any:
    hidden = jnp.tanh(x @ params) * scale * factor
    return jnp.mean(hidden**2), {"hidden": hidden, "numbers": numbers}


def at_once(params: Any, x: jax.Array, numbers: jax.Array, scale: jax.Array, *, factor: jax.Array) -> Any:
    losses, aux = jax.vmap(lambda x, n: with_hidden(params, x, n, scale, factor=factor))(x, numbers)
    return losses.mean(), aux


@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("through", ["loss", "aux", "both"])
@pytest.mark.usefixtures("x64")
def test_derivatives_by_every_argument_and_through_aux(through: str, transform: Any) -> None:
    """By parameters, divided and common arguments, keywords and what the function closes over; also inside ``jax.checkpoint``."""
    params, x, closed = map(jnp.asarray, arrays((3, 2), (4, 2, 3), (2,)))
    numbers, scale, factor = jnp.arange(8).reshape(4, 2), jnp.asarray(1.5), jnp.asarray(2.0)

    def found(fun: Any, params: Any, x: Any, scale: Any, factor: Any, closed: Any) -> Any:
        closing = fun(lambda params, *args, **kwargs: with_hidden(params * closed, *args, **kwargs), closed)
        loss, aux = closing(params, x, numbers, scale, factor=factor)
        return (loss if through != "aux" else 0.0) + (jnp.sum(jnp.sin(aux["hidden"])) if through != "loss" else 0.0)

    arguments = (params, x, scale, factor, closed)
    ours = transform(lambda *args: found(lambda f, _: microbatched(f, in_axes=(0, 0, None), has_aux=True), *args))
    theirs = lambda *args: found(lambda _, c: lambda p, *a, **k: at_once(p * c, *a, **k), *args)  # noqa: E731
    actual, expected = (jax.grad(fun, argnums=range(5))(*arguments) for fun in (ours, theirs))
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)
        assert float(jnp.abs(b).max()) > 0.01


def test_a_step_of_the_loss_and_a_loss_scale() -> None:
    def annealed(params: Any, x: jax.Array, *, step: Any) -> jax.Array:
        return jnp.mean(params * x) / step

    oracle = value_and_grad(microbatched(annealed), gradreg.sam(rho=0.1))
    assert float(oracle(jnp.array(2.0), jnp.ones((2, 2)), step=4)[0]) == 0.5
    with pytest.raises(ValueError, match=r"loss_scale must be left out for a microbatched fun.*bfloat16"):
        oracle(jnp.array(2.0), jnp.ones((2, 2)), step=4, loss_scale=8.0)


@jax.jit
def convolution(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.tanh(jax.lax.conv_general_dilated(x, params, (1, 1), "SAME")) ** 2)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default is another one there")
@pytest.mark.parametrize(("unroll", "loops"), [(None, False), (True, False), (False, True)])
def test_convolutions_on_a_cpu_stand_in_no_loop(unroll: bool | None, loops: bool) -> None:
    params, x = jnp.ones((2, 2, 3, 3)), jnp.ones((3, 4, 2, 5, 5))
    oracle = value_and_grad(microbatched(convolution, unroll=unroll), gradreg.sam(rho=0.1))
    assert ("while(" in jax.jit(oracle).lower(params, x).compile().as_text()) is loops
    value, gradient = jax.jit(oracle)(params, x)
    expected_value, expected = value_and_grad(convolution, gradreg.sam(rho=0.1))(params, x.reshape(12, 2, 5, 5))
    assert_close((value, gradient), (expected_value, expected), tolerance=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default is another one there")
@pytest.mark.parametrize(
    "penalty",
    [
        gradreg.sam(rho=0.1).warmup("zero", steps=3),
        gradreg.sam(rho=0.1).every(2),
        gradreg.looksam(rho=0.1, k=2),
        gradreg.exact(gamma=0.1).warmup("zero", steps=3),
    ],
    ids=str,
)
@pytest.mark.parametrize(("branch", "inside"), [("auto", False), ("select", False), ("cond", True)])
def test_convolutions_on_a_cpu_stand_in_no_branch(penalty: GradientPenalty, branch: Any, inside: bool) -> None:
    params, x = 0.3 * jnp.ones((2, 2, 3, 3)), 0.1 * jnp.ones((4, 2, 5, 5))  # far from saturation, where rounding would be magnified
    oracle = value_and_grad(convolution, penalty, branch=branch)
    state = first_state(oracle, params)
    run = jax.jit(lambda step: oracle(params, x, step=step, **state)[1])
    program = jax.make_jaxpr(lambda step: oracle(params, x, step=step, **state)[1])(jnp.int32(0))
    branches = [inner for equation in program.jaxpr.eqns if equation.primitive.name == "cond" for inner in equation.params["branches"]]
    assert any("conv_general_dilated" in str(inner) for inner in branches) is inside
    for step in (1, 4):
        assert_close(run(jnp.int32(step)), oracle(params, x, step=step, **state)[1], tolerance=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default is another one there")
@pytest.mark.parametrize(("parts", "turns"), [(32, 32), (33, 1)])
def test_many_parts_are_a_loop_after_all(parts: int, turns: int) -> None:
    program = str(jax.make_jaxpr(microbatched(convolution))(jnp.ones((2, 2, 3, 3)), jnp.ones((parts, 4, 2, 5, 5))))
    assert f"unroll={turns}\n" in program


def test_gradients_are_accumulated_in_float32() -> None:
    """A sum of ones in bfloat16 does not get beyond 256."""
    loss = microbatched(lambda params, x: params.astype(jnp.float32) * x)
    assert float(jax.grad(loss)(jnp.bfloat16(1), jnp.ones(1024))) == 1.0


def test_other_losses_keep_their_branch() -> None:
    """Without a convolution the second pass of a step that rests is not computed."""
    params, x, y = problem()
    loss = Counted(squared_error)
    oracle = value_and_grad(loss, gradreg.sam(rho=0.1).warmup("zero", steps=3))
    jax.block_until_ready(jax.jit(oracle)(params, x, y, step=jnp.int32(0)))
    assert loss.evaluations() == 1


@pytest.mark.parametrize(
    ("in_axes", "arguments", "message"),
    [
        (1, (jnp.ones((2, 2)),), r"in_axes must be 0, None or a tuple of them; got 1"),
        (True, (jnp.ones((2, 2)),), r"in_axes must be 0, None or a tuple of them; got True"),
        ((0,), (jnp.ones(2), jnp.ones(2)), r"in_axes must have one entry for each argument after params; got 1 for 2"),
        (0, (jnp.ones(2), jnp.ones(3)), r"micro-batches must lie along the first axis .* got the shapes \[\(2,\), \(3,\)\]"),
        (0, (jnp.ones(2), jnp.ones(())), r"micro-batches must lie along the first axis"),
        (0, (jnp.ones((0, 3)),), r"micro-batches must lie along the first axis"),
        (None, (jnp.ones(2),), r"micro-batches must lie along the first axis .* got the shapes \[\]"),
        (0, (), r"micro-batches must lie along the first axis"),
    ],
)
def test_bad_arguments(in_axes: Any, arguments: Any, message: str) -> None:
    loss = microbatched(lambda params, *args: params, in_axes=in_axes)
    with pytest.raises(ValueError, match=message):
        loss(jnp.ones(()), *arguments)


def test_fun_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"fun must be callable; got 3"):
        microbatched(3)  # type: ignore[arg-type]


EACH = {
    "sam": gradreg.sam(rho=0.3),
    "gnp": gradreg.gnp(r=0.3, alpha=0.8),
    "fgr": gradreg.fgr(gamma=0.2, epsilon=0.5),
    "cgr": gradreg.cgr(gamma=0.3, epsilon=0.4),
    "asam": gradreg.asam(rho=0.6, eta=0.1),
    "exact": gradreg.exact(gamma=0.3),
    "late": gradreg.sam(rho=0.3).warmup("zero", steps=60),
}


@pytest.mark.parametrize("penalty", EACH.values(), ids=EACH)
@pytest.mark.usefixtures("x64")
def test_each_part_by_itself(penalty: GradientPenalty) -> None:
    """The mean of the regularized gradients of the parts; so does ``vmap`` with the parts as shards, down to single samples."""
    params, x, y = problem()
    one = value_and_grad(squared_error, penalty, with_metrics=True)
    each = jax.jit(value_and_grad(microbatched(squared_error), penalty, perturb="each", with_metrics=True))
    shards = value_and_grad(squared_error, penalty, axis_name="m")
    for parts in (4, 8):
        xs, ys = divided(parts, x, y)
        found = [one(params, a, b, step=50) for a, b in zip(xs, ys, strict=True)]
        expected = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), 0), *found)
        actual = each(params, xs, ys, step=jnp.int32(50))
        assert_close(actual[1], expected[1])
        np.testing.assert_allclose(actual[0][0], expected[0][0], rtol=1e-12)
        np.testing.assert_allclose(actual[0][1].gradient_norm, expected[0][1].gradient_norm, rtol=1e-12)
        _, at_once = jax.vmap(lambda a, b: shards(params, a, b, step=50), axis_name="m")(xs, ys)
        assert_close(jax.tree.map(lambda leaf: leaf[0], at_once), expected[1])
    whole = value_and_grad(squared_error, penalty)(params, x, y, step=50)[1]
    assert (max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (whole, expected[1])), strict=True)) > 1e-3) == (
        penalty.at(50).acts
    )


def test_aux_of_each_part_is_stacked() -> None:
    def loss(params: Any, x: jax.Array) -> Any:
        return jnp.mean((params * x) ** 2), x.sum()

    function = value_and_grad(microbatched(loss, has_aux=True), gradreg.sam(rho=0.1), has_aux=True, perturb="each")
    (value, aux), gradients = function(jnp.ones(2), jnp.arange(8.0).reshape(4, 1, 2))
    assert aux.tolist() == [1.0, 5.0, 9.0, 13.0]
    assert value == jnp.mean(jnp.arange(8.0) ** 2)
    assert gradients.shape == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fun": squared_error}, "^perturb must be 'all' unless fun is microbatched"),
        ({"ascent": squared_error}, "^perturb must be 'all' with ascent"),
        ({"penalty": gradreg.auto()}, "^perturb must be 'all' with ascent, held_out, axis_name or a penalty that carries a state"),
        ({"penalty": gradreg.gnp(r=0.1, alpha=0.8, mixing="unit")}, "^perturb must be 'all' for a penalty with memory, or that mixes"),
        ({"perturb": "eachh"}, "^unknown perturb 'eachh'"),
    ],
)
def test_what_each_refuses(options: dict[str, Any], message: str) -> None:
    given = {"fun": microbatched(squared_error), "penalty": gradreg.sam(), "perturb": "each", **options}
    with pytest.raises(ValueError, match=message):
        value_and_grad(**given)
