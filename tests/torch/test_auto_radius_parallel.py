"""A radius that sets itself over several ranks: one radius on all of them, and the gradients that each scope promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import grad
from torch.nn.parallel import DistributedDataParallel

import gradreg
from gradreg import AutoRadius, GradientPenalty
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import Problem, assert_close, gradients
from .ranks import Job, run_ranks
from .test_data_parallel import plain_names, problem_of

STEPS, START = 5, 0.3
AUTO = AutoRadius(target=0.9, start=START, gain=0.1)
PENALTIES = {
    "sam": gradreg.sam(rho=AUTO),
    "gnp": gradreg.gnp(r=AUTO, alpha=0.8),
    "cgr": gradreg.cgr(epsilon=AUTO),
    "gap": gradreg.gsam(rho=AUTO, a=0.3),
}
Run = list[tuple[dict[str, Tensor], float]]
"""The gradient of each step, and the radius."""


def trained(problem: Problem, penalty: GradientPenalty, **options: Any) -> Run:
    regularizer = GradientRegularizer(problem.model, penalty, **options)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    found: Run = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        regularizer.backward(problem.closure())
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in plain_names(gradients(problem.model)).items()}
        found.append((whole, regularizer.metrics.radius))
        optimizer.step()
    return found


def by_ddp(rank: int, world: int, scope: str, options: dict[str, Any]) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for name, penalty in PENALTIES.items():
        problem = problem_of(rank, world)
        found[name] = trained(Problem(DistributedDataParallel(problem.model, **options), problem.x, problem.y), penalty, scope=scope)
    return found


def by_fsdp(rank: int, world: int) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for name, penalty in PENALTIES.items():
        problem = problem_of(rank, world)
        for layer in problem.model:  # type: ignore[attr-defined]
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(problem.model)
        found[name] = trained(problem, penalty)
    return found


class Edge(nn.Module):
    """½‖w‖², and on rank 1 infinite outside of a ball of radius 4."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.w, self.rank = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)), rank

    def forward(self) -> Tensor:
        return 0.5 * self.w.square().sum() * (math.inf if self.rank == 1 and float(self.w.detach().norm()) > 4.0 else 1.0)


def over_the_edge(rank: int, world: int) -> list[tuple[list[float], float]]:
    found = []
    for scope in ("local", "global"):
        for penalty in (gradreg.sam(rho=AutoRadius(start=4.0)), gradreg.cgr(epsilon=AutoRadius(start=4.0))):
            model = DistributedDataParallel(Edge(rank))
            regularizer = GradientRegularizer(model, penalty, scope=scope)  # type: ignore[arg-type]
            regularizer.backward(model)
            found.append((model.module.w.grad.tolist(), regularizer.state_dict()["radius"]["log_radius"]))
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    jobs: dict[str, Job] = {f"local, {name}": (by_ddp, ("local", options)) for name, options in SETTINGS.items()}
    jobs["global"] = (by_ddp, ("global", {}))
    jobs["fsdp"] = (by_fsdp, ())
    jobs["edge"] = (over_the_edge, ())
    return run_ranks(2, jobs, tmp_path_factory.mktemp("two"))


def local_sam(world: int, alpha: float) -> Run:
    """Each rank along its own gradient by one radius, which follows the alignment over all ranks together."""
    parts = [problem_of(rank, world) for rank in range(world)]
    theta, log_radius, found = twins.parameters_of(parts[0].model), math.log(START), []
    for _ in range(STEPS):
        r, sums, results = math.exp(log_radius), torch.zeros(3, dtype=torch.float64), []
        for part in parts:
            loss = twins.loss_of(part.model, part.x, part.y)
            g = grad(loss)(theta)
            moved = grad(loss)(twins.plus(theta, r / twins.norm(g), g))
            results.append(twins.total(twins.scaled(1 - alpha, g), twins.scaled(alpha, moved)))
            sums += torch.stack([sum((a[n] * b[n]).sum() for n in a) for a, b in ((g, g), (g, moved), (moved, moved))])  # type: ignore[misc]
        mean = twins.scaled(1 / world, twins.total(*results))
        found.append((mean, r))
        log_radius += float(torch.clip(0.1 * (sums[1] / (sums[0] * sums[2]).sqrt() - 0.9) / 0.1, -0.1, 0.1))
        theta = twins.plus(theta, -0.05, mean)
    return found


def assert_same(found: Run, expected: Run) -> None:
    for (gradient, radius), (their_gradient, their_radius) in zip(found, expected, strict=True):
        assert_close(gradient, their_gradient, tolerance=1e-10)
        assert radius == pytest.approx(their_radius, rel=1e-10)
    assert found[-1][1] != pytest.approx(START, rel=0.05)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("name", "alpha"), [("sam", 1.0), ("gnp", 0.8)])
def test_local_scope_has_one_radius_for_all_ranks(name: str, alpha: float, setting: str, two_ranks: dict[str, list[Any]]) -> None:
    for found in two_ranks[f"local, {setting}"]:
        assert_same(found[name], local_sam(2, alpha))
        assert [r for _, r in found[name]] == [r for _, r in two_ranks[f"local, {setting}"][0][name]]


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("kind", ["global", "fsdp"])
def test_one_norm_over_all_ranks_is_one_process(kind: str, name: str, two_ranks: dict[str, list[Any]]) -> None:
    expected = trained(problem_of(0, 1), PENALTIES[name])
    for found in two_ranks[kind]:
        assert_same(found[name], expected)


@pytest.mark.parametrize("name", ["cgr", "gap"])
def test_ranks_agree_in_local_scope(name: str, two_ranks: dict[str, list[Any]]) -> None:
    ours, theirs = (found[name] for found in two_ranks["local, plain"])
    assert_same(ours, theirs)
    assert all(torch.equal(a[n], b[n]) for (a, _), (b, _) in zip(ours, theirs, strict=True) for n in a)


def test_an_infinite_loss_on_one_rank_is_one_on_all(two_ranks: dict[str, list[Any]]) -> None:
    for found in two_ranks["edge"]:
        assert found == [([1.0, 2.0], pytest.approx(math.log(2.0)))] * 4
