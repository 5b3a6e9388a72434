"""Every wrong argument fails with the argument, the rule, what was received and the remedy; nothing has been changed by then."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import gradreg
from gradreg.torch import GradientRegularizer

from .cases import assert_same_bits, gradients, tanh_problem, values


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda m: GradientRegularizer(list(m.parameters()), None), TypeError, r"(?s)model must be a torch.nn.Module.*Pass the module"),  # type: ignore[arg-type]
        (lambda m: GradientRegularizer(m, 0.05), TypeError, r"penalty must be a GradientPenalty or None; got 0.05. Use gradreg.sam"),  # type: ignore[arg-type]
        (lambda m: GradientRegularizer(m, "sam"), TypeError, r"penalty must be a GradientPenalty or None; got 'sam' \(str\)"),  # type: ignore[arg-type]
        (lambda m: GradientRegularizer(m, None, scope="globl"), ValueError, "unknown scope 'globl'. Did you mean 'global'"),  # type: ignore[arg-type]
        (lambda m: GradientRegularizer(m.requires_grad_(False), None), ValueError, "at least one parameter with requires_grad=True; got 4"),
        (lambda m: GradientRegularizer(nn.ReLU(), None), ValueError, "got 0 parameters, none trainable"),
        (
            lambda m: GradientRegularizer(m, None, parameters=lambda name, p: False),
            ValueError,
            "parameters must select at least one of the model's 4 parameters; got none. Their names look like '0.weight'",
        ),
    ],
)
def test_construction(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(tanh_problem().model)


BAD_CLOSURES: list[tuple[str, Any, type[Exception], str]] = [
    ("loss", lambda p: p.loss(), TypeError, r"closure must be a callable or a non-empty sequence.*Write regularizer.backward\(lambda:"),
    ("empty", lambda p: [], TypeError, r"non-empty sequence of callables; got \[\]"),
    ("losses", lambda p: [p.loss()], TypeError, "non-empty sequence of callables"),
    ("none", lambda p: lambda: None, TypeError, r"must return the loss as a tensor; got None \(NoneType\)"),
    ("number", lambda p: lambda: p.loss().item(), TypeError, r"must return the loss as a tensor; got .* Return loss, not loss.item\(\)"),
    ("vector", lambda p: lambda: p.model(p.x), ValueError, r"scalar loss; got a tensor of shape \(8, 2\). Reduce it with .mean"),
    ("detached", lambda p: lambda: p.loss().detach(), ValueError, "a loss that requires grad; got one that does not depend"),
    ("constant", lambda p: lambda: torch.tensor(1.0), ValueError, "Compute it from the model's output, without torch.no_grad"),
    (
        "backward",
        lambda p: partial(backward_and_return, p),
        ValueError,
        r"it called backward\(\) itself. Return the loss and leave that out",
    ),
]


def backward_and_return(problem) -> torch.Tensor:
    loss = problem.loss()
    loss.backward()
    return loss


@pytest.mark.parametrize("penalty", [None, gradreg.sam(rho=0.1), gradreg.gnp(r=0.1, alpha=0.8), gradreg.exact(gamma=0.1)], ids=str)
@pytest.mark.parametrize(("closure", "error", "message"), [c[1:] for c in BAD_CLOSURES], ids=[c[0] for c in BAD_CLOSURES])
def test_closures(penalty, closure, error: type[Exception], message: str) -> None:
    problem = tanh_problem()
    before = values(problem.model)
    regularizer = GradientRegularizer(problem.model, penalty)
    with pytest.raises(error, match=message):
        regularizer.backward(closure(problem))
    assert_same_bits(values(problem.model), before)
    assert regularizer.step == 0


@pytest.mark.parametrize("penalty", [gradreg.sam(rho=0.1), gradreg.gnp(r=0.1, alpha=0.8)], ids=str)
def test_a_bad_loss_in_the_second_pass_restores_too(penalty) -> None:
    problem = tanh_problem()
    problem.loss().backward()
    before, earlier = values(problem.model), gradients(problem.model)
    losses = [problem.loss, lambda: problem.model(problem.x)]

    def closure() -> torch.Tensor:
        return losses.pop(0)()

    with pytest.raises(ValueError, match=r"scalar loss; got a tensor of shape \(8, 2\)"):
        GradientRegularizer(problem.model, penalty).backward(closure)
    assert_same_bits(values(problem.model), before)
    assert_same_bits(gradients(problem.model), earlier)


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        (gradreg.exact(gamma=0.1), "ascent must be None for an exact penalty, which takes no finite step.*Use fgr"),
        (gradreg.gnp(r=0.1, alpha=0.8, mixing="unit"), "ascent must be None with mixing='unit'.*Use mixing='plain'"),
        (gradreg.gsam(rho=0.1, a=0.4).warmup("zero", steps=9), "ascent must be None with mixing='surrogate gap"),
    ],
    ids=str,
)
def test_ascent_where_it_has_no_meaning(penalty, message: str) -> None:
    problem = tanh_problem()
    with pytest.raises(ValueError, match=message):
        GradientRegularizer(problem.model, penalty).backward(problem.closure(), ascent=problem.closure())


@pytest.mark.parametrize("ascent", [[], 3.0, [None]])
def test_ascent_of_the_wrong_type(ascent) -> None:
    problem = tanh_problem()
    with pytest.raises(TypeError, match="ascent must be a callable or a non-empty sequence of callables"):
        GradientRegularizer(problem.model, gradreg.sam(rho=0.1)).backward(problem.closure(), ascent=ascent)


def test_backward_of_the_wrong_type() -> None:
    problem = tanh_problem()
    with pytest.raises(TypeError, match=r"backward must be callable; got True \(bool\). Pass accelerator.backward"):
        GradientRegularizer(problem.model, None).backward(problem.closure(), backward=True)  # type: ignore[arg-type]


GRAPHS = {
    "sam": gradreg.sam(rho=0.1),
    "gnp": gradreg.gnp(r=0.1, alpha=0.5),
    "cgr": gradreg.cgr(gamma=0.1, epsilon=0.2),
    "gsam": gradreg.gsam(rho=0.1, a=0.1),
    "friendly": gradreg.friendly_sam(rho=0.1),
    "random": gradreg.random_sam(rho=0.1),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_with_a_graph_are_an_error_where_parameters_move(name: str) -> None:
    """Optimizers that differentiate the gradient (AdaHessian, SophiaH) need one, and moving the parameters breaks it."""
    problem = tanh_problem()
    before = values(problem.model)
    regularizer = GradientRegularizer(problem.model, GRAPHS[name])
    with pytest.raises(RuntimeError, match=r"backward must not make gradients with a graph \(create_graph=True\).*AdaHessian"):
        regularizer.backward(problem.closure(), backward=lambda loss: loss.backward(create_graph=True))
    assert_same_bits(values(problem.model), before)
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    "penalty", [None, gradreg.sam(rho=0.1).warmup("zero", steps=3), gradreg.exact(gamma=0.1)], ids=["none", "off", "exact"]
)
def test_gradients_with_a_graph_are_differentiable_where_parameters_stay(penalty) -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, penalty)
    regularizer.backward(problem.closure(), backward=lambda loss: loss.backward(create_graph=True))
    parameters = list(problem.model.parameters())
    products = torch.autograd.grad([p.grad for p in parameters], parameters, grad_outputs=[torch.ones_like(p) for p in parameters])  # type: ignore[misc]
    assert all(bool(torch.isfinite(h).all()) for h in products)
    for p in parameters:
        p.grad = None


def test_a_model_frozen_after_construction() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.1))
    problem.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"at least one parameter with requires_grad=True; got none. Unfreeze some before this step"):
        regularizer.backward(problem.closure())


def test_a_radius_that_vanishes_before_the_strength() -> None:
    problem = tanh_problem()
    penalty = gradreg.fgr(gamma=0.1, epsilon=gradreg.Ramp(start=0.0, end=1.0, steps=5))
    with pytest.raises(ValueError, match=r"radius must be > 0 wherever the strength is; got radius 0 and strength 0.1 at step 0"):
        GradientRegularizer(problem.model, penalty).backward(problem.closure())


def test_an_operation_without_a_second_derivative_names_the_way_out() -> None:
    model = nn.Linear(8, 8)

    def fused_attention() -> torch.Tensor:
        x = model(torch.ones(1, 1, 16, 8))
        return nn.functional.scaled_dot_product_attention(x, x, x).square().sum()

    message = r"needs every operation to be twice differentiable; PyTorch says.*Use gradreg.fgr\(gamma=..., epsilon=...\)"
    with pytest.raises(RuntimeError, match=message):
        GradientRegularizer(model, gradreg.exact(gamma=0.1)).backward(fused_attention)
