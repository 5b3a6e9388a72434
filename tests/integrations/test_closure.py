"""``RegularizedOptimizer``: the usual closures, the schedules and checkpoints of torch, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradreg
from gradreg.integrations.closure import RegularizedOptimizer
from gradreg.torch import GradientRegularizer

from .digits import batch, largest_difference, network, weights

PENALTIES = {
    "sam": gradreg.sam(rho=0.2),
    "gnp": gradreg.gnp(r=0.2, alpha=0.8),
    "fgr": gradreg.fgr(gamma=0.3, epsilon=0.5),
    "bgr": gradreg.bgr(gamma=0.1, epsilon=0.3),
    "cgr": gradreg.cgr(gamma=0.1, epsilon=0.3),
    "exact": gradreg.exact(gamma=0.1),
    "friendly": gradreg.friendly_sam(rho=0.2),
    "wsam-decoupled": gradreg.wsam(rho=0.2, gamma=0.7, decoupled=True),
}
CALLS = {"sam": 2, "gnp": 2, "fgr": 2, "bgr": 2, "cgr": 3, "exact": 1, "friendly": 2, "wsam-decoupled": 2}


def wrapped(model: nn.Module, penalty: gradreg.GradientPenalty | None) -> RegularizedOptimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return RegularizedOptimizer(sgd, GradientRegularizer(model, penalty))


def usual(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Tensor:
    x, y = batch(i)
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss


def clearing_by_the_model(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> float:
    x, y = batch(i)
    model.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss.item()


def in_two_parts(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    x, y = batch(i)
    optimizer.zero_grad()
    each = cross_entropy(model(x), y, reduction="none") / len(y)
    each[:20].sum().backward(retain_graph=True)
    each[20:].backward(torch.ones(len(y) - 20))


def forward_only(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Tensor:
    x, y = batch(i)
    return cross_entropy(model(x), y)


def test_a_radius_that_is_learned_from_held_out_data_is_refused():
    with pytest.raises(ValueError, match=r"^penalty must not learn its radius from held-out data under a closure-based loop, .*; got SAM"):
        wrapped(network(), gradreg.sam(rho=gradreg.LETS()))


@pytest.mark.parametrize("form", [usual, clearing_by_the_model, in_two_parts, forward_only])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_step_is_the_hand_written_one(name: str, form: Callable[..., Any]):
    mine, theirs = network(), network()
    optimizer = wrapped(mine, PENALTIES[name])
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    regularizer = GradientRegularizer(theirs, PENALTIES[name])
    calls = []
    for i in range(3):
        torch.manual_seed(i)
        loss = optimizer.step(lambda i=i: (calls.append(i), form(mine, optimizer, i))[1])
        torch.manual_seed(i)
        sgd.zero_grad()
        x, y = batch(i)
        expected = regularizer.backward(lambda x=x, y=y: cross_entropy(theirs(x), y))
        sgd.step()
        regularizer.decoupled_step(sgd)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert len(calls) == 3 * CALLS[name]
    difference = largest_difference(weights(mine), weights(theirs))
    assert difference <= 1e-6 if form is in_two_parts else difference == 0.0


def test_without_a_closure_it_raises_and_moves_nothing():
    model = network()
    optimizer = wrapped(model, gradreg.sam(rho=0.1))
    cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    before = weights(model)
    with pytest.raises(TypeError, match=r"step needs a closure.*got none\. Write optimizer\.step\(closure\)"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"closure must be callable; got 3"):
        optimizer.step(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step needs a closure"):
        torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert largest_difference(weights(model), before) == 0.0


def test_an_older_gradient_has_no_part_in_the_step():
    mine, theirs = network(), network()
    for p in mine.parameters():
        p.grad = torch.full_like(p, 7.0)
    for model in (mine, theirs):
        torch.manual_seed(0)
        wrapped(model, gradreg.sam(rho=0.2)).step(lambda model=model: forward_only(model, None, 0))  # type: ignore[arg-type]
    assert largest_difference(weights(mine), weights(theirs)) == 0.0


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_torch_schedules_accept_it(through: str):
    model = network()
    optimizer = wrapped(model, gradreg.sam(rho=0.2))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer if through == "wrapper" else optimizer.optimizer, max_lr=1.0, total_steps=5)
    rates = []
    for i in range(4):
        optimizer.step(lambda i=i: usual(model, optimizer, i))
        schedule.step()
        rates.append(optimizer.optimizer.param_groups[0]["lr"])
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state
    assert len(set(rates)) == 4


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def start(seed: int) -> tuple[nn.Module, RegularizedOptimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = network(seed)
        penalty = gradreg.gnp(r=0.3, alpha=0.8).warmup("radius", steps=6)
        optimizer = wrapped(model, penalty)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def train(model: nn.Module, optimizer: RegularizedOptimizer, schedule: Any, steps: range) -> None:
        for i in steps:
            torch.manual_seed(i)
            optimizer.step(lambda i=i: usual(model, optimizer, i))
            schedule.step()

    model, optimizer, schedule = start(0)
    train(model, optimizer, schedule, range(3))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(model, optimizer, schedule, range(3, 6))

    again, resumed, schedule = start(1)
    saved = torch.load(tmp_path / "checkpoint.pt")
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    train(again, resumed, schedule, range(3, 6))
    assert largest_difference(weights(again), weights(model)) == 0.0
    assert resumed.regularizer.step == 6
    assert resumed.regularizer.metrics.evaluations == optimizer.regularizer.metrics.evaluations


def test_a_plain_optimizers_state_is_refused_with_the_way_to_load_it():
    model = network()
    optimizer = wrapped(model, gradreg.sam(rho=0.1))
    plain = copy.deepcopy(optimizer.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state must hold the key regularizer; got \['param_groups', 'state'\].*optimizer\.optimizer"):
        optimizer.load_state_dict(plain)
    optimizer.optimizer.load_state_dict(plain)


def test_clipping_in_a_step_pre_hook_sees_the_regularized_gradient():
    mine, theirs = network(), network()
    optimizer = wrapped(mine, gradreg.fgr(gamma=0.3, epsilon=0.5))

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(mine.parameters(), 0.1)

    optimizer.register_step_pre_hook(clip)
    torch.manual_seed(0)
    optimizer.step(lambda: usual(mine, optimizer, 0))

    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(0)
    GradientRegularizer(theirs, gradreg.fgr(gamma=0.3, epsilon=0.5)).backward(lambda: forward_only(theirs, sgd, 0))
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    sgd.step()
    assert norm > 0.2
    assert largest_difference(weights(mine), weights(theirs)) == 0.0


def clips(model: nn.Module) -> Tensor:
    loss = cross_entropy(model(batch(0)[0]), batch(0)[1])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss


def goes_around(model: nn.Module) -> Tensor:
    loss = cross_entropy(model(batch(0)[0]), batch(0)[1])
    torch.autograd.backward(loss)
    return loss


def only_some(model: nn.Module) -> Tensor:
    loss = cross_entropy(model(batch(0)[0]), batch(0)[1])
    loss.backward(inputs=list(model.parameters())[:1])
    return loss


@pytest.mark.parametrize(
    ("closure", "words"),
    [
        (clips, r"closure must not use the gradients.*register_step_pre_hook"),
        (goes_around, r"closure must compute its gradients by loss\.backward\(\)"),
        (only_some, r"closure must call backward\(\) for all parameters.*requires_grad_\(False\)"),
    ],
)
def test_a_closure_that_could_not_be_followed_is_refused(closure: Callable[[nn.Module], Tensor], words: str):
    model = network()
    parameters = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        wrapped(model, gradreg.sam(rho=0.1)).step(lambda: closure(model))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in model.parameters())


class Differentiates(torch.optim.SGD):
    """As AdaHessian and SophiaH do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.autograd.grad([p.grad.sum() for p in parameters], parameters)


@pytest.mark.parametrize("penalty", [None, gradreg.sam(rho=0.1)], ids=["none", "sam"])
def test_an_optimizer_that_differentiates_the_gradient_is_an_error(penalty: Any):
    model = network()
    optimizer = RegularizedOptimizer(Differentiates(model.parameters(), lr=0.1), GradientRegularizer(model, penalty))
    with pytest.raises(RuntimeError, match="optimizer must take gradients without a graph; got Differentiates, which differentiates them"):
        optimizer.step(lambda: forward_only(model, optimizer, 0))


def test_arguments_of_another_kind_are_refused():
    model = network()
    sgd, regularizer = torch.optim.SGD(model.parameters(), lr=0.1), GradientRegularizer(model, gradreg.sam(rho=0.1))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer; got 'sgd'"):
        RegularizedOptimizer("sgd", regularizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must take one gradient a step; got LBFGS"):
        RegularizedOptimizer(torch.optim.LBFGS(model.parameters()), regularizer)
    with pytest.raises(TypeError, match=r"regularizer must be a GradientRegularizer; got .*GradientPenalty"):
        RegularizedOptimizer(sgd, gradreg.sam(rho=0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer must train parameters of the regularizer's model only; got 6 others"):
        RegularizedOptimizer(torch.optim.SGD(network().parameters(), lr=0.1), regularizer)


def test_it_shows_the_penalty_and_the_base_optimizer():
    optimizer = wrapped(network(), gradreg.sam(rho=0.1))
    assert repr(optimizer).startswith("RegularizedOptimizer(SAM(rho 0.1), SGD")
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = optimizer.nothing_of_this_name
