"""FSDP2 (``fully_shard``) and tensor parallelism on gloo: the same gradients as one process, whoever holds the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradreg
from gradreg.torch import GradientRegularizer
from gradreg.torch.draws import chosen, signs
from gradreg.torch.norms import local_shards

from .cases import DURING_WARMUP, FINITE, PENALTIES, Problem, assert_close, gradients, regularizer_at, tanh_problem, values
from .ranks import Job, run_ranks

BATCH = 12


def problem_of(rank: int, world: int, dtype: torch.dtype = torch.float64) -> Problem:
    """The part of one batch of 12 that ``rank`` sees; the second layer has fewer rows than there may be ranks."""
    model = tanh_problem(dtype).model
    torch.manual_seed(3)
    x, y = torch.randn(BATCH, 3, dtype=torch.float64).to(dtype), 2 * torch.randn(BATCH, 2, dtype=torch.float64).to(dtype)
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return Problem(model, x[rows], y[rows])


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in found.items()}


def shard(problem: Problem, **options: Any) -> Problem:
    for layer in problem.model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    fully_shard(problem.model, **options)
    return problem


def sharded(rank: int, world: int, micro_batches: int, keep_gathered: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, penalty in FINITE.items():
        problem = shard(problem_of(rank, world), reshard_after_forward=not keep_gathered)
        if keep_gathered:
            problem.model.set_reshard_after_backward(False)
        before = {n: v.to_local().clone() for n, v in problem.model.named_parameters()}
        rows = len(problem.x) // micro_batches
        closures = [part_of(problem, slice(i * rows, (i + 1) * rows), micro_batches) for i in range(micro_batches)]
        regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
        loss = regularizer.backward(closures)
        after = problem.loss()  # a forward pass sees the restored parameters, not a gathered copy of moved ones
        restored = all(torch.equal(v.to_local(), before[n]) for n, v in regularizer_parameters(problem.model).items())
        gathered = whole(gradients(problem.model))
        norm = float(nn.utils.clip_grad_norm_(problem.model.parameters(), 0.1).full_tensor())
        found[name] = (
            gathered,
            restored,
            regularizer.metrics.gradient_norm,
            float(loss),
            float(after),
            norm,
            whole(gradients(problem.model)),
        )
    return found


def regularizer_parameters(model: nn.Module) -> dict[str, Any]:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return dict(model.named_parameters())


def part_of(problem: Problem, rows: slice, parts: int):
    return lambda: problem.loss(rows) / parts


def even_problem() -> Problem:
    """A hidden layer that two ranks can halve, as tensor parallelism wants it."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    return Problem(model, torch.randn(8, 3, dtype=torch.float64), 2 * torch.randn(8, 2, dtype=torch.float64))


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (world,))
    for name, penalty in FINITE.items():
        problem = even_problem()
        parallelize_module(problem.model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        before = {n: v.to_local().clone() for n, v in problem.model.named_parameters()}
        regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
        regularizer.backward(problem.closure())
        restored = all(torch.equal(v.to_local(), before[n]) for n, v in problem.model.named_parameters())
        found[name] = (whole(gradients(problem.model)), restored, regularizer.metrics.gradient_norm)
    return found


def mixed_precision(rank: int, world: int) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    found: dict[str, Any] = {}
    for name, penalty in FINITE.items():
        problem = shard(problem_of(rank, world, torch.float32), mp_policy=policy)
        before = {n: v.to_local().clone() for n, v in problem.model.named_parameters()}
        regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure())
        restored = all(torch.equal(v.to_local(), before[n]) for n, v in problem.model.named_parameters())
        found[name] = (whole(gradients(problem.model)), restored, next(problem.model.parameters()).grad.dtype)
    return found


REMEMBERING = ("friendly", "remembered", "sparse-fisher", "looksam")
WARMING_UP = {name: PENALTIES[name].warmup("strength", steps=6) for name in (*REMEMBERING, "sam", "gnp", "fgr", "bgr", "cgr")}


def resumed(rank: int, world: int, folder: str) -> dict[str, list[dict[str, Tensor]]]:
    return {name: resumed_with(penalty, rank, world, f"{folder}-{name}") for name, penalty in WARMING_UP.items()}


def resumed_with(penalty: gradreg.GradientPenalty, rank: int, world: int, folder: str) -> list[dict[str, Tensor]]:

    def start() -> tuple[Problem, torch.optim.Optimizer, GradientRegularizer]:
        problem = shard(problem_of(rank, world))
        optimizer = torch.optim.AdamW(problem.model.parameters(), lr=0.01)
        return problem, optimizer, GradientRegularizer(problem.model, penalty)

    def train(problem: Problem, optimizer: torch.optim.Optimizer, regularizer: GradientRegularizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            regularizer.backward(problem.closure())
            optimizer.step()
            regularizer.decoupled_step(optimizer)

    problem, optimizer, regularizer = start()
    train(problem, optimizer, regularizer, 2)
    model_state, optimizer_state = get_state_dict(problem.model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state, "regularizer": regularizer.state_dict()}, checkpoint_id=folder)
    train(problem, optimizer, regularizer, 3)
    straight = whole(values(problem.model))

    problem, optimizer, regularizer = start()
    model_state, optimizer_state = get_state_dict(problem.model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "regularizer": regularizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(problem.model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    regularizer.load_state_dict(state["regularizer"])
    torch.save(regularizer.state_dict(), f"{folder}/{rank}.pt")  # as the Trainer's checkpoints have it, a file for each rank
    regularizer.load_state_dict(torch.load(f"{folder}/{rank}.pt", map_location="cpu", weights_only=True))
    train(problem, optimizer, regularizer, 3)
    return [straight, whole(values(problem.model))]


def exact_refuses(rank: int, world: int) -> str:
    problem = shard(problem_of(rank, world))
    try:
        GradientRegularizer(problem.model, gradreg.exact(gamma=0.1)).backward(problem.closure())
    except ValueError as error:
        return str(error)
    return "no error"


PLACEMENTS: tuple[Placement, ...] = (Shard(0), Shard(1), Shard(2), Replicate())


def drawn(rank: int, world: int) -> list[tuple[bool, bool]]:
    """Whether the signs and the choice for shards of a tensor are those shards of the signs and of the choice for all of it."""
    mesh, whole_tensor, found = init_device_mesh("cpu", (world,)), torch.zeros(9, 7, 5), []
    for placement in PLACEMENTS:
        parameter = distribute_tensor(whole_tensor, mesh, [placement])
        drawn_for = [[*signs(1, 2, [(3, p)]), *chosen(0.3, 1, 2, [(3, p)])] for p in (whole_tensor, parameter)]
        expected = local_shards([distribute_tensor(draw, mesh, [placement]) for draw in drawn_for[0]])
        found.append(tuple(torch.equal(draw, part) for draw, part in zip(drawn_for[1], expected, strict=True)))
    return found


SETTINGS = {"whole batch": (1, False), "micro-batches": (3, False), "gathered parameters kept": (1, True)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("two")
    jobs: dict[str, Job] = {name: (sharded, arguments) for name, arguments in SETTINGS.items()}
    jobs["tensor parallel"] = (tensor_parallel, ())
    jobs["mixed precision"] = (mixed_precision, ())
    jobs["resumed"] = (resumed, (str(folder / "checkpoint"),))
    jobs["drawn"] = (drawn, ())
    jobs["exact"] = (exact_refuses, ())
    return run_ranks(2, jobs, folder)


def expected_of(name: str, problem: Problem) -> tuple[dict[str, Tensor], float, float, float]:
    """Gradient, norm of the plain gradient, loss, and norm of the gradient, in one process on the whole batch."""
    regularizer = regularizer_at(DURING_WARMUP, problem.model, PENALTIES[name])
    loss = regularizer.backward(problem.closure())
    expected = gradients(problem.model)
    return expected, regularizer.metrics.gradient_norm, float(loss), float(torch.cat([g.flatten() for g in expected.values()]).norm())


def check(results: list[dict[str, Any]]) -> None:
    for name in FINITE:
        expected, plain_norm, loss, norm = expected_of(name, problem_of(0, 1))
        for found in results:
            gradient, restored, found_norm, _, _, clipped_from, clipped = found[name]
            assert_close(gradient, expected, tolerance=1e-12)
            assert restored, name
            assert found_norm == pytest.approx(plain_norm, rel=1e-12, nan_ok=True)
            assert clipped_from == pytest.approx(norm, rel=1e-12)
            assert_close(clipped, {n: g * 0.1 / (norm + 1e-6) for n, g in expected.items()}, tolerance=1e-12)
        for place, expected_loss in ((3, loss), (4, float(problem_of(0, 1).loss().detach()))):
            assert sum(found[name][place] for found in results) / len(results) == pytest.approx(expected_loss, rel=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_fully_shard_equals_one_process(setting: str, two_ranks: dict[str, list[Any]]) -> None:
    check(two_ranks[setting])


def test_ranks_that_hold_nothing_of_a_layer(tmp_path: Path) -> None:
    check(run_ranks(3, {"sharded": (sharded, (1, False))}, tmp_path)["sharded"])


def test_tensor_parallel_equals_one_process(two_ranks: dict[str, list[Any]]) -> None:
    for name in FINITE:
        expected, plain_norm, _, _ = expected_of(name, even_problem())
        for found in two_ranks["tensor parallel"]:
            gradient, restored, norm = found[name]
            assert_close(gradient, expected, tolerance=1e-12)
            assert restored, name
            assert norm == pytest.approx(plain_norm, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", FINITE)
def test_a_mixed_precision_policy(name: str, two_ranks: dict[str, list[Any]]) -> None:
    problem = problem_of(0, 1, torch.float32)
    regularizer_at(DURING_WARMUP, problem.model, PENALTIES[name]).backward(problem.closure())
    for found in two_ranks["mixed precision"]:
        gradient, restored, dtype = found[name]
        assert restored
        assert dtype == torch.float32
        assert_close(gradient, gradients(problem.model), tolerance=0.03)  # computed in bfloat16: 8 bits


@pytest.mark.parametrize("name", WARMING_UP)
def test_resuming_from_a_distributed_checkpoint_is_bit_for_bit(name: str, two_ranks: dict[str, list[Any]]) -> None:
    for found in two_ranks["resumed"]:
        straight, again = found[name]
        assert_close(again, straight, tolerance=0)


def test_shards_are_drawn_for_as_parts_of_the_whole(two_ranks: dict[str, list[Any]]) -> None:
    for found in two_ranks["drawn"]:
        assert found == [(True, True)] * len(PLACEMENTS)


def test_exact_says_what_to_use_instead(two_ranks: dict[str, list[Any]]) -> None:
    for message in two_ranks["exact"]:
        assert "difference='exact' needs whole parameters" in message
        assert "gradreg.cgr" in message


class FullyShardedDataParallel(nn.Module):
    """Stands for FSDP1, whose own constructor needs an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.zeros(3))


def test_fsdp1_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must not be wrapped in FullyShardedDataParallel .* Use torch\.distributed\.fsdp\.fully_shard"):
        GradientRegularizer(FullyShardedDataParallel(), gradreg.sam())
