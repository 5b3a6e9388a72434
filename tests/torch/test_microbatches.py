"""``backward(closures, perturb="each")``: every micro-batch has a perturbation of its own, as ranks with local scope have."""

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
from gradreg import AutoRadius, GradientPenalty
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import (
    DURING_WARMUP,
    PENALTIES,
    Problem,
    assert_close,
    assert_same_bits,
    calls_at,
    dropout_batchnorm_problem,
    gradients,
    regularizer_at,
    tanh_problem,
    values,
)
from .ranks import run_ranks
from .test_data_parallel import average_and_count

PARTS = 4
SIZE = 2


def takes_each(penalty: GradientPenalty) -> bool:
    try:
        penalty.check_each()
    except ValueError:
        return False
    return True


EACH = {name: penalty for name, penalty in PENALTIES.items() if takes_each(penalty)}


def rows_of(part: int) -> slice:
    return slice(part * SIZE, (part + 1) * SIZE)


def closures_of(problem: Problem, parts: int = PARTS) -> list[Callable[[], Tensor]]:
    return [lambda i=i: problem.loss(rows_of(i)) / parts for i in range(parts)]


def losses_of(problem: Problem, parts: int = PARTS) -> list[twins.Loss]:
    return [twins.loss_of(problem.model, problem.x[rows_of(i)], problem.y[rows_of(i)]) for i in range(parts)]


@pytest.mark.slow
@pytest.mark.parametrize("penalty", EACH.values(), ids=EACH)
@pytest.mark.parametrize("earlier", [False, True])
def test_the_mean_of_what_each_micro_batch_gives(penalty: GradientPenalty, earlier: bool) -> None:
    problem = tanh_problem()
    expected = twins.family(penalty, losses_of(problem), twins.parameters_of(problem.model), step=DURING_WARMUP)
    regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
    before, calls = values(problem.model), [0] * PARTS
    if earlier:
        for p in problem.model.parameters():
            p.grad = torch.full_like(p, 3.0)

    def counted(i: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            assert regularizer.repeats_pass == (calls[i] > 0)
            calls[i] += 1
            return problem.loss(rows_of(i)) / PARTS

        return closure

    loss = regularizer.backward([counted(i) for i in range(PARTS)], perturb="each")
    assert_close(gradients(problem.model), {name: g + 3.0 * earlier for name, g in expected.items()})
    assert_same_bits(values(problem.model), before)
    assert float(loss.detach()) == pytest.approx(float(problem.loss().detach()))
    assert calls == [calls_at(DURING_WARMUP, penalty)] * PARTS
    assert regularizer.metrics.evaluations == penalty.evaluations_at(DURING_WARMUP)
    if penalty.at(DURING_WARMUP).acts:  # else it is the norm of the whole gradient, as without a penalty
        theta = twins.parameters_of(problem.model)
        norms = [float(twins.norm(torch.func.grad(own)(theta))) for own in losses_of(problem)]
        if not earlier or penalty.plan(penalty.at(DURING_WARMUP)).passes[0].gives_direction:
            assert regularizer.metrics.gradient_norm == pytest.approx(sum(norms) / PARTS)


def test_it_is_another_gradient_than_that_of_one_perturbation() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3))
    found: dict[str, dict[str, Tensor]] = {}
    for perturb in ("all", "each"):
        problem.model.zero_grad()
        regularizer.backward(closures_of(problem), perturb=perturb)  # type: ignore[arg-type]
        found[perturb] = gradients(problem.model)
    assert max(float((found["each"][n] - found["all"][n]).abs().max()) for n in found["all"]) > 1e-3


def test_one_closure_alone_is_both() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.fgr(gamma=0.2, epsilon=0.5))
    regularizer.backward(problem.closure())
    expected = gradients(problem.model)
    for given in (problem.closure(), [problem.closure()]):
        problem.model.zero_grad()
        regularizer.backward(given, perturb="each")
        assert_same_bits(gradients(problem.model), expected)


def test_aux_cosine_and_a_loss_scale() -> None:
    problem = tanh_problem()
    penalty = gradreg.fgr(gamma=0.2, epsilon=0.5)
    expected = twins.family(penalty, losses_of(problem), twins.parameters_of(problem.model))

    class Doubling:
        def scale(self, outputs: Tensor) -> Tensor:
            return 1024.0 * outputs

    regularizer = GradientRegularizer(problem.model, penalty, measure_cosine=True)
    closures = [lambda i=i, c=c: (c(), torch.tensor(i)) for i, c in enumerate(closures_of(problem))]
    loss, aux = regularizer.backward(closures, has_aux=True, perturb="each", scaler=Doubling())
    assert [int(a) for a in aux] == [0, 1, 2, 3]
    assert_close(gradients(problem.model), {name: 1024.0 * g for name, g in expected.items()})
    assert float(loss) == pytest.approx(float(problem.loss().detach()))
    theta, cosines = twins.parameters_of(problem.model), []
    for own in losses_of(problem):
        g = torch.func.grad(own)(theta)
        moved = torch.func.grad(own)(twins.plus(theta, 0.5, g))
        cosines.append(float(twins.inner(g, moved) / (twins.norm(g) * twins.norm(moved))))
    assert regularizer.metrics.cosine == pytest.approx(sum(cosines) / PARTS)


def test_shares_are_the_means_of_the_micro_batches() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), measure_shares=True)
    regularizer.backward(closures_of(problem), perturb="each")
    theta, expected = twins.parameters_of(problem.model), dict.fromkeys((name for name, _ in problem.model.named_parameters()), 0.0)
    for own in losses_of(problem):
        g = torch.func.grad(own)(theta)
        for name in expected:
            expected[name] += float(g[name].square().sum() / twins.norm(g) ** 2) / PARTS
    assert regularizer.metrics.shares == pytest.approx(expected)


@pytest.mark.parametrize("fail_at", [1, 3, 6, 8])
def test_a_step_that_raises_leaves_everything_as_it_was(fail_at: int) -> None:
    problem, calls = tanh_problem(), [0]

    def failing(i: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            calls[0] += 1
            if calls[0] == fail_at:
                raise KeyError("on the way")
            return problem.loss(rows_of(i))

        return closure

    before = values(problem.model)
    for p in problem.model.parameters():
        p.grad = torch.full_like(p, 2.0)
    held = gradients(problem.model)
    regularizer = GradientRegularizer(problem.model, gradreg.gnp(r=0.3, alpha=0.8))
    with pytest.raises(KeyError, match="on the way"):
        regularizer.backward([failing(i) for i in range(PARTS)], perturb="each")
    assert_same_bits(values(problem.model), before)
    assert_same_bits(gradients(problem.model), held)
    assert regularizer.step == 0


def test_state_and_random_numbers_are_those_of_plain_micro_batches() -> None:
    """At a radius of nearly 0 the step is the plain one: same masks in both passes of a micro-batch, running statistics of the first."""
    plain, regularized = dropout_batchnorm_problem(), dropout_batchnorm_problem()
    for problem, penalty in ((plain, None), (regularized, gradreg.sam(rho=1e-9))):
        regularizer = GradientRegularizer(problem.model, penalty)
        torch.manual_seed(5)
        for _ in range(2):
            problem.model.zero_grad()
            regularizer.backward(closures_of(problem), perturb="each")
    assert_close(gradients(regularized.model), gradients(plain.model), tolerance=1e-6)
    assert_same_bits(values(regularized.model), values(plain.model))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    GradientRegularizer(plain.model, None).backward(closures_of(plain))
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    GradientRegularizer(regularized.model, gradreg.sam(rho=0.3)).backward(closures_of(regularized), perturb="each")
    assert torch.equal(torch.random.get_rng_state(), after)


@pytest.mark.parametrize("penalty", [gradreg.sam(rho=AutoRadius(start=0.3, target=0.9)), gradreg.auto(target=0.9)], ids=["sam", "fgr"])
def test_a_radius_that_sets_itself_follows_the_mean(penalty: GradientPenalty) -> None:
    """The measurements of all micro-batches, of their own losses, are averaged before the rule is asked once."""
    problem = tanh_problem()
    regularizer, radius = GradientRegularizer(problem.model, penalty), 0.3 if penalty.power == 1 else 0.05
    theta, sums = twins.parameters_of(problem.model), torch.zeros(3, dtype=torch.float64)
    for own in losses_of(problem):
        g = torch.func.grad(own)(theta)
        moved = torch.func.grad(own)(twins.plus(theta, radius / twins.norm(g) if penalty.power == 1 else radius, g))
        sums += torch.stack([twins.inner(g, g), twins.inner(g, moved), twins.inner(moved, moved)])
    change = 0.05 * (float(sums[1] / (sums[0] * sums[2]).sqrt()) - 0.9) / 0.1
    regularizer.backward(closures_of(problem), perturb="each")
    state = regularizer.state_dict()["radius"]
    assert state["steps"] == 1
    assert state["log_radius"] == pytest.approx(math.log(radius) + min(0.05, max(-0.05, change)), abs=1e-12)


@pytest.mark.parametrize(
    ("penalty", "options", "message"),
    [
        (gradreg.friendly_sam(rho=0.3), {}, "^perturb must be 'all' for a penalty with memory.*friendly.*memory"),
        (gradreg.looksam(rho=0.3), {}, "^perturb must be 'all' for a penalty with memory"),
        (gradreg.gsam(rho=0.3, a=0.3), {}, "^perturb must be 'all' for a penalty with memory, or that mixes.*mixing="),
        (gradreg.gnp(r=0.3, alpha=0.8, mixing="unit"), {}, "^perturb must be 'all' for .*mixing='unit'"),
        (gradreg.wsam(rho=0.3, gamma=0.8, decoupled=True), {}, "^perturb must be 'all' for .*decoupled"),
        (gradreg.random_sam(rho=0.3), {}, "^perturb must be 'all' for a direction that needs no gradient"),
        (gradreg.sam(rho=0.3), {"perturb": "eachh"}, "^unknown perturb 'eachh'. Did you mean 'each'"),
        (gradreg.sam(rho=0.3), {"ascent": lambda: torch.zeros(())}, "^perturb must be 'all' with ascent"),
        (gradreg.sam(rho=0.3), {"scope": "global"}, "^perturb must be 'all' with scope='global'"),
    ],
)
def test_what_it_refuses(penalty: GradientPenalty, options: dict[str, Any], message: str) -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, penalty, scope=options.get("scope", "local"))
    with pytest.raises(ValueError, match=message):
        regularizer.backward(closures_of(problem), **{"perturb": "each", **{k: v for k, v in options.items() if k != "scope"}})


BATCH_OF_A_RANK = 2 * SIZE


def on_ranks(rank: int, world: int, penalty: GradientPenalty) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    problem = tanh_problem()
    rows = slice(rank * BATCH_OF_A_RANK, (rank + 1) * BATCH_OF_A_RANK)
    here = Problem(DistributedDataParallel(problem.model), problem.x[rows], problem.y[rows])
    buckets: list[int] = []

    here.model.register_comm_hook(buckets, average_and_count)  # type: ignore[operator]
    regularizer = GradientRegularizer(here.model, penalty)
    regularizer.backward(closures_of(here, 2), perturb="each")
    state = regularizer.state_dict()
    return {name.removeprefix("module."): g for name, g in gradients(here.model).items()}, len(buckets), state


ON_RANKS = {
    "sam": gradreg.sam(rho=0.3),
    "gnp": gradreg.gnp(r=0.3, alpha=0.8),
    "fgr": gradreg.fgr(gamma=0.2, epsilon=0.5),
    "cgr": gradreg.cgr(gamma=0.3, epsilon=0.4),
    "exact": gradreg.exact(gamma=0.3),
}


@pytest.mark.slow
def test_under_data_parallelism_it_takes_one_all_reduce(tmp_path: Path) -> None:
    jobs = {name: (on_ranks, (penalty,)) for name, penalty in ON_RANKS.items()}
    auto = gradreg.sam(rho=AutoRadius(start=0.3))
    found = run_ranks(2, {**jobs, "auto": (on_ranks, (auto,))}, tmp_path)
    problem = tanh_problem()
    for name, penalty in {**ON_RANKS, "auto": gradreg.sam(rho=0.3)}.items():
        expected = twins.family(penalty, losses_of(problem), twins.parameters_of(problem.model))
        for gradient, all_reduces, _ in found[name]:
            assert_close(gradient, expected)
            assert all_reduces == (0 if name == "auto" else 1), name  # that of a measured step comes after its last pass
    assert found["auto"][0][2] == found["auto"][1][2]
    alone = GradientRegularizer(problem.model, auto)
    alone.backward(closures_of(problem), perturb="each")
    assert found["auto"][0][2]["radius"]["log_radius"] == pytest.approx(alone.state_dict()["radius"]["log_radius"], abs=1e-12)


class Cliff(nn.Module):
    """½‖w − x‖² within a distance of 4 from 0, infinite outside."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, x: float) -> Tensor:
        inside = 0.5 * (self.w - x).square().sum()
        return inside if float(self.w.detach().norm()) < 4.0 else inside * torch.inf


def test_only_the_micro_batch_that_left_the_loss_gives_its_plain_gradient() -> None:
    """From (1, 2), four further along the gradient at x = 0 ends outside; at x = 3 it points inward, and ends inside."""
    model = Cliff()
    regularizer = GradientRegularizer(model, gradreg.sam(rho=AutoRadius(start=4.0)))
    regularizer.backward([lambda x=x: model(x) / 2 for x in (0.0, 3.0)], perturb="each")
    inside = torch.tensor([-2.0, -1.0], dtype=torch.float64)
    moved = inside + 4.0 * inside / inside.norm()
    assert float((model.w.detach() + 4.0 * inside / inside.norm()).norm()) < 4.0
    assert_close(gradients(model), {"w": (torch.tensor([1.0, 2.0], dtype=torch.float64) + moved) / 2})
