"""``optimizer.step(closure)`` with a standard closure: the same training as the bare loop, and never a plain step unseen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg import GradientPenalty
from gradreg.integrations.closure import regularize_closures
from gradreg.torch import GradientRegularizer
from tests.torch.cases import FINITE

from .digits import assert_equal, digits, network, values


def train(
    penalty: GradientPenalty | None, *, closures: bool, optimizer_class: type[torch.optim.Optimizer] = torch.optim.SGD, steps: int = 5
):
    model, data = network(), digits().tensors
    optimizer = optimizer_class(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    regularizer = GradientRegularizer(model, penalty)
    if closures:
        regularize_closures(optimizer, regularizer)
    losses = []
    for step in range(steps):
        rows = slice(32 * step, 32 * (step + 1))

        def loss_of(rows: slice = rows) -> Tensor:
            return nn.functional.cross_entropy(model(data[0][rows]), data[1][rows])

        if closures:

            def closure(loss_of: Callable[[], Tensor] = loss_of) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of()
                loss.backward()
                return loss

            losses.append(float(optimizer.step(closure)))  # type: ignore[arg-type]
        else:
            optimizer.zero_grad()
            losses.append(float(regularizer.backward(loss_of)))
            optimizer.step()
        scheduler.step()
    return model, losses, regularizer


@pytest.mark.parametrize("penalty", [None, *FINITE.values()], ids=["none", *FINITE])
def test_it_trains_as_the_bare_loop_does(penalty: GradientPenalty | None) -> None:
    model, losses, regularizer = train(penalty, closures=True)
    bare, bare_losses, _ = train(penalty, closures=False)
    assert losses == pytest.approx(bare_losses, rel=1e-5)
    assert_equal(values(model), values(bare), tolerance=1e-5)
    assert regularizer.step == 5


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_any_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    model, _, _ = train(gradreg.sam(rho=0.5), closures=True, optimizer_class=optimizer)
    bare, _, _ = train(gradreg.sam(rho=0.5), closures=False, optimizer_class=optimizer)
    assert_equal(values(model), values(bare), tolerance=1e-4)


def test_lbfgs_evaluates_the_regularized_gradient_every_time() -> None:
    torch.manual_seed(0)
    a = torch.diag(torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64))
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(3, dtype=torch.float64))})
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    regularizer = GradientRegularizer(model, gradreg.fgr(gamma=0.1, epsilon=0.1))
    regularize_closures(optimizer, regularizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * model["w"] @ a @ model["w"]
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert regularizer.step > 2
    assert float(model["w"].detach().norm()) < 1e-3


def test_without_a_closure_it_raises_and_does_not_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = regularize_closures(optimizer, GradientRegularizer(model, gradreg.sam()))
    before = values(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) needs a closure here"):
        optimizer.step()
    assert_equal(values(model), before)
    handle.remove()
    optimizer.step()


def test_exact_and_no_optimizer_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"penalty must be a finite difference.*Use gradreg\.fgr"):
        regularize_closures(torch.optim.SGD(model.parameters(), lr=0.1), GradientRegularizer(model, gradreg.exact(gamma=0.1)))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer; got None"):
        regularize_closures(None, GradientRegularizer(model, gradreg.sam()))  # type: ignore[arg-type]
