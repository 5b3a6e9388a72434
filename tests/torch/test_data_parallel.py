"""``DistributedDataParallel``: both scopes against one process that computes what each of them promises, and the all-reduces they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import DURING_WARMUP, PENALTIES, Problem, assert_close, calls_at, gradients, regularizer_at, tanh_problem, values
from .ranks import Job, run_ranks

BATCH = 12
FORWARD = {n: p for n, p in PENALTIES.items() if p.difference != "exact"}


def problem_of(rank: int, world: int, model: nn.Module | None = None) -> Problem:
    """The part of one batch of 12 that ``rank`` sees."""
    whole = tanh_problem()
    torch.manual_seed(3)
    x, y = torch.randn(BATCH, 3, dtype=torch.float64), 2 * torch.randn(BATCH, 2, dtype=torch.float64)
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return Problem(model if model is not None else whole.model, x[rows], y[rows])


def plain_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in found.items()}


def ddp(problem: Problem, **options: Any) -> Problem:
    return Problem(DistributedDataParallel(problem.model, **options), problem.x, problem.y)


def average_and_count(count, bucket):
    """A communication hook: DDP's own average, adding to ``count`` one entry a bucket (here, an all-reduce)."""
    count.append(1)
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def part_of(problem: Problem, rows: slice, parts: int) -> Callable[[], Tensor]:
    return lambda: problem.loss(rows) / parts


def every_penalty_here(rank: int, world: int, scope: str, options: dict[str, Any], micro_batches: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, penalty in PENALTIES.items():
        problem = ddp(problem_of(rank, world), **options)
        all_reduces: list[int] = []
        problem.model.register_comm_hook(all_reduces, average_and_count)  # type: ignore[operator]
        before = values(problem.model)
        rows = len(problem.x) // micro_batches
        closures = [part_of(problem, slice(i * rows, (i + 1) * rows), micro_batches) for i in range(micro_batches)]
        regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty, scope=scope)
        regularizer.backward(closures)
        same = all(torch.equal(v, before[n]) for n, v in values(problem.model).items())
        once, times = plain_names(gradients(problem.model)), len(all_reduces)
        regularizer.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.0))
        problem.model.zero_grad()
        regularizer.backward(closures)
        found[name] = (once, plain_names(gradients(problem.model)), times, same)
    return found


def expected_local(world: int) -> dict[str, list[dict[str, Tensor]]]:
    """The mean over ranks of the gradients that each finds along its own direction; what is mixed or remembered are the means."""
    model = tanh_problem().model
    theta = twins.parameters_of(model)
    losses = [twins.loss_of(model, problem.x, problem.y) for problem in (problem_of(rank, world) for rank in range(world))]
    return {name: two_steps(penalty, losses, theta) for name, penalty in PENALTIES.items()}


def two_steps(penalty: GradientPenalty, losses: list[twins.Loss], theta: twins.Parameters) -> list[dict[str, Tensor]]:
    """At parameters that stay: of the second step only what is remembered, drawn and scheduled is different."""
    memory = twins.Remembered()
    return [twins.family(penalty, losses, theta, step=step, memory=memory) for step in (DURING_WARMUP, DURING_WARMUP + 1)]


def expected_global() -> dict[str, list[dict[str, Tensor]]]:
    """The regularized gradients of the whole batch in one process."""
    problem = problem_of(0, 1)
    theta, loss = twins.parameters_of(problem.model), twins.loss_of(problem.model, problem.x, problem.y)
    return {name: two_steps(penalty, [loss], theta) for name, penalty in PENALTIES.items()}


def earlier_gradients(rank: int, world: int, scope: str, bucket_view: bool) -> list[dict[str, Tensor]]:
    found = []
    for penalty in FORWARD.values():
        problem = ddp(problem_of(rank, world), gradient_as_bucket_view=bucket_view)
        regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty, scope=scope)
        regularizer.backward(problem.closure())
        once = gradients(problem.model)
        regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty, scope=scope)
        regularizer.backward(problem.closure())
        found.append({n: g - 2 * once[n] for n, g in gradients(problem.model).items()})
    return found


class Branches(nn.Module):
    """Rank 0 uses one branch, rank 1 the other; the third is used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = (nn.Linear(3, 2).double() for _ in range(3))

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return torch.tanh((self.first if rank == 0 else self.second)(x))


def branches(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    problem = problem_of(rank, world)
    penalty = gradreg.gnp(r=0.3, alpha=0.8)
    alone = Branches()
    GradientRegularizer(alone, penalty).backward(lambda: nn.functional.mse_loss(alone(problem.x, rank), problem.y))
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    GradientRegularizer(model, penalty).backward(lambda: nn.functional.mse_loss(model(problem.x, rank), problem.y))
    return gradients(alone), plain_names(gradients(model))


def batch_statistics(rank: int, world: int, penalty_name: str | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double())
    problem = problem_of(rank, world, model)
    # No learning: the parameters stay, so that plain training and a penalty see the same first passes.
    for _ in range(3):
        if penalty_name is None:
            problem.loss().backward()
        else:
            regularizer_at(DURING_WARMUP, model, PENALTIES[penalty_name]).backward(problem.closure())
    return values(model)


def overflow_on_one_rank(rank: int, world: int, name: str) -> tuple[bool, float]:
    torch.manual_seed(0)
    model = DistributedDataParallel(tanh_problem(torch.float32).model)
    problem = problem_of(rank, world, model)
    x, y = problem.x.float(), problem.y.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before, calls = values(model), []

    def closure() -> Tensor:
        calls.append(rank)
        return nn.functional.mse_loss(model(x), y) * (1e36 if rank == 1 and len(calls) == 1 else 1.0)

    regularizer_at(DURING_WARMUP, model, PENALTIES[name]).backward(closure, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    return all(torch.equal(v, before[n]) for n, v in values(model).items()), scaler.get_scale()


def refusals(rank: int, world: int) -> list[str]:
    problem = ddp(problem_of(rank, world))
    messages = []
    for name in ("sam", "exact"):
        regularizer = regularizer_at(DURING_WARMUP, problem.model, PENALTIES[name], scope="global")
        try:
            with problem.model.no_sync():
                regularizer.backward(problem.closure())
        except ValueError as error:
            messages.append(str(error))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double())
    try:
        DistributedDataParallel(synchronised)
    except ValueError as error:
        messages.append(str(error))
    return messages


SCOPES = ("local", "global")
SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    "whole batch": ({}, 1),
    "micro-batches": ({}, 3),
    "bucket views": ({"gradient_as_bucket_view": True}, 1),
    "find unused": ({"find_unused_parameters": True}, 1),
}
BUFFERED = ("sam", "gnp", "fgr-mixing", "bgr", "cgr", "exact")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    jobs: dict[str, Job] = {}
    for scope in SCOPES:
        for name, (options, micro_batches) in SETTINGS.items():
            jobs[f"{scope}, {name}"] = (every_penalty_here, (scope, options, micro_batches))
        for view in (False, True):
            jobs[f"earlier, {scope}, {view}"] = (earlier_gradients, (scope, view))
    jobs["branches"] = (branches, ())
    for name in (None, *BUFFERED):
        jobs[f"statistics, {name}"] = (batch_statistics, (name,))
    for name in ("sam", "fgr-mixing"):
        jobs[f"overflow, {name}"] = (overflow_on_one_rank, (name,))
    jobs["refusals"] = (refusals, ())
    return run_ranks(2, jobs, tmp_path_factory.mktemp("two"))


def check_scope(scope: str, world: int, results: list[dict[str, Any]]) -> None:
    expected = expected_local(world) if scope == "local" else expected_global()
    for found in results:
        for name, (gradient, next_gradient, all_reduces, restored) in found.items():
            assert_close(gradient, expected[name][0])
            assert_close(next_gradient, expected[name][1])
            assert restored, name
            # Averages for double backprop, and of what is remembered or mixed, are not DDP's own and are not counted here.
            ascents = calls_at(DURING_WARMUP, PENALTIES[name]) - (2 if PENALTIES[name].difference == "central" else 1)
            ascents = ascents if PENALTIES[name].direction.needs_gradient else 0
            assert all_reduces == 1 + (0 if scope == "local" else max(0, ascents)), name


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("scope", SCOPES)
def test_both_scopes_are_what_they_promise(scope: str, setting: str, two_ranks: dict[str, list[Any]]) -> None:
    check_scope(scope, 2, two_ranks[f"{scope}, {setting}"])


def test_three_ranks(tmp_path: Path) -> None:
    found = run_ranks(3, {scope: (every_penalty_here, (scope, {}, 1)) for scope in SCOPES}, tmp_path)
    for scope in SCOPES:
        check_scope(scope, 3, found[scope])


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_already_there_are_added_to(scope: str, bucket_view: bool, two_ranks: dict[str, list[Any]]) -> None:
    for found in two_ranks[f"earlier, {scope}, {bucket_view}"]:
        for differences in found:
            assert all(d.abs().max() < 1e-12 for d in differences.values())


def test_parameters_that_a_rank_does_not_use(two_ranks: dict[str, list[Any]]) -> None:
    results = two_ranks["branches"]
    halves = {n: g / 2 for alone, _ in results for n, g in alone.items()}
    for _, found in results:
        assert_close(found, halves)


@pytest.mark.parametrize("name", BUFFERED)
def test_buffers_are_those_of_plain_training(name: str, two_ranks: dict[str, list[Any]]) -> None:
    for mine, theirs in zip(two_ranks[f"statistics, {name}"], two_ranks["statistics, None"], strict=True):
        assert_close(mine, theirs, tolerance=0)


@pytest.mark.parametrize("name", ["sam", "fgr-mixing"])
def test_an_overflow_in_one_rank_s_own_first_pass_skips_the_step_of_all(name: str, two_ranks: dict[str, list[Any]]) -> None:
    assert two_ranks[f"overflow, {name}"] == [(True, 2.0**15)] * 2


def test_a_global_direction_inside_no_sync_and_synchronised_batch_norm_on_a_cpu_fail_in_words(two_ranks: dict[str, list[Any]]) -> None:
    for messages in two_ranks["refusals"]:
        assert len(messages) == 3
        assert all(m.startswith("scope must be 'local' inside no_sync()") for m in messages[:2])
        assert messages[2] == "SyncBatchNorm layers only work with GPU modules"  # PyTorch's own, before anything of ours
