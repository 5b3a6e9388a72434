"""Two gloo processes, each with half of a batch: DDP and FSDP2 give the numbers of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gradreg import sharpness
from tests.torch.ranks import run_ranks

from .cases import Case

ROWS = 24


def small() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return Case(model, torch.randn(ROWS, 4).double(), torch.randint(0, 3, (ROWS,)))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def numbers(model: nn.Module, closures: Any, **options: Any) -> dict[str, Any]:
    """Every measurement; closures of two halves of the rows that a process sees."""
    halves = {"sizes": [1, 1]}
    top = sharpness.eigenvalues(model, closures, tolerance=1e-8, **halves, **options)
    trace = sharpness.trace(model, closures, samples=2, **halves, **options)
    loss_only = {key: value for key, value in options.items() if key == "mode"}
    update = {name: -torch.ones(p.shape, dtype=torch.float64) for name, p in model.named_parameters() if "bias" in name}
    found = {
        "eigenvalues": top.values,
        "shares": torch.tensor(list(top.shares[0].values())),
        "vector": torch.cat([v.reshape(-1) for v in top.vectors[0].values()]).abs(),
        "trace": torch.tensor(trace.samples),
        "parts": torch.tensor(list(trace.by_parameter.values())),
        "moment": torch.tensor(sharpness.spectrum(model, closures, samples=2, steps=5, **halves, **options).moment(2)),
        "gauss-newton": torch.tensor(sharpness.trace(model, closures, samples=2, curvature="gauss-newton", **halves, **options).samples),
        "sam": torch.tensor(sharpness.sam_sharpness(model, closures, rho=0.2, **halves, **loss_only).value),
        "random": torch.tensor(sharpness.random_sharpness(model, closures, rho=0.2, samples=2, **halves, **loss_only).samples),
        "critical": torch.tensor(sharpness.critical_sharpness(model, closures, **halves, **loss_only).value),
        "slice": torch.from_numpy(sharpness.slice_1d(model, closures, points=3, **halves, **loss_only).losses),
        "directional": torch.tensor(sharpness.directional_sharpness(model, closures, direction=update, rho=0.1, **halves).samples),
    }
    with sharpness.hessian(model, closures, **halves, **options) as operator:
        found["product"] = torch.from_numpy(operator @ torch.linspace(-1, 1, operator.shape[0]).double().numpy())
    return {"method": top.method, **found}


def closures_of(case: Case, model: nn.Module, rows: slice) -> list[Callable[[], tuple[Tensor, Tensor]]]:
    wrapped = Case(model, case.x, case.y)
    middle = (rows.start + rows.stop) // 2
    return [wrapped.with_outputs(slice(rows.start, middle)), wrapped.with_outputs(slice(middle, rows.stop))]


def measured(rank: int, world: int, way: str) -> dict[str, Any]:
    case = small()
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    if way == "ddp":
        model = nn.parallel.DistributedDataParallel(case.model)
    elif way == "ddp differences":
        model = nn.parallel.DistributedDataParallel(case.model, gradient_as_bucket_view=True)
    else:
        model = case.model
        for layer in (model[0], model[2]):  # type: ignore[index]
            fully_shard(layer)
        fully_shard(model)
    closures = closures_of(case, model, rows)
    sum(c()[0] for c in closures).backward()  # type: ignore[union-attr]
    before = [(local(p.detach()).clone(), local(p.grad).clone()) for p in model.parameters()]  # type: ignore[arg-type]
    found = numbers(model, closures, **({"products": "differences"} if "differences" in way else {}))
    found["unchanged"] = all(
        torch.equal(local(p.detach()), value) and torch.equal(local(p.grad), gradient)  # type: ignore[arg-type]
        for p, (value, gradient) in zip(model.parameters(), before, strict=True)
    )
    model.zero_grad()
    loss = sum(c()[0] for c in closures)  # and training goes on: the wrappers still average
    loss.backward()  # type: ignore[union-attr]
    found["trains"] = all(torch.allclose(local(p.grad), gradient) for p, (_, gradient) in zip(model.parameters(), before, strict=True))  # type: ignore[arg-type]
    return found


WAYS = ("ddp", "ddp differences", "fsdp")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run_ranks(2, {**{way: (measured, (way,)) for way in WAYS}, "static": (static, ())}, folder)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_numbers_of_one(found: dict[str, list[Any]], way: str) -> None:
    case = small()
    expected = numbers(case.model, closures_of(case, case.model, slice(0, ROWS)))
    for rank in range(2):
        got = found[way][rank]
        assert got["unchanged"]
        assert got["trains"]
        assert got["method"] == ("exact" if way == "ddp" else "differences")
        for name, value in expected.items():
            if name == "method":
                continue
            rtol = 1e-4 if name in ("vector", "shares") else 1e-6
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def static(rank: int, world: int) -> str:
    model = nn.parallel.DistributedDataParallel(small().model, static_graph=True)
    try:
        sharpness.sam_sharpness(model, lambda: model(torch.ones(1, 4).double()).square().sum(), rho=0.1)
    except ValueError as error:
        return str(error)
    return ""


def test_static_graphs_of_ddp_are_an_error(found: dict[str, list[Any]]) -> None:
    assert all("must average in every backward pass" in text for text in found["static"])
