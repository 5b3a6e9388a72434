"""A radius that is learned from held-out data, in PyTorch: against derivatives of the gap itself, and a loop of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import grad
from torch.nn.parallel import DistributedDataParallel

import gradreg
from gradreg import LETS, GradientPenalty, HeldOut
from gradreg.torch import GradientRegularizer, held_out, norms
from tests.adam import LogRadius

from . import twins
from .cases import Problem, assert_close, assert_same_bits, dropout_batchnorm_problem, gradients, tanh_problem, values
from .ranks import run_ranks
from .twins import Loss, Parameters

TRAIN, KEPT = slice(0, 5), slice(5, 8)
START, RATE = 0.3, 0.1
LEARNED = LETS(start=START, rate=RATE, momentum=0.8, memory=0.9, every=1)


@pytest.fixture(params=[False, True], ids=["cpu", "as on an accelerator"])
def accelerated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(norms, "reading_is_free", lambda tensor: False)
    return request.param


def losses_of(problem: Problem) -> tuple[Loss, Loss]:
    """The losses of the batch and of the held-out rows, as functions of the parameters."""
    batch, kept = (twins.loss_of(problem.model, problem.x[rows], problem.y[rows]) for rows in (TRAIN, KEPT))
    return batch, kept


def asam(loss: Loss, theta: Parameters, rho: Any) -> Parameters:
    return twins.asam(loss, theta, rho, 0.1, [name for name, value in theta.items() if value.dim() > 1])


PENALTIES: dict[str, tuple[Callable[[Any], GradientPenalty], Callable[[Loss, Parameters, Any], Parameters]]] = {
    "sam": (lambda radius: gradreg.sam(rho=radius), twins.sam),
    "gnp": (lambda radius: gradreg.gnp(r=radius, alpha=0.8), lambda loss, theta, r: twins.gnp(loss, theta, r, 0.8)),
    "fgr": (lambda radius: gradreg.fgr(epsilon=radius), lambda loss, theta, e: twins.fgr(loss, theta, e, e)),
    "bgr": (lambda radius: gradreg.bgr(epsilon=radius), lambda loss, theta, e: twins.bgr(loss, theta, e, e)),
    "cgr": (lambda radius: gradreg.cgr(epsilon=radius), lambda loss, theta, e: twins.cgr(loss, theta, e, e)),
    "asam": (lambda radius: gradreg.asam(rho=radius, eta=0.1), asam),
}
"""Name -> the penalty with a radius, and its gradient as the paper writes it."""


def linear_problem() -> Problem:
    """Whose loss is quadratic, so that finite differences are exact."""
    torch.manual_seed(1)
    return Problem(nn.Linear(3, 2).double(), torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))


def slope_by_autograd(problem: Problem, regularized: Callable[[Loss, Parameters, Any], Parameters], radius: float) -> float:
    """d/dη of d/d log ρ of ½·(L_h − L)² at θ − η·G(ρ), at η = 0: PyTorch differentiates the whole step, its gradients included."""
    batch, kept = losses_of(problem)
    theta = twins.parameters_of(problem.model)

    def after_the_step(eta: Tensor, log_radius: Tensor) -> Tensor:
        there = twins.plus(theta, -eta, regularized(batch, theta, log_radius.exp()))
        return 0.5 * (kept(there) - batch(there)) ** 2

    eta, log_radius = torch.zeros((), dtype=torch.float64), torch.tensor(math.log(radius), dtype=torch.float64)
    return float(grad(lambda at: grad(after_the_step)(eta, at))(log_radius))


def moments(regularizer: GradientRegularizer) -> dict[str, Any]:
    return regularizer.state_dict()["radius"]


def first_slope(regularizer: GradientRegularizer) -> float:
    """What the first step measured."""
    state = moments(regularizer)
    return state["mean"] / state["weight"]


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize(("penalty", "regularized"), PENALTIES.values(), ids=PENALTIES)
def test_the_slope_is_the_derivative_of_the_squared_gap(penalty: Any, regularized: Any) -> None:
    """On a quadratic loss at any radius; else as far as the gradient is linear between the two points, so at a small one."""
    for problem, radius, tolerance in ((linear_problem(), 0.3, 1e-9), (tanh_problem(), 1e-3, 1e-2)):
        expected = slope_by_autograd(problem, regularized, radius)
        regularizer = GradientRegularizer(problem.model, penalty(LETS(start=radius, every=1)))
        regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT))
        assert first_slope(regularizer) == pytest.approx(expected, rel=tolerance)
        assert abs(expected) > 1e-6


def follow(twin: LogRadius, batch: Loss, kept: Loss, theta: Parameters, regularized: Parameters) -> None:
    """The twin's next radius after a step at ``theta`` with this regularized gradient."""
    g, h = grad(batch)(theta), grad(kept)(theta)
    between = torch.cat([(h[name] - g[name]).flatten() for name in g])
    change = torch.cat([(regularized[name] - g[name]).flatten() for name in g])
    twin.follow(-float((kept(theta) - batch(theta)) * (between @ change)))


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("penalty", "regularized"), PENALTIES.values(), ids=PENALTIES)
def test_thirty_steps_are_those_of_a_loop_of_ones_own(penalty: Any, regularized: Any, every: int) -> None:
    problem, twin = tanh_problem(), LogRadius(math.log(START), RATE)
    batch, kept = losses_of(problem)
    learned = LETS(start=START, rate=RATE, momentum=0.8, memory=0.9, every=every)
    regularizer = GradientRegularizer(problem.model, penalty(learned))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    for step in range(30):
        theta, radius = twins.parameters_of(problem.model), twin.radius
        expected = regularized(batch, theta, radius)
        if step % every == 0:
            follow(twin, batch, kept, theta, expected)
        optimizer.zero_grad()
        regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT))
        assert_close(gradients(problem.model), expected)
        assert regularizer.metrics.radius == pytest.approx(radius, rel=1e-9)
        optimizer.step()
    assert moments(regularizer)["log_radius"] == pytest.approx(twin.log_radius, abs=1e-9)
    assert abs(twin.log_radius - math.log(START)) > 0.1
    own = penalty(learned).evaluations_at(0)
    assert regularizer.metrics.evaluations == 30 * own + len(range(0, 30, every))


OTHERS = {
    "friendly": gradreg.friendly_sam(rho=LEARNED, sigma=0.7),
    "gsam": gradreg.gsam(rho=LEARNED, a=0.4),
    "looksam": gradreg.looksam(rho=LEARNED, k=3),
    "wsam": gradreg.wsam(rho=LEARNED, gamma=0.6, decoupled=True),
    "sparse": gradreg.sam(rho=LEARNED).sparse(0.4, every=5),
    "two ascent steps": gradreg.sam(rho=LEARNED, steps=2),
    "warm-up": gradreg.sam(rho=LEARNED).warmup("strength", steps=3),
    "every": gradreg.fgr(epsilon=LEARNED).every(2, compensate=True),
}


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("penalty", OTHERS.values(), ids=OTHERS)
def test_with_other_parts_the_slope_is_that_of_what_they_add(penalty: GradientPenalty) -> None:
    """From the result of each step alone: gradient, or gradient and decoupled step."""
    problem, twin = tanh_problem(), LogRadius(math.log(START), RATE)
    batch, kept = losses_of(problem)
    regularizer = GradientRegularizer(problem.model, penalty)
    for step in range(7):
        theta, before = twins.parameters_of(problem.model), moments(regularizer)
        problem.model.zero_grad()
        regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT))
        result = gradients(problem.model)
        regularizer.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=1.0))
        moved = twins.parameters_of(problem.model)
        result = {name: result[name] + theta[name] - moved[name] for name in result}
        if penalty.at(step, radius=0.1).fresh:
            follow(twin, batch, kept, theta, result)
            assert moments(regularizer)["log_radius"] == pytest.approx(twin.log_radius, abs=1e-9)
        else:
            assert moments(regularizer) == before


def test_micro_batches_add_up_and_may_each_have_a_perturbation() -> None:
    problem = tanh_problem()
    batch, kept = losses_of(problem)
    theta = twins.parameters_of(problem.model)
    parts = [lambda rows=rows, n=n: n / 5 * problem.loss(rows) for rows, n in ((slice(0, 2), 2), (slice(2, 5), 3))]
    found: list[float] = []
    for options in ({}, {"perturb": "each"}):
        twin = LogRadius(math.log(START), RATE)
        regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=LEARNED))
        problem.model.zero_grad()
        regularizer.backward(parts, held_out=[lambda: 0.25 * problem.loss(KEPT), lambda: 0.75 * problem.loss(KEPT)], **options)  # type: ignore[arg-type]
        follow(twin, batch, kept, theta, gradients(problem.model))
        assert moments(regularizer)["mean"] == pytest.approx(twin.m, rel=1e-9)
        found.append(twin.m)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_what_is_due_is_measured_and_nothing_else_is_evaluated() -> None:
    problem = dropout_batchnorm_problem()
    asked: list[int] = []
    step = 0

    def kept() -> Tensor:
        asked.append(step)
        return problem.loss(KEPT)

    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=LETS(every=3)))
    for step in range(7):  # noqa: B007  # the closure reads it
        regularizer.backward(problem.closure(TRAIN), held_out=kept)
    assert asked == [0, 3, 6]


def test_held_out_data_change_neither_buffers_nor_random_numbers() -> None:
    states: list[Any] = []
    for learned in (True, False):
        torch.manual_seed(0)
        problem = dropout_batchnorm_problem()
        penalty = gradreg.sam(rho=LETS(start=0.3, lower=0.3, upper=0.3, every=2) if learned else 0.3)
        regularizer = GradientRegularizer(problem.model, penalty)
        for _ in range(4):
            problem.model.zero_grad()
            regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT) if learned else None)
        states.append([{**gradients(problem.model), **values(problem.model)}, {"drawn": torch.rand(3)}])
    for one, other in zip(*states, strict=True):
        assert_close(one, other)


def test_a_resumed_run_goes_on_with_the_same_radius() -> None:
    found: list[dict[str, Tensor]] = []
    for resumed in (False, True):
        problem = tanh_problem()
        regularizer = GradientRegularizer(problem.model, gradreg.fgr(epsilon=LEARNED))
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
        for step in range(12):
            if resumed and step == 5:
                state, regularizer = regularizer.state_dict(), GradientRegularizer(problem.model, gradreg.fgr(epsilon=LEARNED))
                assert "held_out" not in state
                regularizer.load_state_dict(state)
            optimizer.zero_grad()
            regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT))
            optimizer.step()
        found.append(values(problem.model))
    assert_same_bits(*found)


def test_states_that_do_not_fit_are_refused() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=LEARNED))
    before = regularizer.state_dict()
    other = GradientRegularizer(problem.model, gradreg.sam(rho=gradreg.AutoRadius())).state_dict()
    with pytest.raises(ValueError, match=r"^radius must hold log_radius and mean and .*; got \['log_radius', 'norm'.*of the same rule"):
        regularizer.load_state_dict(other)
    for key, wrong in (("size", -1.0), ("weight", math.nan), ("log_radius", "a"), ("steps", 0.5)):
        with pytest.raises((ValueError, TypeError), match=key):
            regularizer.load_state_dict({**before, "radius": {**before["radius"], key: wrong}})
    assert regularizer.state_dict() == before


def test_what_is_missing_or_too_much_is_said() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=LETS()))
    with pytest.raises(ValueError, match=r"^held_out must be given with lets\(rate 0\.01\), a radius that is learned .*; got none"):
        regularizer.backward(problem.closure(TRAIN))
    assert regularizer.step == 0
    with pytest.raises(ValueError, match=r"^held_out must be None with lets\(rate 0\.01\), to which the held-out closures .*; got HeldOut"):
        GradientRegularizer(problem.model, gradreg.sam(rho=LETS()), held_out=HeldOut())
    with pytest.raises(ValueError, match=r"^ascent must be None with a radius that sets itself"):
        regularizer.backward(problem.closure(TRAIN), ascent=problem.closure(TRAIN), held_out=problem.closure(KEPT))


class Cliff(nn.Module):
    """½‖w‖², infinite outside of a ball of radius 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.6, 0.8], dtype=torch.float64))

    def forward(self, target: float = 0.0) -> Tensor:
        return 0.5 * (self.w - target).square().sum() * (math.inf if float(self.w.detach().norm()) > 2.0 else 1.0)


class Scaling:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def scale(self, outputs: Tensor) -> Tensor:
        return self.factor * outputs


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_over_the_edge_halves_the_radius_except_under_a_scaler(scaled: bool) -> None:
    model = Cliff()
    regularizer = GradientRegularizer(model, gradreg.sam(rho=LETS(start=3.0, every=1)))
    regularizer.backward(model, held_out=lambda: model(1.0), scaler=Scaling(8.0) if scaled else None)
    state = moments(regularizer)
    assert math.exp(state["log_radius"]) == pytest.approx(3.0 if scaled else 1.5)
    assert (state["mean"], state["weight"], state["steps"]) == (0.0, 0.0, 1)


@pytest.mark.usefixtures("accelerated")
def test_an_infinite_held_out_loss_says_nothing() -> None:
    model = Cliff()
    regularizer = GradientRegularizer(model, gradreg.sam(rho=LETS(start=0.5, every=1)))
    for sign in (1.0, -1.0):
        regularizer.backward(model, held_out=lambda sign=sign: model(1.0) + sign * math.inf)
    assert moments(regularizer)["log_radius"] == pytest.approx(math.log(0.5))
    assert moments(regularizer)["weight"] == 0.0


def test_held_out_data_that_are_those_trained_on_say_nothing() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=LEARNED))
    regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(TRAIN))
    assert moments(regularizer)["weight"] == 0.0


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_of_vectors_of_unlike_length_are_those_in_float64(dtype: torch.dtype) -> None:
    """‖a‖ is beyond the numbers of float16, and b as long as one of them."""
    torch.manual_seed(0)
    a, b = torch.full((16,), 30_000.0, dtype=dtype), torch.zeros(16, dtype=dtype)
    b[0] = 1.0
    found = held_out._inner([a], [b], [a], (a.double().norm().float(), b.double().norm().float()))
    assert float(found) == pytest.approx(float(a.double() @ b.double()), rel=1e-5)
    a, b = torch.randn(100_000).to(dtype), torch.randn(100_000).to(dtype)
    lengths = a.double().norm(), b.double().norm()
    found = held_out._inner([a], [b], [a], (lengths[0].float(), lengths[1].float()))
    assert float(found / (lengths[0] * lengths[1])) == pytest.approx(float(a.double() @ b.double() / (lengths[0] * lengths[1])), abs=3e-5)


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("penalty", [gradreg.fgr(epsilon=LEARNED), gradreg.wsam(rho=LEARNED, gamma=0.6, decoupled=True)], ids=str)
def test_a_loss_scale_does_not_enter(penalty: GradientPenalty) -> None:
    found: list[float] = []
    for scaler in (None, Scaling(1024.0)):
        problem = tanh_problem()
        regularizer = GradientRegularizer(problem.model, penalty)
        regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT), scaler=scaler)
        regularizer.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.0))
        found.append(first_slope(regularizer))
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def on_ranks(rank: int, world: int, scope: str, sharded: bool) -> tuple[list[float], dict[str, Tensor]]:
    problem = tanh_problem()
    rows, kept = slice(rank * 2, rank * 2 + 2), slice(4 + rank * 2, 6 + rank * 2)
    if sharded:
        for layer in problem.model:  # type: ignore[attr-defined]
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(problem.model)
    here = problem if sharded else Problem(DistributedDataParallel(problem.model), problem.x, problem.y)
    regularizer = GradientRegularizer(here.model, gradreg.sam(rho=LEARNED), scope=scope)  # type: ignore[arg-type]
    radii: list[float] = []
    optimizer = torch.optim.SGD(here.model.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        regularizer.backward(here.closure(rows), held_out=here.closure(kept))
        radii.append(float(regularizer.metrics.radius))
        optimizer.step()
    found = {name.removeprefix("module."): g for name, g in gradients(here.model).items()}
    return radii, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


@pytest.mark.slow
def test_all_ranks_learn_the_same_radius(tmp_path: Path) -> None:
    """From the averaged gradients and losses, whether each rank perturbs by its own gradient or not, whole or sharded."""
    cases: dict[str, Any] = {scope: (on_ranks, (scope, False)) for scope in ("local", "global")} | {"fsdp": (on_ranks, ("local", True))}
    found = run_ranks(2, cases, tmp_path)
    problem = tanh_problem()
    halves = [twins.loss_of(problem.model, problem.x[i : i + 2], problem.y[i : i + 2]) for i in (0, 2)]
    batch, kept = (twins.loss_of(problem.model, problem.x[rows], problem.y[rows]) for rows in (slice(0, 4), slice(4, 8)))
    for name, (ours, theirs) in found.items():
        theta, twin, radii = twins.parameters_of(problem.model), LogRadius(math.log(START), RATE), list[float]()
        expected: Parameters = {}
        for _ in range(4):
            radii.append(twin.radius)
            parts = halves if name == "local" else [batch]
            expected = twins.scaled(1 / len(parts), twins.total(*(twins.sam(part, theta, twin.radius) for part in parts)))
            follow(twin, batch, kept, theta, expected)
            theta = twins.plus(theta, -0.05, expected)
        for rank in (ours, theirs):
            assert rank[0] == pytest.approx(radii, rel=1e-9)
            assert_close(rank[1], expected, 1e-9)
