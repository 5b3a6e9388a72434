"""The regularized gradient against formulas and closed forms, the identities between methods, and what each step evaluates."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import grad, value_and_grad
from tests.penalties import OF_EACH_TRAIT, PENALTIES, each_trait

from .cases import Counted, arrays, assert_close, assert_same_bits, first_state, problem, squared_error
from .twin import Twin

pytestmark = pytest.mark.usefixtures("x64")

ways_of_step = pytest.mark.parametrize("traced", [False, True], ids=["int", "traced"])


def at_each_step(penalty: GradientPenalty | None, *, traced: bool, loss: Any = squared_error) -> Any:
    """A function of the step alone that gives loss and gradient, nothing remembered: jitted once for all steps, or run as it is."""
    params, x, y = problem()
    oracle = value_and_grad(loss, penalty)
    state = first_state(oracle, params)
    run = jax.jit(lambda params, step: oracle(params, x, y, step=step, **state)[:2])
    return lambda step: run(params, jnp.int32(step)) if traced else oracle(params, x, y, step=step, **state)[:2]


def regularized(penalty: GradientPenalty | None, step: int = 0, *, traced: bool = False) -> Any:
    return at_each_step(penalty, traced=traced)(step)[1]


def loss_and_params() -> tuple[Any, Any]:
    params, x, y = problem()
    return (lambda at: squared_error(at, x, y)), params


EAGER = [pytest.param(penalty, False, id=f"{name}-int") for name, penalty in OF_EACH_TRAIT.items()]
TRACED = [pytest.param(penalty, True, id=f"{name}-traced") for name, penalty in PENALTIES.items()]


@pytest.mark.parametrize(("penalty", "traced"), EAGER + TRACED)
def test_every_penalty_is_its_entry_of_the_tables(penalty: GradientPenalty, traced: bool) -> None:
    """Over consecutive steps, memories and all, on a batch that turns; and it is not the plain gradient."""
    params, x, y = problem()
    oracle, twin = value_and_grad(squared_error, penalty), Twin(penalty)
    run = jax.jit(oracle) if traced else oracle
    state, largest = first_state(oracle, params), 0.0
    for step in range(6) if traced else range(2, 6):
        x = jnp.roll(x, 1, axis=1)
        value, gradients, *following = run(params, x, y, step=jnp.int32(step) if traced else step, **state)
        expected = twin.step([lambda at, x=x: squared_error(at, x, y)], params, step)
        assert_close(gradients, expected)
        if not penalty.decoupled:
            twin.correction = jax.tree.map(jnp.subtract, expected, twin.plain)
        else:
            assert_close(following[0]["correction"], twin.correction)
        if penalty.starts_unperturbed_at(step):
            np.testing.assert_allclose(value, squared_error(params, x, y), rtol=1e-15)  # the first pass's, at θ
        state = {"state": following[0]} if following else {}
        largest = max(largest, relative_size(twin.correction, twin.plain))
    assert largest > 0.02


def relative_size(tree: Any, other: Any) -> float:
    """The largest element of ``tree`` over that of ``other``."""
    return float(np.divide(*(max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(t)) for t in (tree, other))))


def is_of_the_first_table(penalty: GradientPenalty) -> bool:
    """Whether the gradient is g + strength·H·d with d = g or ĝ on a quadratic, or that with unit mixing."""
    default = (gradreg.Gradient(), None, 1, False)
    alone = (penalty.direction, penalty.mask, penalty.ascent_steps, penalty.keeps_plain_apart) == default
    return alone and penalty.mixing in (gradreg.Plain(), gradreg.Unit())


def quadratic() -> tuple[Any, Any, Any]:
    """½θᵀAθ with θ in two leaves, so that one norm must be taken over both."""
    root, theta = map(jnp.asarray, arrays((5, 5), (5,), seed=3))
    A = root @ root.T / 5 + 0.1 * jnp.eye(5)

    def loss(params: Any) -> jax.Array:
        whole = jnp.concatenate([params["first"], params["second"]])
        return 0.5 * whole @ A @ whole

    return A, loss, {"first": theta[:2], "second": theta[2:]}


@ways_of_step
@pytest.mark.parametrize("penalty", [pytest.param(p, id=name) for name, p in PENALTIES.items() if is_of_the_first_table(p)])
def test_on_a_quadratic_every_difference_is_exact(penalty: GradientPenalty, traced: bool) -> None:
    A, loss, params = quadratic()
    step = 7
    theta = jnp.concatenate(list(params.values()))
    g = A @ theta
    d = g / jnp.linalg.norm(g) if penalty.power == 1 else g
    expected = g + penalty.strength_at(step) * A @ d
    if penalty.mixing == gradreg.Unit():
        c = penalty.coefficient_at(step)
        assert c is not None
        expected += (1 - c) * (g / jnp.linalg.norm(g) - g)
    actual = grad(loss, penalty)(params, step=jnp.int32(step) if traced else step)
    assert_close(jnp.concatenate(list(actual.values())), expected)


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("build", [gradreg.fgr, gradreg.bgr, gradreg.cgr])
def test_on_a_quadratic_the_radius_does_not_matter(build: Any, epsilon: float) -> None:
    A, loss, params = quadratic()
    g = A @ jnp.concatenate(list(params.values()))
    actual = grad(loss, build(gamma=0.9, epsilon=epsilon))(params)
    assert_close(jnp.concatenate(list(actual.values())), g + 0.9 * A @ g)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("difference", "order"), [("forward", 1), ("backward", 1), ("central", 2)])
def test_the_error_falls_with_the_radius_at_its_order(power: int, difference: Any, order: int) -> None:
    exact = regularized(gradreg.exact(gamma=0.3, power=power))

    def error(radius: float) -> float:
        estimate = regularized(GradientPenalty(power=power, strength=0.3, radius=radius, difference=difference))
        return float(jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (estimate, exact)), strict=True))))

    assert error(2e-3) / error(1e-3) == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("power", [1, 2])
def test_exact_is_the_derivative_of_the_penalised_loss(power: int) -> None:
    loss, params = loss_and_params()

    def penalised(at: Any) -> jax.Array:
        squared = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(loss)(at)))
        return loss(at) + (0.3 * jnp.sqrt(squared) if power == 1 else 0.15 * squared)

    assert_close(regularized(gradreg.exact(gamma=0.3, power=power)), jax.grad(penalised)(params))


@ways_of_step
@pytest.mark.parametrize(
    "penalty",
    [
        None,
        gradreg.gnp(r=0.3, alpha=0.0),
        gradreg.fgr(gamma=0.0, epsilon=0.4),
        gradreg.exact(gamma=0.0),
        gradreg.sam(rho=0.3).warmup("zero", steps=5),
        gradreg.exact(gamma=0.3).warmup("zero", steps=5),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [0, 4])
def test_strength_zero_is_the_plain_gradient_bit_for_bit(penalty: GradientPenalty | None, step: int, traced: bool) -> None:
    params, x, y = problem()
    plain = jax.grad(squared_error)
    expected = jax.jit(plain)(params, x, y) if traced else plain(params, x, y)
    assert_same_bits(regularized(penalty, step, traced=traced), expected)


def test_alpha_one_is_sam() -> None:
    assert_same_bits(regularized(gradreg.gnp(r=0.3, alpha=1.0)), regularized(gradreg.sam(rho=0.3)))
    assert_same_bits(regularized(gradreg.gnp(r=0.3, alpha=1.0, mixing="unit")), regularized(gradreg.sam(rho=0.3)))


def test_sam_and_gnp_are_fgr_with_steps_over_the_norm() -> None:
    loss, params = loss_and_params()
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(loss)(params)))))
    assert_close(regularized(gradreg.sam(rho=0.3)), regularized(gradreg.fgr(gamma=0.3 / norm, epsilon=0.3 / norm)))
    assert_close(regularized(gradreg.gnp(r=0.3, alpha=0.8)), regularized(gradreg.fgr(gamma=0.24 / norm, epsilon=0.3 / norm)))


def test_unnormalised_sam_is_fgr_with_gamma_epsilon() -> None:
    loss, params = loss_and_params()
    expected = jax.grad(loss)(jax.tree.map(lambda p, g: p + 0.4 * g, params, jax.grad(loss)(params)))
    assert_close(regularized(gradreg.fgr(gamma=0.4, epsilon=0.4)), expected)


def test_flooding_alternates_fgr_and_bgr() -> None:
    """Two jitted steps of size η on the flooded loss, one on each side of the level, move θ by −η²·ΔR: what F-GR or B-GR adds for γ = 1."""
    loss, params = loss_and_params()
    eta, plain = 0.05, jax.grad(loss)(params)
    rise = eta * sum(jnp.sum(g**2) for g in jax.tree.leaves(plain)) / 2  # half of what a step changes the loss by
    for side, build in ((+1, gradreg.fgr), (-1, gradreg.bgr)):
        flooding = gradreg.Flooding(level=float(loss(params) + side * rise))
        flooded = jax.jit(jax.value_and_grad(lambda at, flooding=flooding: flooding(loss(at))))
        at = params
        for _ in range(2):
            value, gradients = flooded(at)
            assert value > flooding.level
            at = jax.tree.map(lambda p, g: p - eta * g, at, gradients)
        strong = regularized(build(gamma=1.0, epsilon=eta))
        expected = jax.tree.map(lambda s, p: -(eta**2) * (s - p), strong, plain)
        assert_close(jax.tree.map(jnp.subtract, at, params), expected, tolerance=1e-9)


def test_individual_flooding_is_a_mean_over_samples() -> None:
    """Samples above their level are descended on, those below are ascended on."""
    flooding = gradreg.IndividualFlooding(level=1.0)
    gradients = jax.jit(jax.grad(lambda theta: flooding(theta**2)))(jnp.array([0.5, 2.0]))
    assert gradients.tolist() == [-0.5, 2.0]


def test_one_ascent_step_estimates_the_hessian_product_to_first_order() -> None:
    """[∇L(θ + ε·g) − g]/ε = H·g + O(ε)."""
    loss, params = loss_and_params()
    g = jax.grad(loss)(params)
    _, product = jax.jvp(jax.grad(loss), (params,), (g,))
    epsilon = 1e-6
    estimate = jax.tree.map(lambda G, p: (G - p) / epsilon, regularized(gradreg.fgr(gamma=epsilon, epsilon=epsilon)), g)
    assert_close(estimate, product, tolerance=1e-4)


@ways_of_step
@each_trait
def test_a_zero_gradient_stays_zero(penalty: GradientPenalty, traced: bool) -> None:
    """Over steps that use and reuse; a random direction leaves the point of zero gradient, and what it finds there is finite."""
    oracle = grad(lambda at: jnp.sum(at["w"] ** 2) + 0.0 * at["b"], penalty)
    zeros = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    state = first_state(oracle.both, zeros)
    for step in (50, 51):
        found = oracle(zeros, step=jnp.int32(step) if traced else step, **state)
        gradients, state = (found[0], {"state": found[1]}) if state else (found, {})
        if isinstance(penalty.direction, gradreg.Random):
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        else:
            assert_same_bits(jax.tree.map(jnp.abs, gradients), zeros)


@ways_of_step
@each_trait
def test_evaluations_when_the_program_runs(penalty: GradientPenalty, traced: bool) -> None:
    """The second pass is not paid where the strength is 0, though ``step`` is traced; F-GR costs two evaluations, not three."""
    loss = Counted(squared_error)
    run = at_each_step(penalty, traced=traced, loss=loss)
    for step in (0, 2, 3, 50):
        jax.block_until_ready(run(step))
        assert loss.evaluations() == (1 if penalty.difference == "exact" else penalty.evaluations_at(step))


@pytest.mark.parametrize(
    ("penalty", "products"),
    [
        (None, lambda layers: 3 * layers - 1),
        (gradreg.sam(rho=0.1), lambda layers: 6 * layers - 2),
        (gradreg.fgr(gamma=0.1, epsilon=0.3), lambda layers: 6 * layers - 2),
        (gradreg.bgr(gamma=0.1, epsilon=0.3), lambda layers: 6 * layers - 2),
        (gradreg.cgr(gamma=0.1, epsilon=0.3), lambda layers: 9 * layers - 3),
        (gradreg.exact(gamma=0.1), lambda layers: 9 * layers - 5),
        (gradreg.remembered(epsilon=0.1), lambda layers: 3 * layers - 1),
        (gradreg.random_sam(rho=0.1), lambda layers: 3 * layers - 1),
        (gradreg.friendly_sam(rho=0.1), lambda layers: 6 * layers - 2),
        (gradreg.gsam(rho=0.1, a=0.2), lambda layers: 6 * layers - 2),
        (gradreg.sam(rho=0.1, steps=3), lambda layers: 12 * layers - 4),
    ],
    ids=["plain", "sam", "fgr", "bgr", "cgr", "exact", "remembered", "random", "friendly", "gsam", "sam-3-steps"],
)
@pytest.mark.parametrize("layers", [2, 4])
def test_matrix_products_of_the_compiled_program(penalty: GradientPenalty | None, products: Any, layers: int) -> None:
    """A gradient of a network of L layers without biases takes 3L − 1 products; all else is counted in those."""

    def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    weights, x = [jnp.ones((128, 128))] * layers, jnp.ones((128, 128))
    oracle = value_and_grad(loss, penalty)
    compiled = jax.jit(partial(oracle, step=0)).lower(weights, x, **first_state(oracle, weights)).compile()
    product = 2 * 128**3  # all elementwise work together is less than one
    assert compiled.cost_analysis()["flops"] // product == products(layers)


@pytest.mark.parametrize("kind", ["zero", "radius", "strength"])
def test_one_compilation_for_a_whole_warmup(kind: Any) -> None:
    params, x, y = problem()
    loss = Counted(squared_error)
    oracle = value_and_grad(loss, gradreg.fgr(gamma=0.3, epsilon=0.4).warmup(kind, steps=50))
    jitted = jax.jit(lambda params, step: oracle(params, x, y, step=step))
    jitted(params, 0)
    traces = loss.traces
    loss.evaluations()
    for step in range(1, 100):
        jitted(params, step)
    assert loss.traces == traces
    assert jitted._cache_size() == 1
    assert loss.evaluations() == (49 + 2 * 50 if kind == "zero" else 2 * 99)


@dataclass(frozen=True, eq=False)
class Counting(gradreg.Schedule):
    """A ramp that notes each evaluation."""

    calls: list[Any] = field(default_factory=list)

    def evaluate(self, step: Any, ops: Any) -> Any:
        self.calls.append(step)
        return 0.1 * ops.minimum(1.0, step / 5)

    def bounds(self) -> tuple[float, float]:
        return 0.0, 0.1


@ways_of_step
@pytest.mark.parametrize("build", [gradreg.fgr, gradreg.bgr, gradreg.cgr])
def test_schedules_are_evaluated_once_a_step(build: Any, traced: bool) -> None:
    """Once for each step whose number is known, and once for all in a program that is told the step later."""
    gamma, epsilon = Counting(), Counting()
    run = at_each_step(build(gamma=gamma, epsilon=epsilon), traced=traced)
    for step in (1, 2, 3):
        run(step)
    assert len(gamma.calls) == len(epsilon.calls) == (1 if traced else 3)


def test_schedules_that_are_never_zero_need_no_cond() -> None:
    params, x, y = problem()
    never = gradreg.fgr(gamma=gradreg.Cosine(start=0.5, end=0.1, steps=9), epsilon=0.4)
    some = gradreg.fgr(gamma=gradreg.Cosine(start=0.5, end=0.0, steps=9), epsilon=0.4)

    def program(penalty: GradientPenalty) -> str:
        return str(jax.make_jaxpr(lambda step: grad(squared_error, penalty)(params, x, y, step=step))(jnp.int32(0)))

    assert "cond" not in program(never)
    assert "cond" in program(some)


@pytest.mark.parametrize("name", ["sam", "gnp", "fgr", "bgr-one", "cgr", "fgr-strength-warm-up", "sam-zero-warm-up"])
@ways_of_step
@pytest.mark.parametrize("step", [0, 4])
def test_direction_from_another_function(name: str, step: int, traced: bool) -> None:
    penalty = {**PENALTIES, "bgr-one": gradreg.bgr(gamma=0.4, epsilon=0.4)}[name]
    params, x, y = problem()
    part = Counted(lambda params, x, y: squared_error(params, x[:2], y[:2]))
    loss = Counted(squared_error)
    oracle = value_and_grad(loss, penalty, ascent=part)
    value, actual = jax.jit(oracle)(params, x, y, step=step) if traced else oracle(params, x, y, step=step)
    whole, half = (lambda at: squared_error(at, x, y)), (lambda at: squared_error(at, x[:2], y[:2]))
    expected = Twin(penalty).step([whole], params, step, [half])
    assert_close(actual, expected)
    c = penalty.coefficient_at(step)
    at_theta = part if c == 1 and penalty.difference == "forward" else loss
    np.testing.assert_allclose(value, at_theta._function(params, x, y), rtol=1e-15)
    assert part.evaluations() == (1 if c else 0)
    assert loss.evaluations() == (penalty.evaluations_at(step, ascent_share=1.0) - 1 if c else 1)


@pytest.mark.parametrize(
    ("name", "order"),
    [("sam", ["ascent", "loss"]), ("gnp", ["loss", "ascent", "loss"]), ("fgr-2-steps", ["loss", "ascent", "ascent", "loss"])],
)
def test_passes_with_an_ascent_function_are_in_the_order_of_the_plan(name: str, order: list[str]) -> None:
    params, x, y = problem()
    called = []

    def noted(source: str) -> Any:
        def fun(params: Any, x: Any, y: Any) -> Any:
            called.append(source)
            return squared_error(params, x, y)

        return fun

    penalty = PENALTIES[name]
    value_and_grad(noted("loss"), penalty, ascent=noted("ascent"))(params, x, y)
    assert called == order == [this.of for this in penalty.plan(penalty.at(0), separate_ascent=True).passes]


def test_aux_of_another_shape_needs_a_strength_that_is_never_zero() -> None:
    params, x, y = problem()

    def with_errors(params: Any, x: Any, y: Any) -> Any:
        return squared_error(params, x, y), x[:, 0]

    def part(params: Any, x: Any, y: Any) -> Any:
        return with_errors(params, x[:2], y[:2])

    options = {"has_aux": True, "ascent": part}
    (_, aux), _ = value_and_grad(with_errors, gradreg.sam(rho=0.3), **options)(params, x, y, step=jnp.int32(4))
    assert aux.shape == (2,)
    with pytest.raises(TypeError, match=r"ascent must return a loss and aux of the same structure.*got .*\(2,\).*\(8,\)"):
        value_and_grad(with_errors, gradreg.sam(rho=0.3).warmup("zero", steps=3), **options)(params, x, y, step=jnp.int32(4))


def test_the_layout_of_weights_must_be_given() -> None:
    params, x, y = problem()
    with pytest.raises(ValueError, match=r"layout must be given in JAX.*got None. Write mup2_sam\(rho=..., layout='in-out'\) for Flax"):
        value_and_grad(squared_error, gradreg.mup2_sam(rho=0.1))(params, x, y)


def test_the_fans_of_a_kernel_are_its_last_two_axes_in_flax() -> None:
    """T² = fan_out/fan_in: 6/2 for a kernel (3, 2, 6), 6 for its bias, 1 for a scalar. On Σ(θ + ½θ²) at 0, G − g is the perturbation."""
    params = {"kernel": jnp.zeros((3, 2, 6)), "bias": jnp.zeros(6), "scalar": jnp.zeros(())}
    oracle = grad(lambda p: sum(jnp.sum(leaf + 0.5 * leaf**2) for leaf in p.values()), gradreg.mup2_sam(rho=0.5, layout="in-out"))
    size = np.sqrt(3 * 36 + 6 * 6 + 1)
    for name, found in oracle(params).items():
        np.testing.assert_allclose(found, 1 + 0.5 * {"kernel": 3, "bias": 6, "scalar": 1}[name] / size, rtol=1e-12)


def test_a_loss_equated_step_of_a_tiny_gradient_is_as_long_as_its_cap() -> None:
    """1 / ‖g‖² overflows float32 where ‖g‖ does not underflow it; SAM with ρ = 2 on L = ½·10⁻¹⁵·θ² shows how far it went."""
    tiny = jnp.float32(1e-15)
    found = grad(lambda p: 0.5 * tiny * p**2, gradreg.le_sam(sigma=0.5, rho_max=2.0))(jnp.float32(1.0))
    np.testing.assert_allclose(found, 3e-15, rtol=1e-5)
