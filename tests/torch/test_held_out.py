"""``backward(..., held_out=)``: what a step measures, what it leaves alone, and that the switch finds the truth where it is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradreg
from gradreg import LETS, AutoRadius, GradientPenalty, HeldOut
from gradreg.torch import GradientRegularizer, norms

from . import twins
from .cases import Problem, assert_close, assert_same_bits, dropout_batchnorm_problem, gradients, tanh_problem, values
from .ranks import run_ranks

TRAIN, KEPT = slice(0, 5), slice(5, 8)
EVERY = HeldOut(every=1, memory=4)

PENALTIES = {
    "sam": gradreg.sam(rho=0.3),
    "gnp": gradreg.gnp(r=0.3, alpha=0.8),
    "fgr": gradreg.fgr(gamma=0.2, epsilon=0.5),
    "bgr": gradreg.bgr(gamma=0.3, epsilon=0.4),
    "cgr": gradreg.cgr(gamma=0.3, epsilon=0.4),
    "asam": gradreg.asam(rho=0.6, eta=0.1),
    "friendly": gradreg.friendly_sam(rho=0.3, sigma=0.7),
    "gsam": gradreg.gsam(rho=0.3, a=0.4),
    "looksam": gradreg.looksam(rho=0.4, k=1, a=0.7),
    "sam-2-steps": gradreg.sam(rho=0.3, steps=2),
    "auto": gradreg.sam(rho=AutoRadius(start=0.3)),
    "wsam": gradreg.wsam(rho=0.3, gamma=0.6, decoupled=True),
}


@pytest.fixture(params=[False, True], ids=["cpu", "as on an accelerator"])
def accelerated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(norms, "reading_is_free", lambda tensor: False)
    return request.param


def product_of(change: dict[str, Tensor], h: dict[str, Tensor]) -> float:
    return float(twins.inner(change, h))


def gradient(problem: Problem, rows: slice) -> dict[str, Tensor]:
    problem.model.zero_grad()
    problem.loss(rows).backward()
    found = gradients(problem.model)
    problem.model.zero_grad()
    return found


def switch_of(regularizer: GradientRegularizer) -> dict[str, Any]:
    return regularizer.state_dict()["held_out"]


def measured(switch: dict[str, Any]) -> float:
    """The product of the first measurement, by its averages, which are in units of the scale."""
    return switch["mean"] / switch["weight"] * switch["scale"]


def switched_off(problem: Problem, penalty: GradientPenalty, **options: Any) -> GradientRegularizer:
    """A regularizer whose penalty is off, with averages that keep it so."""
    regularizer = GradientRegularizer(problem.model, penalty, **options)
    off = {"mean": -0.5, "square": 0.25, "weight": 1.0, "weight_squares": 0.1, "scale": 1.0, "helps": 0.0, "count": 0, "helps_now": False}
    regularizer.load_state_dict({**regularizer.state_dict(), "held_out": off})
    return regularizer


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_step_measures_the_product_and_is_unchanged(penalty: GradientPenalty, earlier: bool) -> None:
    problem = tanh_problem()
    alone = GradientRegularizer(problem.model, penalty)
    alone.backward(problem.closure(TRAIN))
    expected = gradients(problem.model)
    alone.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.0))
    g, h = gradient(problem, TRAIN), gradient(problem, KEPT)
    change = {name: expected[name] - g[name] for name in g}
    if penalty.decoupled:
        change = {
            n: 1.5 * v - 1.5 * g[n]
            for n, v in twins.sam(
                twins.loss_of(problem.model, problem.x[TRAIN], problem.y[TRAIN]), twins.parameters_of(problem.model), 0.3
            ).items()
        }
    before = values(problem.model)
    if earlier:
        for p in problem.model.parameters():
            p.grad = torch.full_like(p, 3.0)
    regularizer = GradientRegularizer(problem.model, penalty, held_out=HeldOut(memory=4))
    regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT))
    assert_close(gradients(problem.model), {name: v + 3.0 * earlier for name, v in expected.items()})
    regularizer.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.0))
    assert_same_bits(values(problem.model), before)
    state = switch_of(regularizer)
    assert measured(state) == pytest.approx(product_of(change, h), abs=1e-9)
    assert abs(product_of(change, h)) > 1e-3
    assert regularizer.metrics.evaluations == penalty.evaluations_at(0) + 1
    assert (state["count"], state["helps_now"]) == (1, True)


def of_a_plain_step(problem: Problem, regularizer: GradientRegularizer) -> float:
    """What a step costs, in evaluations, which is checked to be plain."""
    g, before = gradient(problem, TRAIN), regularizer.metrics.evaluations
    regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT))
    assert_close(gradients(problem.model), g)
    regularizer.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=1.0))
    assert regularizer.metrics.strength == 0.0
    return regularizer.metrics.evaluations - before


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_that_is_off_gives_the_plain_gradient(penalty: GradientPenalty) -> None:
    """At the step that measures after all its passes, at the others after one."""
    problem = tanh_problem()
    regularizer = switched_off(problem, penalty, held_out=HeldOut(every=3))
    own = penalty.evaluations_at(0)
    assert [of_a_plain_step(problem, regularizer) for _ in range(4)] == [own + 1, 1, 1, own + 1]


WAITING = HeldOut(every=3, steps_per_epoch=7, noise=0.5)


def excess_of(problem: Problem, rule: HeldOut = WAITING, train: slice = TRAIN, kept: slice = KEPT) -> float:
    assert rule.steps_per_epoch is not None
    g, h = gradient(problem, train), gradient(problem, kept)
    return product_of(g, g) - (1 + rule.noise * rule.steps_per_epoch) * product_of(g, h)


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_that_waits_begins_off_and_measures_both(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    expected = excess_of(problem)
    alone = GradientRegularizer(problem.model, penalty, held_out=HeldOut(every=3))
    alone.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT))
    alone.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.0))
    problem.model.zero_grad()
    regularizer = GradientRegularizer(problem.model, penalty, held_out=WAITING)
    own = penalty.evaluations_at(0)
    assert of_a_plain_step(problem, regularizer) == own + 1
    state = switch_of(regularizer)
    assert measured(state) == pytest.approx(measured(switch_of(alone)), abs=1e-12)
    assert measured(state["noise"]) == pytest.approx(expected, rel=1e-9)
    assert (state["noise"]["helps"], state["helps"], state["count"]) == (0.0, 1.0, 1)
    assert [of_a_plain_step(problem, regularizer) for _ in range(3)] == [1, 1, own + 1]


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize(("correction", "noise"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_the_penalty_is_on_where_both_conditions_hold(correction: float, noise: float) -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), held_out=WAITING)
    firm = {"mean": 0.0, "square": 1e6, "weight": 1.0, "weight_squares": 0.1, "scale": 1.0}  # errors that no measurement outweighs
    state = {**firm, "helps": correction, "noise": {**firm, "helps": noise}, "count": 0, "helps_now": correction * noise > 0}
    regularizer.load_state_dict({**regularizer.state_dict(), "held_out": state})
    for _ in range(5):
        regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT))
        assert regularizer.metrics.strength == 0.3 * correction * noise
        assert switch_of(regularizer)["helps"] == correction
        assert switch_of(regularizer)["noise"]["helps"] == noise


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize(("latest", "begins"), [(None, True), (20, True), (5, False)])
def test_it_begins_by_the_latest_step_or_not_at_all(latest: int | None, begins: bool) -> None:
    """The held-out gradient is the training one, so that r is 0, and from the fourth step on its opposite."""
    problem = tanh_problem()
    rule = HeldOut(every=1, memory=4, steps_per_epoch=7, latest=latest)
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), held_out=rule)
    for sign in [1.0] * 3 + [-1.0] * 15:
        regularizer.backward(problem.closure(TRAIN), held_out=lambda sign=sign: sign * problem.loss(TRAIN))
    assert switch_of(regularizer)["noise"]["helps"] == float(begins)


def test_a_penalty_that_waits_needs_held_out_data() -> None:
    problem = tanh_problem()
    with pytest.raises(ValueError, match=r"^held_out must be given with HeldOut\(steps_per_epoch=\.\.\.\), .*; got none"):
        GradientRegularizer(problem.model, gradreg.sam(rho=0.3), held_out=WAITING).backward(problem.closure(TRAIN))
    GradientRegularizer(problem.model, None, held_out=WAITING).backward(problem.closure(TRAIN))
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), held_out=WAITING)
    state = dict.fromkeys(["mean", "square", "weight", "weight_squares", "scale", "helps"], 0.0)
    with pytest.raises(ValueError, match=r"^held_out must be the state of the same rule; got one of a HeldOut without steps_per_epoch"):
        regularizer.load_state_dict({**regularizer.state_dict(), "held_out": {**state, "count": 0, "helps_now": True}})
    other = GradientRegularizer(problem.model, gradreg.sam(rho=0.3))
    with pytest.raises(ValueError, match=r"^held_out must be the state of the same rule; got one of a HeldOut with steps_per_epoch"):
        other.load_state_dict({**other.state_dict(), "held_out": {**state, "noise": state, "count": 0, "helps_now": True}})
    with pytest.raises(ValueError, match=r"^held_out\.noise must hold mean and square"):
        regularizer.load_state_dict({**regularizer.state_dict(), "held_out": {**state, "noise": {}, "count": 0, "helps_now": True}})


def of_a_regression(samples: int, steps: int, seed: int) -> list[float]:
    """Of each tenth of the steps, how much of it the second condition held: 40 weights fitted to noisy labels, in batches of 20."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 40, dtype=torch.float64, generator=draw)
    y, size = x.sum(1) + 3 * torch.randn(samples, dtype=torch.float64, generator=draw), 20
    model = nn.Linear(40, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    regularizer = GradientRegularizer(model, gradreg.sam(rho=0.01), held_out=HeldOut(every=2, steps_per_epoch=samples // size))
    order, on = torch.arange(samples), list[float]()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (model(x).squeeze(1) - y).square().mean() / 2

    for step in range(steps):
        if step % (samples // size) == 0:
            order = torch.randperm(samples, generator=draw)
        rows = order[step % (samples // size) * size :][:size]
        fresh = torch.randn(size, 40, dtype=torch.float64, generator=draw)
        wanted = fresh.sum(1) + 3 * torch.randn(size, dtype=torch.float64, generator=draw)
        optimizer.zero_grad()
        regularizer.backward(lambda rows=rows: loss(x[rows], y[rows]), held_out=lambda a=fresh, b=wanted: loss(a, b))
        on.append(switch_of(regularizer)["noise"]["helps"])
        optimizer.step()
    tenth = steps // 10
    return [sum(on[i : i + tenth]) / tenth for i in range(0, steps, tenth)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_it_waits_until_the_samples_are_used_up(seed: int) -> None:
    """40 samples for 40 weights are learned by heart; of 20,000, of which each is seen at most once, none is."""
    few, many = (of_a_regression(samples, 200, seed) for samples in (40, 20_000))
    assert min(few[2:]) > 0.9
    assert max(many) < 0.1


def test_a_decision_holds_from_the_next_measurement_on() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), held_out=HeldOut(every=3))
    nearly = {
        "mean": -5e3,
        "square": 2.5e7,
        "weight": 1.0,
        "weight_squares": 0.1,
        "scale": 1.0,
        "helps": 1.0,
        "count": 0,
        "helps_now": True,
    }
    regularizer.load_state_dict({**regularizer.state_dict(), "held_out": nearly})
    strengths: list[float] = []
    for _ in range(4):
        regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT))
        strengths.append(regularizer.metrics.strength)
        assert switch_of(regularizer)["helps"] == 0.0
    assert strengths == [0.3, 0.3, 0.3, 0.0]


def test_micro_batches_count_together() -> None:
    problem = tanh_problem()
    whole, each = (GradientRegularizer(problem.model, gradreg.sam(rho=0.3)) for _ in range(2))
    halves: list[Callable[[], Tensor]] = [lambda i=i: problem.loss(slice(2 * i, 2 * i + 2)) / 2 for i in range(2)]
    kept: list[Callable[[], Tensor]] = [lambda: problem.loss(KEPT) / 4, lambda: 3 * problem.loss(KEPT) / 4]
    g, h = gradient(problem, slice(0, 4)), gradient(problem, KEPT)
    pairs: list[tuple[GradientRegularizer, dict[str, Any]]] = [(whole, {}), (each, {"perturb": "each"})]
    for regularizer, options in pairs:
        problem.model.zero_grad()
        regularizer.backward(halves, held_out=kept, **options)
        change = {name: v - g[name] for name, v in gradients(problem.model).items()}
        state = switch_of(regularizer)
        assert measured(state) == pytest.approx(product_of(change, h), abs=1e-9)
    assert measured(switch_of(whole)) != pytest.approx(measured(switch_of(each)), abs=1e-6)


def test_held_out_data_change_neither_buffers_nor_random_numbers() -> None:
    """Three steps with dropout and BatchNorm are, bit for bit, those without a look at held-out data."""
    found: list[tuple[dict[str, Tensor], Tensor]] = []
    for looks in (False, True):
        problem = dropout_batchnorm_problem()
        regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), held_out=EVERY)
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.01)
        torch.manual_seed(4)
        for _ in range(3):
            optimizer.zero_grad()
            regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT) if looks else None)
            optimizer.step()
        found.append((values(problem.model), torch.random.get_rng_state()))
    assert_same_bits(found[1][0], found[0][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("rho", [0.3, LETS()], ids=["switch", "lets"])
def test_a_held_out_closure_that_raises_leaves_everything_as_it_was(rho: Any) -> None:
    problem = tanh_problem()
    before = values(problem.model)
    for p in problem.model.parameters():
        p.grad = torch.full_like(p, 2.0)
    held = gradients(problem.model)
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=rho))
    state = regularizer.state_dict()

    def failing() -> Tensor:
        raise KeyError("no more data")

    with pytest.raises(KeyError, match="no more data"):
        regularizer.backward(problem.closure(TRAIN), held_out=failing)
    assert_same_bits(values(problem.model), before)
    assert_same_bits(gradients(problem.model), held)
    assert regularizer.state_dict() == state


def test_a_loss_scale_does_not_enter_and_an_overflow_is_no_measurement() -> None:
    problem = tanh_problem()
    h, g = gradient(problem, KEPT), gradient(problem, TRAIN)

    class Scaling:
        factor = 1024.0

        def scale(self, outputs: Tensor) -> Tensor:
            return self.factor * outputs

    regularizer, scaler = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), held_out=EVERY), Scaling()
    regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT), scaler=scaler)
    change = {name: v / 1024 - g[name] for name, v in gradients(problem.model).items()}
    state = switch_of(regularizer)
    assert measured(state) == pytest.approx(product_of(change, h), abs=1e-9)
    scaler.factor = math.inf
    problem.model.zero_grad()
    regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT), scaler=scaler)
    assert not all(torch.isfinite(p.grad).all() for p in problem.model.parameters())  # type: ignore[arg-type]  # so that the step is skipped
    assert switch_of(regularizer) == {**state, "count": 2}


@pytest.mark.usefixtures("accelerated")
def test_a_loss_scale_does_not_enter_the_second_condition() -> None:
    problem = tanh_problem()
    rule = HeldOut(every=1, memory=4, steps_per_epoch=7, noise=0.5)
    expected = excess_of(problem, rule)

    class Scaling:
        def scale(self, outputs: Tensor) -> Tensor:
            return 1024.0 * outputs

    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), held_out=rule)
    regularizer.backward(problem.closure(TRAIN), held_out=problem.closure(KEPT), scaler=Scaling())
    assert measured(switch_of(regularizer)["noise"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("penalty", "options", "message"),
    [
        (gradreg.msam(rho=0.3), {}, "^held_out must be left out where no pass gives the plain gradient"),
        (gradreg.exact(gamma=0.3), {}, "^held_out must be left out where no pass gives the plain gradient"),
        (gradreg.sam(rho=0.3), {"ascent": lambda: torch.zeros(())}, "^held_out must be left out where no pass gives the plain"),
    ],
)
def test_what_it_refuses(penalty: GradientPenalty, options: dict[str, Any], message: str) -> None:
    problem = tanh_problem()
    with pytest.raises(ValueError, match=message):
        GradientRegularizer(problem.model, penalty).backward(problem.closure(TRAIN), held_out=problem.closure(KEPT), **options)


def test_wrong_kinds_are_told() -> None:
    problem = tanh_problem()
    with pytest.raises(TypeError, match=r"^held_out must be a HeldOut or None; got .*The closures belong to backward"):
        GradientRegularizer(problem.model, gradreg.sam(), held_out=problem.closure())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^held_out must be a callable or a non-empty"):
        GradientRegularizer(problem.model, gradreg.sam()).backward(problem.closure(), held_out=3)  # type: ignore[arg-type]
    regularizer = GradientRegularizer(problem.model, gradreg.sam())
    with pytest.raises(ValueError, match=r"^held_out must hold mean and square .*; got \["):
        regularizer.load_state_dict({**regularizer.state_dict(), "held_out": {"mean": 0.0}})
    plain = GradientRegularizer(problem.model, None)
    plain.backward(problem.closure(), held_out=problem.closure())
    assert plain.metrics.evaluations == 1


class Valley(nn.Module):
    """½e²ᵇ(a − ξ)² with a target ξ of −1 or 1 that differs from batch to batch: in its valley along b a penalty drives to the flat side.

    Held-out data want b near ``wanted``, noisily: whether the penalty helps is a matter of which side of it the training ends on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

    def fit(self, noise: Tensor) -> Tensor:
        return 0.5 * torch.exp(2 * self.b) * (self.a - noise.sign()).square() + 0.5 * (self.b - 0.5).square()

    def held_out(self, noise: Tensor, wanted: float) -> Tensor:
        return 0.5 * (self.a - noise).square() + 0.5 * (self.b - wanted + 3.0 * noise).square()


def shares_on(penalty: GradientPenalty, seed: int, wanted: Callable[[int], float], steps: int = 450, rule: HeldOut | None = None):
    """Of each third of the steps, the share at which the penalty was on; and b at the end."""
    draw, model = torch.Generator().manual_seed(seed), Valley()
    regularizer = GradientRegularizer(model, penalty, held_out=rule or HeldOut(every=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    on: list[float] = []
    for step in range(steps):
        noise, other = torch.randn(2, dtype=torch.float64, generator=draw)
        optimizer.zero_grad()
        to = wanted(step)
        regularizer.backward(lambda n=noise: model.fit(n), held_out=lambda n=other, to=to: model.held_out(n, to))
        on.append(float(regularizer.metrics.strength > 0))
        optimizer.step()
    third = steps // 3
    return [sum(on[i : i + third]) / third for i in range(0, steps, third)], float(model.b.detach())


VALLEY = {"sam": gradreg.sam(rho=0.2), "fgr": gradreg.fgr(gamma=0.1, epsilon=0.1), "auto": gradreg.auto()}


@pytest.mark.slow
@pytest.mark.parametrize("penalty", VALLEY.values(), ids=VALLEY)
@pytest.mark.parametrize("seed", range(2))
def test_a_penalty_that_hurts_goes_and_one_that_helps_stays(penalty: GradientPenalty, seed: int) -> None:
    helped, flat = shares_on(penalty, seed, lambda step: -3.0, steps=300)
    hurt, sharp = shares_on(penalty, seed, lambda step: 3.0, steps=300)
    assert min(helped) > 0.9
    assert hurt[2] < 0.1
    assert flat < sharp


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_it_comes_back_when_it_begins_to_help(seed: int) -> None:
    shares, _ = shares_on(VALLEY["sam"], seed, lambda step: 3.0 if step < 150 else -3.0)
    assert shares[0] < 0.6
    assert shares[2] > 0.9


@pytest.mark.parametrize("rule", [HeldOut(every=5), HeldOut(every=5, steps_per_epoch=2)], ids=["acts", "waits"])
def test_a_resumed_run_goes_on_as_if_it_had_not_ended(rule: HeldOut) -> None:
    """In the middle of a pause between two measurements, with a decision that does not hold yet."""
    found: list[dict[str, Any]] = []
    for stop in (None, 43, 45):
        draw, model = torch.Generator().manual_seed(0), Valley()
        regularizer = GradientRegularizer(model, VALLEY["sam"], held_out=rule)
        for step in range(90):
            if step == stop:
                state, regularizer = regularizer.state_dict(), GradientRegularizer(model, VALLEY["sam"], held_out=rule)
                regularizer.load_state_dict(state)
            noise, other = torch.randn(2, dtype=torch.float64, generator=draw)
            model.zero_grad()
            regularizer.backward(lambda m=model, n=noise: m.fit(n), held_out=lambda m=model, n=other: m.held_out(n, 3.0))
            torch.optim.SGD(model.parameters(), lr=0.05).step()
        switch = {**switch_of(regularizer)}
        noise = {f"noise.{k}": v for k, v in switch.pop("noise", {}).items()}
        found.append({**values(model), **{k: torch.tensor(float(v)) for k, v in {**switch, **noise}.items()}})
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])
    assert found[0]["helps_now"] == 0.0


def on_ranks(
    rank: int, world: int, penalty: GradientPenalty, scope: str, every_second: bool, waits: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    problem = tanh_problem()
    rows, kept = slice(rank * 2, rank * 2 + 2), slice(4 + rank * 2, 6 + rank * 2)
    here = Problem(DistributedDataParallel(problem.model), problem.x, problem.y)
    rule = HeldOut(every=2, steps_per_epoch=7, noise=0.5) if waits else HeldOut(every=2 if every_second else 1)
    regularizer = GradientRegularizer(here.model, penalty, scope=scope, held_out=rule)  # type: ignore[arg-type]
    if every_second:  # off, so that the steps give the plain gradient
        off = {
            "mean": -0.5,
            "square": 0.25,
            "weight": 1.0,
            "weight_squares": 0.1,
            "scale": 1.0,
            "helps": 0.0,
            "count": 0,
            "helps_now": False,
        }
        regularizer.load_state_dict({**regularizer.state_dict(), "held_out": off})
    regularizer.backward(here.closure(rows), held_out=here.closure(kept))
    return switch_of(regularizer), {name.removeprefix("module."): g for name, g in gradients(here.model).items()}


@pytest.mark.slow
def test_under_data_parallelism_all_ranks_measure_the_same(tmp_path: Path) -> None:
    """What the averaged gradients say: of the result, of the plain gradient, and of the held-out losses."""
    penalty = gradreg.fgr(gamma=0.2, epsilon=0.5)
    cases: dict[str, Any] = {f"{scope}-{off}": (on_ranks, (penalty, scope, off)) for scope in ("local", "global") for off in (False, True)}
    cases |= {f"{scope}-waits": (on_ranks, (penalty, scope, False, True)) for scope in ("local", "global")}
    found = run_ranks(2, cases, tmp_path)
    problem = tanh_problem()
    theta = twins.parameters_of(problem.model)
    halves = [twins.loss_of(problem.model, problem.x[i : i + 2], problem.y[i : i + 2]) for i in (0, 2)]
    g, h = gradient(problem, slice(0, 4)), gradient(problem, slice(4, 8))
    whole = twins.loss_of(problem.model, problem.x[:4], problem.y[:4])
    for scope in ("local", "global"):
        expected = twins.family(penalty, halves if scope == "local" else [whole], theta)
        change = {name: expected[name] - g[name] for name in g}
        for off in (False, True):
            ours, theirs = found[f"{scope}-{off}"]
            assert ours[0] == theirs[0]
            for _, result in (ours, theirs):
                assert_close(result, g if off else expected)
        assert measured(found[f"{scope}-False"][0][0]) == pytest.approx(product_of(change, h), abs=1e-9)
        ours, theirs = found[f"{scope}-waits"]
        assert ours[0] == theirs[0]
        assert measured(ours[0]["noise"]) == pytest.approx(product_of(g, g) - (1 + 0.5 * 7) * product_of(g, h), abs=1e-9)
        for _, result in (ours, theirs):
            assert_close(result, g)
