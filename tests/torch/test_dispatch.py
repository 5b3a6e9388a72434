"""What the regularizer adds to two plain passes: a fixed number of dispatched operations, and no wait for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer, norms

from .cases import (
    BASE,
    DURING_WARMUP,
    FINITE,
    Problem,
    each_finite_trait,
    regularizer_at,
)

FEW, MANY = 3, 80
"""Layers; twice as many tensors. 80 linear layers are 160 tensors, the size of the models in the published counts."""


FINITE_BASE = {name: penalty for name, penalty in BASE.items() if name in FINITE}
RELATIVES = {n: p for n, p in FINITE.items() if n not in BASE and not isinstance(p.direction, gradreg.Random)}  # drawn tensor by tensor


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU values are looked at, because nothing waits for them."""
    monkeypatch.setattr(norms, "reading_is_free", lambda tensor: False)


class Operations(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return sum(self.names.values())


def deep_problem(layers: int, *, batch_norm: bool = False) -> Problem:
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for _ in range(layers):
        blocks.append(nn.Linear(4, 4))
        if batch_norm:
            blocks.append(nn.BatchNorm1d(4))
    return Problem(nn.Sequential(*blocks), torch.randn(8, 4), torch.randn(8, 4))


def added(problem: Problem, penalty: GradientPenalty) -> Counter[str]:
    """The operations of a regularized step that are not those of its plain passes."""
    regularizer, optimizer = regularizer_at(DURING_WARMUP, problem.model, penalty), torch.optim.SGD(problem.model.parameters(), lr=0.01)
    for _ in range(2):  # copies and memories are made once
        regularizer.backward(problem.closure())
        regularizer.decoupled_step(optimizer)
        problem.model.zero_grad()
    with Operations() as regularized:
        regularizer.backward(problem.closure())
    problem.model.zero_grad()
    with Operations() as plain:
        problem.loss().backward()
    passes = penalty.evaluations_at(DURING_WARMUP + 2)
    accumulated = sum(1 for p in problem.model.parameters() if p.requires_grad)
    extra = regularized.names.copy()
    for name, times in plain.names.items():
        extra[name] -= passes * times
    if extra["aten.detach.default"] < 0:  # PyTorch detaches a gradient that it keeps and adds, uncounted, one that it accumulates
        extra["aten.detach.default"] = 0
    kept = extra["aten.add_.Tensor"]
    extra["aten.add_.Tensor"] = max(0, kept - (passes - 1) * accumulated)
    return +extra


@pytest.mark.slow
@pytest.mark.parametrize("layers", [FEW, MANY])
@pytest.mark.parametrize("penalty", FINITE_BASE.values(), ids=FINITE_BASE)
def test_at_most_16_operations_whatever_the_number_of_tensors(penalty: GradientPenalty, layers: int) -> None:
    extra = added(deep_problem(layers), penalty)
    assert sum(extra.values()) <= 16, extra


@pytest.mark.slow
@pytest.mark.parametrize("penalty", RELATIVES.values(), ids=RELATIVES)
def test_relatives_take_more_but_no_more_for_more_tensors(penalty: GradientPenalty) -> None:
    few, many = (added(deep_problem(layers), penalty) for layers in (FEW, MANY))
    assert sum(many.values()) == sum(few.values()), many - few
    assert sum(many.values()) <= 40, many


@pytest.mark.parametrize("penalty", [gradreg.sam(rho=0.1), gradreg.fgr(gamma=0.2, epsilon=0.1)], ids=["sam", "fgr"])
def test_nor_does_it_grow_with_the_number_of_buffers(penalty: GradientPenalty) -> None:
    few, many = (added(deep_problem(layers, batch_norm=True), penalty) for layers in (FEW, MANY))
    assert sum(many.values()) == sum(few.values()), many - few
    assert sum(many.values()) <= 16 + 8, many  # two kinds of buffers: read and written by the first pass, and put back twice


@pytest.mark.parametrize("earlier", [False, True], ids=["empty", "accumulating"])
@each_finite_trait
def test_nothing_waits_for_the_device_until_a_metric_is_read(penalty: GradientPenalty, earlier: bool) -> None:
    problem = deep_problem(FEW)
    regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
    regularizer.backward(problem.closure())  # the first step looks for writers, and at what rounding leaves
    regularizer.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.0))
    problem.model.zero_grad()
    if earlier:
        problem.loss().backward()
    with Operations() as step:
        regularizer.backward(problem.closure(), step=DURING_WARMUP)
    assert not {n for n in step.names if "_local_scalar_dense" in n or "is_nonzero" in n or ".item" in n or "equal" in n}
    if penalty.starts_unperturbed_at(DURING_WARMUP) and (penalty.strength_at(DURING_WARMUP) > 0 or not earlier):
        with Operations() as reading:
            assert regularizer.metrics.gradient_norm > 0
            assert regularizer.metrics.gradient_norm > 0
        assert reading.names["aten._local_scalar_dense.default"] == 1, "it is read once and kept"


def test_a_scaler_makes_it_wait_once_as_documented() -> None:
    problem = deep_problem(FEW)
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.1))
    scaler = torch.amp.GradScaler("cpu")
    regularizer.backward(problem.closure(), scaler=scaler)
    with Operations() as step:
        regularizer.backward(problem.closure(), scaler=scaler)
    waits = [n for n in step.names.elements() if "_local_scalar_dense" in n or "is_nonzero" in n]
    assert len(waits) <= 1, waits


def test_the_counter_counts() -> None:
    problem = deep_problem(FEW)
    with Operations() as step:
        total = sum((p.detach() ** 2).sum() for p in problem.model.parameters())
        assert isinstance(total, Tensor)
        float(total)
    assert step.count >= 4 * FEW
    assert step.names["aten._local_scalar_dense.default"] == 1
