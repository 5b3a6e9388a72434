"""The flow, the implicit bias and real training against oracles that share no code with them."""

import numpy as np
import pytest
from scipy.optimize import minimize

import gradreg
from gradreg.theory.diagonal_flow import DiagonalFlow
from gradreg.theory.diagonal_network import implicit_bias, penalty_of, simulate, train
from gradreg.theory.sparse_regression import sparse_regression

SMALL = sparse_regression(features=8, samples=4, nonzeros=2, shift=1.0, seed=3)


def loss_gradient(X, y, theta):
    """∇L at θ = (u, v), written from the loss alone."""
    u, v = np.split(theta, 2)
    r = (X @ (u**2 - v**2) - y) / (2 * len(y))
    return np.concatenate([2 * u * (X.T @ r), -2 * v * (X.T @ r)])


def regularized(X, y, theta, gamma, epsilon):
    """F-GR, B-GR or DB as METHODS' table writes them, the Hessian product by a central difference."""
    g = loss_gradient(X, y, theta)
    if epsilon == 0:
        h = 1e-5
        return g + gamma * (loss_gradient(X, y, theta + h * g) - loss_gradient(X, y, theta - h * g)) / (2 * h)
    radius = abs(epsilon)
    if epsilon > 0:
        return (1 - gamma / radius) * g + gamma / radius * loss_gradient(X, y, theta + radius * g)
    return (1 + gamma / radius) * g - gamma / radius * loss_gradient(X, y, theta - radius * g)


@pytest.mark.parametrize("epsilon", [0.3, -0.3, 0.0])
def test_the_flow_is_where_a_naive_runge_kutta_on_u_and_v_goes(epsilon):
    gamma, end, steps = 0.2, 1.0, 800
    theta, h = np.full(16, 0.3), 1.0 / 800
    for _ in range(steps):
        k1 = regularized(SMALL.X, SMALL.y, theta, gamma, epsilon)
        k2 = regularized(SMALL.X, SMALL.y, theta - h / 2 * k1, gamma, epsilon)
        k3 = regularized(SMALL.X, SMALL.y, theta - h / 2 * k2, gamma, epsilon)
        k4 = regularized(SMALL.X, SMALL.y, theta - h * k3, gamma, epsilon)
        theta = theta - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    flow = simulate(SMALL.X, SMALL.y, initial_scale=0.3, gamma=gamma, epsilon=epsilon, end_time=end)
    np.testing.assert_allclose(np.concatenate([flow.u, flow.v]), theta, atol=2e-8)
    assert flow.time[-1] == end
    np.testing.assert_allclose(flow.alpha, np.sqrt(theta[:8] * theta[8:]), atol=2e-8)


@pytest.mark.parametrize("epsilon", [0.3, -0.3, 0.0])
def test_the_jacobian_is_the_rates_derivative(epsilon):
    flow = DiagonalFlow(SMALL.X, SMALL.y, np.log(np.full(8, 0.4)), 0.3, epsilon)
    state, h = 0.1 * np.random.default_rng(0).standard_normal(12), 1e-6
    numeric = np.array([(flow.rate(0, state + h * e) - flow.rate(0, state - h * e)) / (2 * h) for e in np.eye(12)]).T
    np.testing.assert_allclose(flow.jacobian(0, state), numeric, atol=1e-7 * np.abs(numeric).max())


def test_the_sparse_jacobian_leaves_out_only_its_last_block_and_changes_no_answer(monkeypatch):
    data = sparse_regression(features=300, samples=6, shift=1.0, seed=0)
    sparse = simulate(data.X, data.y, initial_scale=0.1, gamma=0.02, epsilon=0.01)
    flow = DiagonalFlow(data.X, data.y, np.log(np.full(300, 0.1)), 0.02, 0.01)
    assert flow.sparse
    state = 1e-2 * np.random.default_rng(0).standard_normal(306)
    kept = flow.jacobian(0, state).toarray()
    flow.sparse = False
    full = flow.jacobian(0, state)
    np.testing.assert_allclose(kept[:6], full[:6])
    np.testing.assert_allclose(kept[:, :6], full[:, :6])
    assert not kept[6:, 6:].any()
    jacobian = DiagonalFlow.jacobian

    def dense_jacobian(self, time, state):
        self.sparse = False
        return jacobian(self, time, state)

    monkeypatch.setattr(DiagonalFlow, "jacobian", dense_jacobian)
    dense = simulate(data.X, data.y, initial_scale=0.1, gamma=0.02, epsilon=0.01)
    np.testing.assert_allclose(dense.beta, sparse.beta, atol=1e-7)
    np.testing.assert_allclose(dense.alpha, sparse.alpha, rtol=1e-6)


def potential(beta, alpha):
    z = beta / alpha**2
    return np.sum(alpha**2 * (2 - np.sqrt(4 + z**2) + z * np.arcsinh(z / 2)))


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_implicit_bias_minimises_the_potential_among_interpolators(scale):
    alpha = scale * np.exp(0.3 * np.random.default_rng(1).standard_normal(8))
    found = implicit_bias(SMALL.X, SMALL.y, alpha)
    np.testing.assert_allclose(SMALL.X @ found, SMALL.y, atol=1e-12)
    direct = minimize(
        potential,
        np.linalg.pinv(SMALL.X) @ SMALL.y,
        args=(alpha,),
        jac=lambda b, a: np.arcsinh(b / a**2 / 2),
        constraints={"type": "eq", "fun": lambda b: SMALL.X @ b - SMALL.y, "jac": lambda b: SMALL.X},
        method="SLSQP",
        options={"maxiter": 2000, "ftol": 1e-15},
    )
    np.testing.assert_allclose(found, direct.x, atol=2e-5)
    assert potential(found, alpha) <= direct.fun + 1e-12


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-100, 1e-30, 1e-6, 1e-2, 1.0, 1e3])
def test_implicit_bias_meets_its_optimality_conditions_at_any_scale(scale):
    """Xβ = y, and arcsinh(β/2α²) in the row space of X: what makes a minimiser of a convex function one."""
    data = sparse_regression(seed=2, shift=2.0)
    beta = implicit_bias(data.X, data.y, scale)
    np.testing.assert_allclose(data.X @ beta, data.y, atol=1e-9)
    if scale > 1e-100:  # below, β/α² overflows
        z = np.arcsinh(beta / scale**2 / 2)
        outside = z - data.X.T @ np.linalg.lstsq(data.X.T, z, rcond=None)[0]
        assert np.linalg.norm(outside) <= 1e-5 * np.linalg.norm(z)


def test_a_tiny_alpha_is_basis_pursuit_and_a_large_one_the_least_norm():
    np.testing.assert_allclose(implicit_bias(SMALL.X, SMALL.y, 1e3), np.linalg.pinv(SMALL.X) @ SMALL.y, atol=1e-9)
    from scipy.optimize import linprog

    both = linprog(np.ones(16), A_eq=np.hstack([SMALL.X, -SMALL.X]), b_eq=SMALL.y)
    np.testing.assert_allclose(np.abs(implicit_bias(SMALL.X, SMALL.y, 1e-100)).sum(), both.fun, rtol=1e-2)


def test_dependent_rows_and_zero_targets_are_no_obstacle():
    X, y = np.vstack([SMALL.X, SMALL.X[:2]]), np.concatenate([SMALL.y, SMALL.y[:2]])
    np.testing.assert_allclose(implicit_bias(X, y, 0.3), implicit_bias(SMALL.X, SMALL.y, 0.3), atol=1e-10)
    assert not implicit_bias(SMALL.X, 0 * SMALL.y, 0.3).any()


# METHODS' table: shift, α₀, γ, ε -> recovery error, mean ln(α/α₀), as printed: means over seeds 0 to 4
TABLE = [
    (2.0, 0.05, 0.0, 0.0, 0.0236, 0.0),
    (2.0, 0.05, 0.06, -0.02, 0.0121, -0.350),
    (2.0, 0.05, 0.06, 0.0, 0.0111, -0.392),
    (2.0, 0.05, 0.06, 0.02, 0.0102, -0.433),
    (2.0, 0.05, 0.06, 0.05, 0.0091, -0.494),
    (0.0, 0.1, 0.0, 0.0, 0.145, 0.0),
    (0.0, 0.1, 1.0, -0.3, 0.205, -0.105),
    (0.0, 0.1, 1.0, 0.0, 0.212, -0.116),
    (0.0, 0.1, 1.0, 0.3, 0.219, -0.127),
    (0.0, 0.1, 1.0, 0.6, 0.226, -0.137),
]


@pytest.mark.parametrize(("shift", "scale", "gamma", "epsilon", "recovery", "shrinkage"), TABLE)
def test_the_reference_table_is_reproduced_to_its_digits_and_every_run_ends_at_the_minimiser(
    shift, scale, gamma, epsilon, recovery, shrinkage
):
    rows = []
    for seed in range(5):
        data = sparse_regression(shift=shift, seed=seed)
        flow = simulate(data.X, data.y, initial_scale=scale, gamma=gamma, epsilon=epsilon)
        assert flow.loss[-1] < 1e-14
        assert np.linalg.norm(flow.beta - implicit_bias(data.X, data.y, flow.alpha)) <= 1e-6
        rows.append((data.recovery_error(flow.beta), flow.log_shrinkage.mean()))
    mean = np.mean(rows, axis=0)
    assert abs(mean[0] - recovery) <= (0.00005 if shift else 0.0005)
    assert abs(mean[1] - shrinkage) <= 0.0005


def test_alpha_shrinks_in_the_order_backward_exact_forward_on_every_problem():
    for seed in range(3):
        data = sparse_regression(features=20, samples=8, shift=1.0, seed=seed)
        ends = [
            simulate(data.X, data.y, initial_scale=0.1, gamma=0.1, epsilon=e).log_shrinkage.mean() for e in (-0.1, -0.05, 0.0, 0.05, 0.1)
        ]
        assert ends == sorted(ends, reverse=True)
        assert ends[0] < 0


@pytest.mark.parametrize("epsilon", [0.1, -0.1, 0.0])
def test_real_steps_of_the_engine_approach_the_flow_linearly_in_the_learning_rate(epsilon):
    end = simulate(SMALL.X, SMALL.y, initial_scale=0.3, gamma=0.1, epsilon=epsilon, end_time=0.1)
    errors = []
    for rate, steps in ((4e-4, 250), (2e-4, 500), (1e-4, 1000)):
        trained = train(SMALL.X, SMALL.y, penalty_of(0.1, epsilon), initial_scale=0.3, learning_rate=rate, steps=steps, seed=0)
        errors.append(np.linalg.norm(trained.beta - end.beta))
        assert trained.loss.shape == (steps,)
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.01)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.01)
    assert errors[2] < 1e-4


def test_the_flow_tells_the_differences_apart_where_real_steps_do():
    """So that the linear approach above could not hold with the wrong difference."""
    ends = [simulate(SMALL.X, SMALL.y, initial_scale=0.3, gamma=0.1, epsilon=e, end_time=0.1).beta for e in (0.1, -0.1, 0.0)]
    assert min(np.linalg.norm(a - b) for a, b in ((ends[0], ends[1]), (ends[0], ends[2]), (ends[1], ends[2]))) > 3e-4


def test_minibatches_visit_every_sample_once_an_epoch_and_follow_the_seed():
    settings = {"initial_scale": 0.3, "learning_rate": 1e-2, "steps": 60, "batch_size": 2}
    one, again, other = (train(SMALL.X, SMALL.y, gradreg.sam(rho=0.05), seed=s, **settings) for s in (0, 0, 1))
    assert (one.beta == again.beta).all()
    assert (one.beta != other.beta).any()
    assert one.evaluations == 120
    still = train(SMALL.X, SMALL.y, None, initial_scale=0.3, learning_rate=1e-300, steps=2, seed=0, batch_size=2)
    assert still.loss.mean() == pytest.approx(np.mean(SMALL.y**2) / 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"X": np.ones((3, 4)), "y": np.ones(4)}, r"y must have one entry for each of X's 3 rows"),
        ({"X": np.ones(4), "y": np.ones(4)}, r"X must be a non-empty matrix"),
        ({"X": np.eye(3)[:, :2], "y": np.ones(3)}, r"3 samples but only 2 features.*residual"),
        ({"X": np.ones((2, 3)), "y": np.array([1.0, 2.0])}, r"some of them dependent"),
        ({"X": np.full((2, 3), np.nan), "y": np.ones(2)}, r"must be finite"),
    ],
)
def test_bad_data_is_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(**arguments, initial_scale=0.1, gamma=0.0, epsilon=0.0)
    with pytest.raises(ValueError, match=message):
        implicit_bias(**arguments, alpha=0.1)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"gamma": -1.0}, ValueError, r"gamma must be finite and >= 0"),
        ({"epsilon": np.inf}, ValueError, r"epsilon must be a number and finite"),
        ({"initial_scale": 0.0}, ValueError, r"initial_scale must be finite and > 0"),
        ({"initial_scale": np.ones(3)}, ValueError, r"one entry for each of the 60 features"),
        ({"initial_scale": np.zeros(60)}, ValueError, r"> 0 everywhere"),
        ({"tolerance": 0.0}, ValueError, r"tolerance must be finite and > 0"),
        ({"loss_target": "small"}, TypeError, r"loss_target must be a number"),
        ({"gamma": 2.0, "epsilon": 2.0}, ValueError, r"collapsed to 0.*take gamma well below 0\.116"),
        ({"gamma": 2.0, "epsilon": 0.0}, ValueError, r"collapsed to 0.*take gamma well below 0\.116"),
        ({"loss_target": 1e-40}, ValueError, r"loss_target must be above rounding"),
    ],
)
def test_bad_settings_and_collapsing_flows_are_refused_in_words(changed, error, message):
    data = sparse_regression(shift=2.0, seed=0)
    settings = {"initial_scale": 0.05, "gamma": 0.06, "epsilon": 0.02}
    with pytest.raises(error, match=message):
        simulate(data.X, data.y, **{**settings, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 9}, r"batch_size must be at most the number of samples, 4; got 9"),
        ({"learning_rate": 100.0}, r"learning_rate must keep the weights finite; got 100"),
        ({"steps": 0}, r"steps must be >= 1"),
    ],
)
def test_train_refuses_what_it_cannot_do(changed, message):
    settings = {"initial_scale": 0.3, "learning_rate": 1e-2, "steps": 50, "seed": 0}
    with pytest.raises(ValueError, match=message):
        train(SMALL.X, SMALL.y, gradreg.fgr(gamma=0.1, epsilon=0.1), **{**settings, **changed})


def test_sparse_regression_refuses_more_nonzeros_than_features():
    with pytest.raises(ValueError, match=r"nonzeros must be at most features; got 4 of 3"):
        sparse_regression(features=3, nonzeros=4)
