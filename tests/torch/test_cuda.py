"""On a GPU: the numbers of a CPU, compiled graphs whose parameters are perturbed, no wait for the device, and memory that runs out.

Skipped where PyTorch sees no CUDA device; what is tested elsewhere on a CPU with an accelerator imitated is here tested on a real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg import GradientPenalty, HeldOut
from gradreg.torch import GradientRegularizer

from .cases import PENALTIES, Problem, assert_close, every_penalty, regularizer_at, values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def problem(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0) -> Problem:
    """A convolutional network with BatchNorm on a CPU."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(4 * 16, 2)]
    return Problem(nn.Sequential(*layers).to(dtype), torch.randn(8, 3, 6, 6, dtype=dtype), 2 * torch.randn(8, 2, dtype=dtype))


def on_the_gpu(one: Problem) -> Problem:
    return Problem(copy.deepcopy(one.model).cuda(), one.x.cuda(), one.y.cuda())


def trained(one: Problem, regularizer: GradientRegularizer, steps: int, held_out: Callable[[], Tensor] | None = None) -> dict[str, Tensor]:
    """Parameters and buffers after ``steps`` of SGD, on the CPU."""
    optimizer = torch.optim.SGD(one.model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        regularizer.backward(one.closure(), held_out=held_out)
        optimizer.step()
        regularizer.decoupled_step(optimizer)
    return {name: value.cpu() for name, value in values(one.model).items()}


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_penalty
def test_as_on_a_cpu(penalty: GradientPenalty) -> None:
    here = problem()
    there = on_the_gpu(here)
    found = [trained(one, regularizer_at(1, one.model, penalty), 5) for one in (there, here)]
    assert_close(found[0], found[1], tolerance=1e-9)


@every_penalty
def test_nothing_waits_for_the_device(penalty: GradientPenalty) -> None:
    ours = on_the_gpu(problem(torch.float32))
    regularizer = GradientRegularizer(ours.model, penalty)
    trained(ours, regularizer, 5)  # the first finds out what the model writes, and the first at full strength whether it is rounded away
    optimizer = torch.optim.SGD(ours.model.parameters(), lr=0.05)
    with no_synchronization():
        for _ in range(4):
            optimizer.zero_grad()
            regularizer.backward(ours.closure())
            optimizer.step()
            regularizer.decoupled_step(optimizer)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["sam", "fgr", "cgr", "gnp", "asam", "sparse-fisher", "looksam", "friendly", "sam-3-steps", "gsam"])
def test_compiled_as_eager(name: str, mode: str) -> None:
    """Captured CUDA graphs read parameters where they were: what is perturbed must be seen there, and be back there."""
    eager = on_the_gpu(problem())
    ours = Problem(copy.deepcopy(eager.model), eager.x, eager.y)
    torch._dynamo.reset()
    called = torch.compile(ours.model, mode=mode)

    def loss() -> Tensor:
        return nn.functional.mse_loss(called(ours.x), ours.y)

    found: list[dict[str, Tensor]] = [trained(eager, GradientRegularizer(eager.model, PENALTIES[name]), 8)]
    regularizer, optimizer = (
        GradientRegularizer(ours.model, PENALTIES[name]),
        torch.optim.SGD(ours.model.parameters(), lr=0.05, momentum=0.9),
    )
    for _ in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        regularizer.backward(loss)
        optimizer.step()
        regularizer.decoupled_step(optimizer)
    found.append({name: value.cpu() for name, value in values(ours.model).items()})
    assert_close(found[1], found[0], tolerance=1e-9)


def test_all_passes_see_one_mask() -> None:
    """At a radius of almost nothing a step with dropout is the plain one with the same mask."""
    plain = on_the_gpu(problem(dropout=0.5))
    ours = Problem(copy.deepcopy(plain.model), plain.x, plain.y)
    torch.cuda.manual_seed(5)
    plain.loss().backward()
    torch.cuda.manual_seed(5)
    GradientRegularizer(ours.model, gradreg.sam(rho=1e-9)).backward(ours.closure())
    found = [{name: p.grad.cpu() for name, p in one.model.named_parameters() if p.grad is not None} for one in (ours, plain)]
    assert_close(found[0], found[1], tolerance=1e-6)


@pytest.mark.parametrize("penalty", [gradreg.auto(), gradreg.sam(rho=gradreg.AutoRadius())], ids=["auto", "sam"])
def test_what_sets_and_switches_itself_as_on_a_cpu(penalty: GradientPenalty) -> None:
    here = problem()
    there = on_the_gpu(here)
    rule = HeldOut(every=2, steps_per_epoch=1, noise=0.01)
    found: list[dict[str, Tensor]] = []
    states: list[dict[str, float]] = []
    for one in (there, here):
        other = torch.flip(one.x, (0,))

        def held_out(one: Problem = one, other: Tensor = other) -> Tensor:
            return nn.functional.mse_loss(one.model(other), one.y)

        regularizer = GradientRegularizer(one.model, penalty, held_out=rule)
        found.append(trained(one, regularizer, 40, held_out=held_out))
        state = regularizer.state_dict()
        states.append({**state["held_out"].pop("noise"), **state["held_out"]})
    assert_close(found[0], found[1], tolerance=1e-7)
    assert states[0] == pytest.approx(states[1], rel=1e-5)


def test_an_overflow_changes_nothing_and_the_next_step_does() -> None:
    ours = on_the_gpu(problem(torch.float32))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**120)
    regularizer, optimizer = (
        GradientRegularizer(ours.model, gradreg.fgr(gamma=0.1, epsilon=0.1)),
        torch.optim.SGD(ours.model.parameters(), lr=0.1),
    )

    def loss() -> Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            outputs = ours.model(ours.x)
        return nn.functional.mse_loss(outputs.float(), ours.y)

    before = {name: p.clone() for name, p in ours.model.named_parameters()}
    steps: list[bool] = []
    for _ in range(12):
        optimizer.zero_grad()
        regularizer.backward(loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        steps.append(any(not torch.equal(p, before[name]) for name, p in ours.model.named_parameters()))
        if not steps[-1]:
            scaler.update(scaler.get_scale() / 2.0**10)
    assert not steps[0]
    assert steps[-1]
    assert all(torch.isfinite(p).all() for p in ours.model.parameters())


@pytest.mark.parametrize("failing", [1, 2])
def test_memory_that_runs_out(failing: int) -> None:
    ours = on_the_gpu(problem())
    regularizer = GradientRegularizer(ours.model, gradreg.cgr(gamma=0.3, epsilon=0.4))
    regularizer.backward(ours.closure())
    ours.model.zero_grad()
    before, calls = values(ours.model), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            torch.empty(1 << 50, device="cuda")
        return ours.loss()

    with pytest.raises(torch.cuda.OutOfMemoryError, match="out of memory"):
        regularizer.backward(closure)
    after = values(ours.model)
    assert all(torch.equal(after[name], before[name]) for name, _ in ours.model.named_parameters())
    assert all(p.grad is None for p in ours.model.parameters())


def test_one_copy_of_the_parameters() -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).cuda()
    x = torch.randn(4, 2048, device="cuda")
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def peak(penalty: GradientPenalty | None) -> float:
        regularizer = GradientRegularizer(model, penalty)
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        regularizer.backward(lambda: model(x).square().mean())
        return torch.cuda.max_memory_allocated() / size

    plain = peak(None)
    assert peak(gradreg.sam(rho=0.1)) - plain < 1.3
    assert peak(gradreg.fgr(gamma=0.1, epsilon=0.1)) - plain < 1.3
