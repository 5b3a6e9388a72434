"""A radius that sets itself, in PyTorch: against a plain loop, and under what training loops do with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

import gradreg
from gradreg import AutoRadius, GradientPenalty
from gradreg.torch import GradientRegularizer, norms

from .cases import Problem, assert_close, gradients, plain_gradients, tanh_problem, values
from .test_dispatch import FEW, MANY, Operations, added, deep_problem
from .twins import Loss, Parameters, loss_of, norm, parameters_of, plus, scaled, total

TARGET, GAIN = 0.9, 0.1
AUTO = AutoRadius(target=TARGET, start=0.3, gain=GAIN, lower=0.01, upper=3.0)


@pytest.fixture(autouse=True, params=[False, True], ids=["cpu", "as on an accelerator"])
def accelerated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test runs twice: with numbers that can be read at once, and with scalar tensors, as on an accelerator."""
    if request.param:
        monkeypatch.setattr(norms, "reading_is_free", lambda tensor: False)
    return request.param


def dot(a: Parameters, b: Parameters) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))


class Twin:
    """The controller in plain Python: log r += gain·(cos − target)/(1 − target), clipped, with its two guards."""

    def __init__(self, start: float = 0.3, lower: float = 0.01, upper: float = 3.0) -> None:
        self.log_radius, self.rising = math.log(start), 1.0
        self.lower, self.upper = lower, upper

    def update(self, g: Parameters, moved: Parameters, rise: float, expected: float | None) -> float:
        cosine = dot(g, moved) / math.sqrt(dot(g, g) * dot(moved, moved))
        change = min(GAIN, max(-GAIN, GAIN * (cosine - TARGET) / (1 - TARGET)))
        self.rising = 0.9 * self.rising + 0.1 * (rise >= 0)
        if self.rising < 0.25 or (expected is not None and rise > 2 * expected):
            change = -GAIN
        self.log_radius = min(math.log(self.upper), max(math.log(self.lower), self.log_radius + change))
        return cosine


def sam_step(loss: Loss, theta: Parameters, twin: Twin, alpha: float = 1.0) -> tuple[Parameters, float]:
    r, g = math.exp(twin.log_radius), grad(loss)(theta)
    at = plus(theta, r / norm(g), g)
    moved = grad(loss)(at)
    cosine = twin.update(g, moved, float(loss(at) - loss(theta)), r * float(norm(g)))
    return total(scaled(1 - alpha, g), scaled(alpha, moved)), cosine


def fgr_step(loss: Loss, theta: Parameters, twin: Twin, gamma: float | None = None) -> tuple[Parameters, float]:
    epsilon, g = math.exp(twin.log_radius), grad(loss)(theta)
    c = 1.0 if gamma is None else gamma / epsilon
    at = plus(theta, epsilon, g)
    moved = grad(loss)(at)
    cosine = twin.update(g, moved, float(loss(at) - loss(theta)), epsilon * float(norm(g)) ** 2)
    return total(scaled(1 - c, g), scaled(c, moved)), cosine


def bgr_step(loss: Loss, theta: Parameters, twin: Twin) -> tuple[Parameters, float]:
    epsilon, g = math.exp(twin.log_radius), grad(loss)(theta)
    at = plus(theta, -epsilon, g)
    moved = grad(loss)(at)
    cosine = twin.update(g, moved, float(loss(theta) - loss(at)), epsilon * float(norm(g)) ** 2)
    return total(scaled(2.0, g), scaled(-1.0, moved)), cosine


def cgr_step(loss: Loss, theta: Parameters, twin: Twin) -> tuple[Parameters, float]:
    epsilon, g = math.exp(twin.log_radius), grad(loss)(theta)
    at, opposite = plus(theta, epsilon, g), plus(theta, -epsilon, g)
    moved, other = grad(loss)(at), grad(loss)(opposite)
    cosine = twin.update(g, moved, float(loss(at) - loss(theta)), epsilon * float(norm(g)) ** 2)
    return total(g, scaled(0.5, moved), scaled(-0.5, other)), cosine


def asam_step(loss: Loss, theta: Parameters, twin: Twin) -> tuple[Parameters, float]:
    r, g = math.exp(twin.log_radius), grad(loss)(theta)
    t = {name: value.abs() + 0.1 if value.dim() > 1 else torch.ones_like(value) for name, value in theta.items()}
    once = {name: t[name] * g[name] for name in g}
    at = plus(theta, r / norm(once), {name: t[name] * once[name] for name in g})
    moved = grad(loss)(at)
    return moved, twin.update(g, moved, float(loss(at) - loss(theta)), None)


STEPS: dict[str, tuple[GradientPenalty, Callable[..., tuple[Parameters, float]]]] = {
    "sam": (gradreg.sam(rho=AUTO), sam_step),
    "gnp": (gradreg.gnp(r=AUTO, alpha=0.8), lambda *a: sam_step(*a, alpha=0.8)),
    "fgr": (gradreg.fgr(epsilon=AUTO), fgr_step),
    "fgr-fixed-gamma": (gradreg.fgr(gamma=0.2, epsilon=AUTO), lambda *a: fgr_step(*a, gamma=0.2)),
    "bgr": (gradreg.bgr(epsilon=AUTO), bgr_step),
    "cgr": (gradreg.cgr(epsilon=AUTO), cgr_step),
    "asam": (gradreg.asam(rho=AUTO, eta=0.1), asam_step),
}


@pytest.mark.slow
@pytest.mark.parametrize(("penalty", "step"), STEPS.values(), ids=STEPS)
def test_the_radius_follows_the_alignment(penalty: GradientPenalty, step: Callable[..., tuple[Parameters, float]]) -> None:
    """Forty steps of gradient descent: gradient, radius and alignment of every step are those of the plain loop."""
    problem, twin = tanh_problem(), Twin()
    loss = loss_of(problem.model, problem.x, problem.y)
    regularizer = GradientRegularizer(problem.model, penalty)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    seen: list[float] = []
    for _ in range(40):
        radius = math.exp(twin.log_radius)
        expected, cosine = step(loss, parameters_of(problem.model), twin)
        optimizer.zero_grad()
        regularizer.backward(problem.closure())
        assert_close(gradients(problem.model), expected)
        assert regularizer.metrics.radius == pytest.approx(radius, rel=1e-12)
        assert regularizer.metrics.cosine == pytest.approx(cosine, abs=1e-12)
        seen.append(cosine)
        optimizer.step()
    assert regularizer.state_dict()["radius"]["log_radius"] == pytest.approx(twin.log_radius, abs=1e-12)
    assert twin.log_radius != pytest.approx(math.log(0.3), abs=0.05)  # or nothing has moved


@pytest.mark.slow
def test_the_alignment_settles_at_its_target() -> None:
    for start in (0.001, 1.0):
        problem = tanh_problem()
        regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=AutoRadius(target=0.9, start=start)))
        found: list[float] = []
        for _ in range(200):  # the parameters rest
            problem.model.zero_grad()
            regularizer.backward(problem.closure())
            found.append(regularizer.metrics.cosine)
        assert found[-1] == pytest.approx(0.9, abs=1e-3)


def test_one_step_changes_it_by_at_most_the_gain() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=AutoRadius(target=0.999, start=3.0, gain=0.1)))
    regularizer.backward(problem.closure())
    assert regularizer.metrics.cosine < 0.9
    assert regularizer.state_dict()["radius"]["log_radius"] == pytest.approx(math.log(3.0) - 0.1)


def many(problem: Problem, regularizer: GradientRegularizer, steps: int, closure: Any = None, **options: Any) -> list[Tensor]:
    """Parameters after ``steps`` steps of gradient descent."""
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        regularizer.backward(problem.closure() if closure is None else closure, **options)
        optimizer.step()
        regularizer.decoupled_step(optimizer)
    return [p.detach().clone() for p in problem.model.parameters()]


COMBINED = {
    "zero warm-up": gradreg.sam(rho=AUTO).warmup("zero", steps=3),
    "strength warm-up": gradreg.fgr(epsilon=AUTO).warmup("strength", steps=3),
    "every": gradreg.sam(rho=AUTO).every(2, compensate=True),
    "reuse": gradreg.looksam(rho=AUTO, k=3),
    "sparse": gradreg.gnp(r=AUTO, alpha=0.8).sparse(0.4, every=5),
    "gap": gradreg.gsam(rho=AUTO, a=0.3),
    "gap and fixed gamma": GradientPenalty(power=2, strength=0.2, radius=AUTO, mixing=gradreg.SurrogateGap(a=0.3)),
    "unit": gradreg.gnp(r=AUTO, alpha=0.8, mixing="unit"),
    "decoupled": gradreg.wsam(rho=AUTO, gamma=0.6, decoupled=True),
    "friendly": gradreg.friendly_sam(rho=AUTO),
    "friendly, fixed strength": GradientPenalty(power=1, strength=0.2, radius=AUTO, direction=gradreg.Friendly(), difference="backward"),
    "ascent steps": gradreg.sam(rho=AUTO, steps=2),
}


@pytest.mark.parametrize("penalty", COMBINED.values(), ids=COMBINED)
def test_with_other_parts(penalty: GradientPenalty) -> None:
    """At every step the gradient is that of the same penalty with the radius of that step as a number."""
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, penalty)
    data = penalty.to_dict()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    radii: list[float] = []
    fixed: GradientRegularizer | None = None
    for _ in range(12):
        radius = math.exp(regularizer.state_dict()["radius"]["log_radius"])
        same = GradientPenalty.from_dict(with_number(data, radius))
        state = {} if fixed is None else fixed.state_dict()
        fixed = GradientRegularizer(problem.model, same)
        fixed.load_state_dict({**fixed.state_dict(), **state})
        optimizer.zero_grad()
        fixed.backward(problem.closure())
        fixed.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.0))
        expected = gradients(problem.model)
        optimizer.zero_grad()
        regularizer.backward(problem.closure())
        assert_close(gradients(problem.model), expected)
        assert regularizer.metrics.evaluations == fixed.metrics.evaluations
        radii.append(regularizer.metrics.radius)
        optimizer.step()
        regularizer.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.0))
    assert len(set(radii)) > 3


def with_number(data: Any, radius: float) -> Any:
    """``data``, a penalty's dictionary, with ``radius`` where an AutoRadius stands."""
    if not isinstance(data, dict):
        return data
    if data.get("schedule") == "auto":
        return {"schedule": "constant", "value": radius}
    return {key: with_number(value, radius) for key, value in data.items()}


def test_a_resumed_run_goes_on_as_if_it_had_not_ended() -> None:
    whole = tanh_problem()
    expected = many(whole, GradientRegularizer(whole.model, gradreg.sam(rho=AUTO)), 10)
    part = tanh_problem()
    first = GradientRegularizer(part.model, gradreg.sam(rho=AUTO))
    many(part, first, 4)
    second = GradientRegularizer(part.model, gradreg.sam(rho=AUTO))
    second.load_state_dict(first.state_dict())
    assert all(map(torch.equal, many(part, second, 6), expected))
    with pytest.raises(ValueError, match=r"radius must hold log_radius and rising and norm and usual and steps; got \['log_radius'\]"):
        second.load_state_dict({**first.state_dict(), "radius": {"log_radius": 0.0}})


def test_rests_where_nothing_is_perturbed() -> None:
    """In a zero-warm-up, between the steps of ``every`` and at a zero gradient the radius stays; a step that raises does not count."""
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=AUTO).warmup("zero", steps=2))
    radius = lambda: regularizer.state_dict()["radius"]  # noqa: E731
    start = radius()
    many(problem, regularizer, 2)
    assert radius() == start
    regularizer.backward(lambda: 0.0 * problem.loss())
    assert radius() == {**start, "steps": 1}
    calls: list[int] = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("in the second pass")
        return problem.loss()

    with pytest.raises(KeyError, match="second pass"):
        regularizer.backward(failing)
    assert radius() == {**start, "steps": 1}
    many(problem, regularizer, 1)
    assert radius()["log_radius"] != start["log_radius"]


def test_a_step_that_fails_after_it_was_measured_does_not_count() -> None:
    """The central difference measures its first perturbed pass, and the second fails."""
    ends = []
    for fails in (False, True):
        problem = tanh_problem()
        regularizer = GradientRegularizer(problem.model, gradreg.cgr(epsilon=AUTO))
        if fails:
            calls = iter(range(3))

            def closure(problem: Problem = problem, calls: Any = calls) -> Tensor:
                if next(calls) == 2:
                    raise RuntimeError("out of memory")
                return 5.0 * problem.loss()

            with pytest.raises(RuntimeError, match="out of memory"):
                regularizer.backward(closure)
        regularizer.backward(problem.closure())
        ends.append(regularizer.state_dict())
    assert ends[0] == ends[1]


def test_measures_every_k_steps() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=AutoRadius(start=0.3, every=3)))
    radii: list[float] = []
    cosines: list[float] = []
    for _ in range(7):
        many(problem, regularizer, 1)
        radii.append(regularizer.metrics.radius)
        cosines.append(regularizer.metrics.cosine)
    assert radii[0] != radii[1] == radii[2] == radii[3] != radii[4] == radii[6]
    assert [math.isnan(c) for c in cosines] == [False, True, True, False, True, True, False]


def test_the_loss_scale_does_not_enter() -> None:
    problem, scaled_problem = tanh_problem(), tanh_problem()
    for penalty in (gradreg.sam(rho=AUTO), gradreg.fgr(gamma=0.2, epsilon=AUTO)):
        plain = GradientRegularizer(problem.model, penalty)
        with_scale = GradientRegularizer(scaled_problem.model, penalty)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(5):
            problem.model.zero_grad()
            scaled_problem.model.zero_grad()
            plain.backward(problem.closure())
            with_scale.backward(scaled_problem.closure(), scaler=scaler)
            assert_close({n: g / 1024.0 for n, g in gradients(scaled_problem.model).items()}, gradients(problem.model))
        ours, theirs = with_scale.state_dict()["radius"], plain.state_dict()["radius"]
        assert ours == {name: pytest.approx(value, abs=1e-12) for name, value in theirs.items()}


def test_micro_batches_are_one_step() -> None:
    whole, parts = tanh_problem(), tanh_problem()
    ours, theirs = (GradientRegularizer(p.model, gradreg.gnp(r=AUTO, alpha=0.8)) for p in (parts, whole))
    closures = [lambda rows=slice(i, i + 4): parts.loss(rows) / 2 for i in (0, 4)]
    many(parts, ours, 6, closures)
    many(whole, theirs, 6)
    assert_close(values(parts.model), values(whole.model))
    assert ours.state_dict()["radius"]["log_radius"] == pytest.approx(theirs.state_dict()["radius"]["log_radius"], abs=1e-12)


def test_selected_parameters_alone_are_compared() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=AUTO), parameters=lambda name, p: name.startswith("0"))
    plain = plain_gradients(problem)
    regularizer.backward(problem.closure())
    moved = gradients(problem.model)
    mine = [name for name in plain if name.startswith("0")]
    a, b = (torch.cat([g[name].flatten() for name in mine]) for g in (plain, moved))
    assert regularizer.metrics.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-12)


WAITS = ("_local_scalar_dense", "is_nonzero", ".item", "equal")


@pytest.mark.parametrize("name", STEPS)
def test_nothing_waits_for_the_device(name: str, accelerated: bool) -> None:
    penalty = STEPS[name][0]
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, penalty)
    regularizer.backward(problem.closure())
    problem.model.zero_grad()
    with Operations() as step:
        regularizer.backward(problem.closure())
    waited = [n for n in step.names if any(word in n for word in WAITS)]
    assert not (accelerated and waited), waited
    with Operations() as reading:
        assert regularizer.metrics.radius > 0
    assert ("aten._local_scalar_dense.default" in reading.names) == accelerated


@pytest.mark.parametrize("penalty", [gradreg.sam(rho=AUTO), gradreg.gnp(r=AUTO, alpha=0.8)], ids=["sam", "gnp"])
def test_how_many_operations_it_adds(penalty: GradientPenalty, accelerated: bool) -> None:
    """A number that does not depend on how many tensors the model has; on an accelerator the guard takes one for each."""
    few, many = (added(deep_problem(layers), penalty) for layers in (FEW, MANY))
    for extra in (few, many):
        assert (extra.pop("aten.where.self_out", 0) > 0) == accelerated
    assert sum(few.values()) == sum(many.values()), many - few
    assert sum(few.values()) <= (120 if accelerated else 55), few


def test_ascent_closures_are_refused() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=AUTO))
    with pytest.raises(ValueError, match=r"ascent must be None with a radius that sets itself, which compares the two gradients"):
        regularizer.backward(problem.closure(), ascent=problem.closure(slice(4)))
