"""``examples/sam_from_scratch.py``, the file that is there to be copied, against the engine."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import gradreg
from gradreg.torch import GradientRegularizer

from .ranks import run_ranks

FILE = Path(__file__).parents[2] / "examples" / "sam_from_scratch.py"
SAM: Any = runpy.run_path(str(FILE))["SAM"]
RHO = 0.3


class Reads(nn.Module):
    """A layer whose output depends on a buffer that it writes, as a codebook's does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return x - self.mean


def network(dtype: torch.dtype = torch.float64, *, reads: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.4),
        *([Reads()] if reads else []),
        nn.Linear(8, 8),
        nn.Linear(8, 3),
    ]
    model = nn.Sequential(*layers)
    model[-2].requires_grad_(False)  # a frozen layer neither moves nor counts in the norm
    return model.to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(10, 6, generator=generator, dtype=dtype), torch.randint(3, (10,), generator=generator)) for _ in range(count)]


def closures_over(model: nn.Module, micro: Sequence[tuple[Tensor, Tensor]]) -> list[Callable[[], Tensor]]:
    return [lambda x=x, y=y: nn.functional.cross_entropy(model(x), y) / len(micro) for x, y in micro]


def trained(backward: Callable[[nn.Module], Any], *, accumulate: int, steps: int = 4) -> tuple[dict[str, Tensor], list[float], Tensor]:
    """Weights and buffers, losses, and the next random number after some steps with momentum."""
    model = network()
    gives = backward(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    data, losses = batches(steps * accumulate), []
    for step in range(steps):
        losses.append(float(gives(closures_over(model, data[step * accumulate : (step + 1) * accumulate]))))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), losses, torch.rand(3)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("warmup", [0, 2])
def test_it_is_the_engine(warmup: int, accumulate: int):
    penalty = gradreg.sam(rho=RHO).warmup("zero", steps=warmup) if warmup else gradreg.sam(rho=RHO)
    mine = trained(lambda model: SAM(model, RHO, warmup).backward, accumulate=accumulate)
    ours = trained(lambda model: GradientRegularizer(model, penalty).backward, accumulate=accumulate)
    plain = trained(lambda model: GradientRegularizer(model, None).backward, accumulate=accumulate)
    for name, value in ours[0].items():
        torch.testing.assert_close(mine[0][name], value, rtol=1e-12, atol=1e-12)
    assert mine[1] == pytest.approx(ours[1], rel=1e-12)
    assert torch.equal(mine[2], ours[2])  # dropout drew as often as in plain training
    assert torch.equal(mine[2], plain[2])
    assert max(float((plain[0][n].double() - v.double()).abs().max()) for n, v in ours[0].items()) > 1e-3


def test_the_weights_are_restored_bit_for_bit_and_after_an_error_too():
    model = network(torch.float32, reads=False)
    before = copy.deepcopy(model.state_dict())
    passes: list[bool] = []

    def closure() -> Tensor:
        passes.append(torch.equal(model[0].weight, before["0.weight"]))
        if len(passes) == 4:
            raise KeyboardInterrupt("here")
        x, y = batches(1, torch.float32)[0]
        return nn.functional.cross_entropy(model(x), y)

    sam = SAM(model, rho=RHO)
    sam.backward([closure])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(KeyboardInterrupt, match="here"):
        sam.backward([closure])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert passes == [True, False, True, False]
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("too_large", [False, True])
def test_under_a_gradient_scaler(too_large: bool):
    """The direction is that of unscaled gradients, and a step that overflows in the first pass is skipped, momentum and all."""

    def stepped(build: Callable[[nn.Module], Any]) -> tuple[nn.Module, torch.amp.GradScaler, Any]:
        model = network(torch.float32, reads=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 if too_large else 2.0**10)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
        x, y = batches(1, torch.float32)[0]
        build(model).backward([lambda: 100 * nn.functional.cross_entropy(model(x), y)], scaler=scaler)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return model, scaler, optimizer

    mine, scaler, optimizer = stepped(lambda model: SAM(model, RHO))
    ours, _, _ = stepped(lambda model: GradientRegularizer(model, gradreg.sam(rho=RHO)))
    start = network(torch.float32, reads=False)
    for (name, value), theirs, before in zip(mine.named_parameters(), ours.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-6)
        assert torch.equal(value, before) is (too_large or not value.requires_grad), name
    assert scaler.get_scale() == (2.0**126 if too_large else 2.0**10)
    assert bool(optimizer.state) is not too_large


def test_a_zero_gradient_stays_zero():
    model = nn.Linear(2, 1, dtype=torch.float64)
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert SAM(model).backward([lambda: model(x).sum() * 0]) == 0
    assert not model.weight.grad.any()


def test_a_resumed_run_keeps_its_warm_up():
    sam, resumed = SAM(network(), RHO, warmup=2), SAM(network(), RHO, warmup=2)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        return sum(p.sum() for p in sam.model.parameters())  # type: ignore[return-value]

    for _ in range(2):
        sam.backward([closure])
    assert len(calls) == 2
    resumed.load_state_dict(sam.state_dict())
    resumed.model = sam.model
    resumed.backward([closure])
    assert len(calls) == 4


def in_processes(rank: int, world: int, own: bool) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(network(reads=False))
    backward = SAM(model, RHO).backward if own else GradientRegularizer(model, gradreg.sam(rho=RHO)).backward
    reductions = [0]

    def counts(state, bucket):  # type: ignore[no-untyped-def]  # DDP looks at annotations
        reductions[0] += 1
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    model.register_comm_hook(None, counts)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    data = batches(2 * 2 * world)
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        backward(closures_over(model, [data[(2 * step + i) * world + rank] for i in range(2)]))
        optimizer.step()
        optimizer.zero_grad()
    return {**model.module.state_dict(), "reductions": torch.tensor(reductions[0])}


@pytest.mark.slow
def test_two_processes_each_perturb_by_their_own_gradient_in_one_all_reduce(tmp_path: Path):
    mine, ours = run_ranks(2, {"mine": (in_processes, (True,)), "ours": (in_processes, (False,))}, tmp_path).values()
    for rank in range(2):
        for name, value in ours[rank].items():
            torch.testing.assert_close(mine[rank][name], value, rtol=1e-12, atol=1e-12)
    assert mine[0]["reductions"] == 2


def test_it_is_short():
    code = FILE.read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 62
