"""The diagonal linear network β = u∘u − v∘v under gradient regularization: its flow, its implicit bias, and training it by SGD.

Loss L = ‖Xβ − y‖² / 4n, weights u(0) = v(0) = α₀, and with K = XᵀX/n, g = Xᵀ(Xβ − y)/n: ∇_u L = g∘u, ∇_v L = −g∘v.

Source: Karakida et al. 2023, arXiv 2210.02720, section on diagonal linear networks, after Woodworth et al. 2020, arXiv 2002.09277.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradreg import checks
from gradreg.constructors import bgr, exact, fgr
from gradreg.extras import needing
from gradreg.penalties import GradientPenalty

with needing("gradreg.theory.diagonal_network", "theory"):
    import numpy as np
    from numpy.typing import ArrayLike
    from scipy.integrate import BDF

    from gradreg.theory.diagonal_flow import DiagonalFlow
    from gradreg.theory.sparse_regression import Array, checked_data, checked_scale, require_interpolation

MOST_STEPS = 50_000
"""Solver steps after which a flow that has neither converged nor collapsed is stopped; the reference runs take about 700."""

ROUNDING = 1e-13
"""The smallest ‖Xβ − y‖ / ‖y‖ that float64 can reach."""

ORDINARY = 2 * np.log(1e3)
"""−2 ln α up to which ``implicit_bias`` is solved at once: its Newton's method needs about as many steps."""

FLAT = 3e-8
"""The square root of the curvature, relative to the largest, below which a direction of ν moves residuals by no more than rounding."""

VANISHED = -150.0
"""ln u or ln v below which a coordinate counts as collapsed: growing back from e^−150 would take longer than any run."""


@dataclass(frozen=True, eq=False)
class DiagonalNetworkFlow:
    """The result of a gradient flow. m is the number of solver steps, d the number of features.

    Attributes:
        beta: β at the end, shape (d,).
        u: weights u at the end, shape (d,).
        v: weights v at the end, shape (d,).
        alpha: √(u∘v) at the end, shape (d,); small means a bias towards sparse β.
        initial_alpha: α₀, shape (d,).
        time: shape (m,), in units of the flow's time (learning rate × steps).
        loss: L at those times, shape (m,).
        trajectory: β at those times, shape (m, d).
        evaluations: how often the flow's right-hand side was evaluated.
    """

    beta: Array
    u: Array
    v: Array
    alpha: Array
    initial_alpha: Array
    time: Array
    loss: Array
    trajectory: Array
    evaluations: int

    @property
    def log_shrinkage(self) -> Array:
        """ln(α/α₀) = −γ∫ g∘g′ dt, shape (d,): 0 without a penalty, negative where the penalty made the bias sparser."""
        return np.log(self.alpha / self.initial_alpha)


def simulate(
    X: ArrayLike,
    y: ArrayLike,
    *,
    initial_scale: float | Array,
    gamma: float,
    epsilon: float,
    tolerance: float = 1e-9,
    loss_target: float = 1e-14,
    end_time: float | None = None,
) -> DiagonalNetworkFlow:
    """Follow the gradient flow of the regularized loss until it interpolates.

    With u′ = u∘(1 + εg), v′ = v∘(1 − εg), g′ = Xᵀ(X(u′∘u′ − v′∘v′) − y)/n and A = (1 − γ/ε)g + (γ/ε)g′
    (for ε = 0: g′ = g and A = g + γK[2g∘(u∘u + v∘v)])::

        d ln u/dt = −A − γ g∘g′        d ln v/dt = +A − γ g∘g′

    Both g and g′ lie in the row space of X, so n + d numbers determine ln u and ln v, not 2d. These are integrated by BDF with the
    analytic Jacobian.

    Args:
        X: samples as rows, shape (n, d), with some β that satisfies Xβ = y (n ≤ d independent rows suffice).
        y: shape (n,).
        initial_scale: α₀ > 0, a number or shape (d,).
        gamma: strength γ ≥ 0.
        epsilon: ε > 0 is F-GR, ε < 0 is B-GR with radius |ε|, ε = 0 is the exact penalty (DB). Of no effect where γ = 0.
        tolerance: relative error allowed per step in ln u and ln v, > 0.
        loss_target: the flow has converged when L is below it, > 0.
        end_time: stop at this time, converged or not, > 0; None (the default) runs until convergence.

    Returns:
        DiagonalNetworkFlow, whose first point is t = 0 and whose last is the end.

    Raises:
        ValueError: shapes that disagree, data that nothing interpolates, a value outside its range, or a flow that never converges
            because γ or ε is too large; the message says which.
        TypeError: something that is not a number.

    Cost: 0.1 s at d = 60, n = 30. Each of the about 100 factorizations takes (n + d)³ operations, and n²d where d > 4n and the Jacobian
    is kept sparse.
    Source: Karakida et al. 2023, arXiv 2210.02720; the reduction to n + d numbers is ours.
    """
    matrix, vector = checked_data(X, y)
    scale = checked_scale("initial_scale", initial_scale, matrix.shape[1])
    gamma = checks.non_negative("gamma", gamma)
    epsilon = checks.real("epsilon", epsilon)
    tolerance, target = checks.positive("tolerance", tolerance), checks.positive("loss_target", loss_target)
    if end_time is None:
        require_interpolation(matrix, vector)
        floor = float(ROUNDING * np.linalg.norm(vector)) ** 2 / (4 * vector.size)
        if target < floor:
            raise ValueError(f"loss_target must be above rounding, {floor:.2g} for this y; got {target:g}. Raise loss_target.")
        last = np.inf
    else:
        last = checks.positive("end_time", end_time)
        target = 0.0
    flow = DiagonalFlow(matrix, vector, np.log(scale), gamma, epsilon)
    rank = int(np.linalg.matrix_rank(matrix))
    times, losses, betas = [0.0], [], []
    solver = BDF(flow.rate, 0.0, flow.start(), last, rtol=tolerance, atol=tolerance / 10, jac=flow.jacobian)
    while True:
        log_u, log_v = flow.log_weights(solver.y)
        with np.errstate(over="ignore", invalid="ignore"):
            betas.append(np.exp(2 * log_u) - np.exp(2 * log_v))
            losses.append(flow.loss(betas[-1]))
        if losses[-1] < target or solver.status == "finished":
            break
        alive = int(np.sum(np.maximum(log_u, log_v) > VANISHED))
        still = len(losses) % 100 == 0 and np.abs(flow.rate(solver.t, solver.y)).max() < tolerance * np.sqrt(target)
        # BDF's first steps subtract rows of differences that it has not filled yet: harmless, but uninitialized memory may warn.
        with np.errstate(over="ignore", invalid="ignore"):
            message = solver.step() if len(losses) <= MOST_STEPS else "the flow takes too many steps"
        failed = solver.status == "failed" or len(losses) > MOST_STEPS or not np.isfinite(losses[-1])
        if end_time is None and alive < rank:
            raise ValueError(_not_arrived(flow, losses[-1], f"only {alive} of {log_u.size} coordinates have not collapsed to 0", rank))
        if end_time is None and still:
            raise ValueError(_not_arrived(flow, losses[-1], "the flow stands still at a point that does not interpolate", rank))
        if failed:
            raise ValueError(_not_arrived(flow, losses[-1], str(message), rank))
        times.append(float(solver.t))
    u, v = np.exp(log_u), np.exp(log_v)
    return DiagonalNetworkFlow(
        beta=betas[-1],
        u=u,
        v=v,
        alpha=np.exp((log_u + log_v) / 2),
        initial_alpha=scale,
        time=np.array(times),
        loss=np.array(losses),
        trajectory=np.array(betas),
        evaluations=int(solver.nfev),
    )


def _not_arrived(flow: DiagonalFlow, loss: float, happened: str, rank: int) -> str:
    slope = float(np.abs(flow.X.T @ flow.y).max() / flow.X.shape[0])
    return (
        f"gamma and epsilon must let the flow reach the loss target; got gamma={flow.gamma:g}, epsilon={flow.epsilon:g}, and at loss "
        f"{loss:.3g} {happened} (rank of X: {rank}). Near the origin a coordinate grows only if gamma times its |X^T y / n| is below 1, "
        f"and the largest of those is {slope:.3g}: take gamma well below {1 / slope if slope else np.inf:.3g} and |epsilon| no larger, "
        "or raise loss_target."
    )


def implicit_bias(X: ArrayLike, y: ArrayLike, alpha: float | Array) -> Array:
    """The interpolating β towards which a diagonal network with α = √(u∘v) is biased.

    ``argmin over Xβ = y of Σ α_i² q(β_i/α_i²)`` with q(z) = 2 − √(4 + z²) + z·arcsinh(z/2). Small α makes that an ℓ₁ norm, large α an
    ℓ₂ norm. Solved through the dual, which has no constraint: β = 2α²∘sinh(Xᵀν) where ν minimizes Σ 2α_i² cosh((Xᵀν)_i) − νᵀy.

    Newton's method, damped so that no exponent changes by more than 2 per step. The Newton equation is solved through a QR
    factorization of √W Xᵀ, where W, the Hessian's weights, may span α² to 1: forming XWXᵀ would square its condition number.
    Directions of ν along which W vanishes to rounding are damped by a ridge: where β is sparse, only α → 0 decides them, and rounding
    would. A tiny α is approached through its roots, twice the logarithm each time, with ν scaled as much: ν grows like ln(1/α²).
    Exponents are combined with 2 ln α before exponentiation, so that neither a tiny α nor a large argument overflows.

    Args:
        X: samples as rows, shape (n, d); dependent rows are allowed.
        y: shape (n,), with some β that satisfies Xβ = y.
        alpha: α > 0, a number or shape (d,).

    Returns:
        β, shape (d,).

    Raises:
        ValueError: shapes that disagree, data that nothing interpolates, or α not > 0.

    Cost: a QR factorization of (d, n) for each step; at d = 60 about 20 steps and milliseconds for α ≥ 1e-10, 500 steps for α = 1e-150.
    Source: Woodworth et al. 2020, arXiv 2002.09277 (the potential q); Karakida et al. 2023, arXiv 2210.02720 (its α under a penalty).

    >>> implicit_bias([[1.0, 1.0]], [2.0], 0.1).round(12).tolist()
    [1.0, 1.0]
    """
    matrix, vector = checked_data(X, y)
    log_weight = 2 * np.log(checked_scale("alpha", alpha, matrix.shape[1]))
    require_interpolation(matrix, vector)
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.sum(singular > singular[0] * max(matrix.shape) * np.finfo(np.float64).eps))
    rows, targets = right[:rank], (left[:, :rank].T @ vector) / singular[:rank]  # the same constraints on orthonormal rows
    size = float(np.linalg.norm(targets))
    if size == 0.0:
        return np.zeros(matrix.shape[1])
    # For β/size, which has weights α²/size: its residuals and weights are of the order of 1 and below, whatever the units of y.
    targets, log_weight = targets / size, log_weight - np.log(size)
    dual, power = np.zeros(rank), min(1.0, ORDINARY / max(-float(log_weight.min()), ORDINARY))
    while True:
        beta, dual, residual = _newton(rows, targets, power * log_weight, dual, 1e-14 if power == 1.0 else 1e-6)
        if power == 1.0 or residual > 1e-6:
            break
        dual, power = dual * min(2.0, 1 / power), min(2 * power, 1.0)
    if power == 1.0 and residual <= 1e-9:
        return size * beta
    raise ValueError(
        f"alpha must let Newton's method reach X beta = y; got a smallest alpha of {np.exp((log_weight.min() + np.log(size)) / 2):.3g}, "
        f"and a relative residual of {residual:.3g} was all it reached. Raise alpha, or scale X and y to about 1."
    )


def _newton(rows: Array, targets: Array, log_weight: Array, dual: Array, tolerance: float) -> tuple[Array, Array, float]:
    """Minimize Σ 2 e^w cosh(rowsᵀν) − νᵀtargets from ``dual``; the β, ν and residual that were best."""
    argument = dual @ rows
    best: tuple[Array, Array, float] = (np.zeros_like(log_weight), dual, np.inf)
    since = 0
    for _ in range(1_000):
        exponent = np.abs(argument)  # 2α² sinh, without cancellation where α is large
        beta = np.sign(argument) * np.exp(log_weight + exponent) * -np.expm1(-2 * exponent)
        residual = targets - rows @ beta
        distance = float(np.linalg.norm(residual))
        since += 1
        if distance < best[2]:
            best, since = (beta, dual, distance), 1
        if distance <= tolerance or (since > 5 and best[2] <= 1e-9):
            break
        up, down = np.exp(log_weight + argument), np.exp(log_weight - argument)
        factor = np.asarray(np.linalg.qr(np.sqrt(up + down)[:, None] * rows.T, mode="r"))
        pivots = np.abs(np.diag(factor))
        if pivots.min() < FLAT * pivots.max():
            factor = np.asarray(np.linalg.qr(np.vstack([factor, FLAT * pivots.max() * np.eye(dual.size)]), mode="r"))
        step = np.linalg.solve(factor, np.linalg.solve(factor.T, residual))
        change = step @ rows
        damping = min(1.0, 2.0 / max(float(np.abs(change).max()), 1e-300))
        decrement = float(residual @ step)
        value = float(np.sum(up + down) - dual @ targets)
        while damping > 1e-12:
            trial = argument + damping * change
            grown = float(np.sum(np.exp(log_weight + trial) + np.exp(log_weight - trial)) - (dual + damping * step) @ targets)
            if grown <= value - 1e-4 * damping * decrement + 1e-12 * (abs(value) + 1.0):
                break
            damping /= 2
        dual = dual + damping * step
        argument = dual @ rows
    return best


def penalty_of(gamma: float, epsilon: float) -> GradientPenalty | None:
    """The penalty whose small steps follow ``simulate(gamma=gamma, epsilon=epsilon)``: F-GR, B-GR or exact by the sign of ε.

    >>> print(penalty_of(0.06, 0.02), penalty_of(0.06, -0.02), penalty_of(0.06, 0.0), penalty_of(0.0, 1.0))
    F-GR(gamma 0.06, epsilon 0.02) B-GR(gamma 0.06, epsilon 0.02) exact(power 2, gamma 0.06) None
    """
    gamma, epsilon = checks.non_negative("gamma", gamma), checks.real("epsilon", epsilon)
    if gamma == 0.0:
        return None
    if epsilon == 0.0:
        return exact(gamma=gamma)
    return fgr(gamma=gamma, epsilon=epsilon) if epsilon > 0 else bgr(gamma=gamma, epsilon=-epsilon)


@dataclass(frozen=True, eq=False)
class TrainedDiagonalNetwork:
    """The result of training.

    Attributes:
        beta: β = u∘u − v∘v, shape (d,).
        u: shape (d,).
        v: shape (d,).
        alpha: √|u∘v|, shape (d,).
        loss: the loss before each step, on the samples of that step, shape (steps,).
        evaluations: gradient evaluations in all, as the engine counts them.
    """

    beta: Array
    u: Array
    v: Array
    alpha: Array
    loss: Array
    evaluations: int


def train(
    X: ArrayLike,
    y: ArrayLike,
    penalty: GradientPenalty | None,
    *,
    initial_scale: float | Array,
    learning_rate: float,
    steps: int,
    seed: int,
    batch_size: int | None = None,
) -> TrainedDiagonalNetwork:
    """Train the diagonal network by SGD in float64, its gradients from ``gradreg.torch.GradientRegularizer``.

    Steps of size η over a time T = η·steps end O(η) from the flow that ``simulate(..., end_time=T)`` follows.

    Args:
        X: samples as rows, shape (n, d).
        y: shape (n,).
        penalty: any ``GradientPenalty``, or None.
        initial_scale: α₀ > 0, a number or shape (d,).
        learning_rate: η > 0, constant.
        steps: optimizer steps, ≥ 1.
        seed: of the order of the samples, ≥ 0; of no effect with the full batch.
        batch_size: samples a step, drawn without replacement epoch by epoch, 1 ≤ batch_size ≤ n; None is the full batch.

    Returns:
        TrainedDiagonalNetwork.

    Raises:
        ValueError: shapes that disagree, a value outside its range, or weights that are no longer finite.
        ModuleNotFoundError: PyTorch is not installed.

    Cost: about 0.3 ms a step with two evaluations.
    """
    import torch

    from gradreg.torch import GradientRegularizer

    matrix, vector = checked_data(X, y)
    n, d = matrix.shape
    scale = checked_scale("initial_scale", initial_scale, d)
    rate = checks.positive("learning_rate", learning_rate)
    steps = checks.whole("steps", steps, minimum=1)
    size = n if batch_size is None else checks.whole("batch_size", batch_size, minimum=1)
    if size > n:
        raise ValueError(f"batch_size must be at most the number of samples, {n}; got {size}. Use batch_size=None for the full batch.")
    order = np.random.default_rng(checks.whole("seed", seed, minimum=0))
    network = torch.nn.Module()
    network.u = u = torch.nn.Parameter(torch.tensor(scale))
    network.v = v = torch.nn.Parameter(torch.tensor(scale))
    regularizer = GradientRegularizer(network, penalty)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    samples, targets = torch.tensor(matrix), torch.tensor(vector)
    rows, answers, queue = samples, targets, np.empty(0, dtype=np.int64)
    losses = np.empty(steps)
    for step in range(steps):
        if size < n:
            if queue.size < size:
                queue = order.permutation(n)
            chosen, queue = torch.from_numpy(queue[:size]), queue[size:]
            rows, answers = samples[chosen], targets[chosen]
        optimizer.zero_grad()
        loss = regularizer.backward(lambda x=rows, t=answers: ((x @ (u * u - v * v) - t) ** 2).mean() / 4)
        optimizer.step()
        losses[step] = loss.item()
        if not np.isfinite(losses[step]):
            raise ValueError(
                f"learning_rate must keep the weights finite; got {rate:g} with {penalty}, and the loss is {losses[step]} at step {step}. "
                "Lower the learning rate, the strength or the radius."
            )
    end_u, end_v = u.detach().numpy(), v.detach().numpy()
    return TrainedDiagonalNetwork(
        beta=end_u**2 - end_v**2,
        u=end_u,
        v=end_v,
        alpha=np.sqrt(np.abs(end_u * end_v)),
        loss=losses,
        evaluations=int(regularizer.metrics.evaluations),
    )
