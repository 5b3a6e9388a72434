"""What the engine must look for: who else moves parameters, which parameters there are by now, what a closure holds.

Where it cannot do the right thing it says so at the first step; nothing is silently something else.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradreg
from gradreg.torch import GradientRegularizer

from .cases import DURING_WARMUP, PENALTIES, Problem, assert_close, gradients, regularizer_at, said, tanh_problem, values

IN_WORDS = (TypeError, ValueError, RuntimeError)
"""What an error in words is raised as; what it says is matched each time."""


def scalar() -> nn.Module:
    model = nn.Module()
    model.p = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    return model


def half_square(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model.p.square() / 2


def step_and_keep(p: Tensor) -> None:
    assert p.grad is not None
    with torch.no_grad():
        p.sub_(p.grad, alpha=0.1)


def step_and_drop(p: Tensor) -> None:
    step_and_keep(p)
    p.grad = None


def step_with_an_optimizer(p: Tensor) -> None:
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.step()
    optimizer.zero_grad()


def in_hooks(hook: Callable[[Tensor], None]) -> Callable[[nn.Module], None]:
    def install(model: nn.Module) -> None:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)

    return install


def by_torch_distributed(model: nn.Module) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, list(model.parameters()), {"lr": 0.1})


STEPPING = {
    "gradient kept": in_hooks(step_and_keep),
    "gradient dropped": in_hooks(step_and_drop),
    "an optimizer for each parameter": in_hooks(step_with_an_optimizer),
    "torch.distributed.optim": by_torch_distributed,
}
STEPS_IN_BACKWARD = r"optimizer.*(inside|during|in) (the )?backward"


@pytest.mark.parametrize("name", ["sam", "gnp", "fgr", "cgr", "gsam", "friendly", "random", "msam", "sam-3-steps", "exact"])
@pytest.mark.parametrize("install", STEPPING.values(), ids=STEPPING)
def test_an_optimizer_that_steps_inside_backward(install: Callable[[nn.Module], None], name: str) -> None:
    """One step with the regularized gradient, for SAM p = 1 − .1·(1 + .5) = .85, or an error in words that leaves p alone."""
    penalty = gradreg.sam(rho=0.5) if name == "sam" else PENALTIES[name]
    twin, model = scalar(), scalar()
    GradientRegularizer(twin, penalty).backward(half_square(twin))
    right = 1.0 - 0.1 * float(twin.p.grad)
    if name == "sam":
        assert right == pytest.approx(0.85)
    install(model)
    regularizer = GradientRegularizer(model, penalty)
    message = said(lambda: regularizer.backward(half_square(model)))
    if message is None:
        assert float(model.p.detach()) == pytest.approx(right, rel=1e-12)
    else:
        assert re.match(rf"(TypeError|ValueError|RuntimeError): .*{STEPS_IN_BACKWARD}", message), message


@pytest.mark.parametrize("install", STEPPING.values(), ids=STEPPING)
def test_only_one_of_the_parameters_is_stepped_inside_backward(install: Callable[[nn.Module], None]) -> None:
    """As with layer-wise optimizers for the large matrices alone."""
    torch.manual_seed(0)
    twin, model = (tanh_problem() for _ in range(2))
    GradientRegularizer(twin.model, gradreg.sam(rho=0.3)).backward(twin.closure())
    (first, *_) = model.model.children()
    holder = nn.Module()
    holder.weight = first.weight
    install(holder)
    start = first.weight.detach().clone()
    message = said(lambda: GradientRegularizer(model.model, gradreg.sam(rho=0.3)).backward(model.closure()))
    if message is None:
        torch.testing.assert_close(first.weight.detach(), start - 0.1 * gradients(twin.model)["0.weight"])
    else:
        assert re.match(rf"(TypeError|ValueError|RuntimeError): .*{STEPS_IN_BACKWARD}", message), message


def test_without_a_penalty_an_optimizer_may_step_inside_backward() -> None:
    model = scalar()
    in_hooks(step_and_drop)(model)
    regularizer = GradientRegularizer(model, None)
    for expected in (0.9, 0.81):
        regularizer.backward(half_square(model))
        assert float(model.p.detach()) == pytest.approx(expected)


def test_hooks_that_only_look_are_no_reason_to_refuse() -> None:
    problem, twin, norms = tanh_problem(), tanh_problem(), []
    for p in problem.model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: norms.append(float(p.grad.norm())))
    GradientRegularizer(problem.model, gradreg.sam(rho=0.3)).backward(problem.closure())
    GradientRegularizer(twin.model, gradreg.sam(rho=0.3)).backward(twin.closure())
    assert_close(gradients(problem.model), gradients(twin.model), tolerance=0)
    assert len(norms) == 8


def add_a_layer(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2).double())


def insert_a_layer(model: nn.Sequential) -> None:
    model.insert(2, nn.Linear(5, 5).double())


def replace_a_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 1.5)


def replace_all_parameters(model: nn.Sequential) -> None:
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.detach() * 1.5)
        layer.bias = nn.Parameter(layer.bias.detach() * 1.5)


def assign(model: nn.Sequential) -> None:
    model.load_state_dict({n: 1.5 * v for n, v in model.state_dict().items()}, assign=True)


def widen(model: nn.Sequential) -> None:
    """As a resized embedding: more rows, the old ones copied."""
    old, wide = model[2], nn.Linear(5, 4).double()
    with torch.no_grad():
        wide.weight[:2].copy_(old.weight)
    model[2] = nn.Sequential(wide, nn.Linear(4, 2).double())


def parametrize(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[0])


def one_more_vector(model: nn.Sequential) -> None:
    model.register_parameter("gain", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    model.register_forward_hook(lambda module, args, output: output * module.gain)


GROWTH = {
    "a layer at the end": add_a_layer,
    "a layer in the middle": insert_a_layer,
    "one parameter replaced": replace_a_parameter,
    "all parameters replaced": replace_all_parameters,
    "load_state_dict(assign=True)": assign,
    "widened": widen,
    "parametrized": parametrize,
    "a parameter beside the layers": one_more_vector,
}


@pytest.mark.parametrize("after_a_step", [False, True], ids=["before the first step", "between steps"])
@pytest.mark.parametrize("name", ["sam", "gnp", "cgr", "gsam", "random", "exact"])
@pytest.mark.parametrize("change", GROWTH.values(), ids=GROWTH)
def test_parameters_that_joined_after_construction(change: Callable[[Any], None], name: str, after_a_step: bool) -> None:
    """The gradient that a regularizer built afterwards leaves, or an error in words; never the sum of two passes."""
    problem, twin, penalty = tanh_problem(), tanh_problem(), PENALTIES[name]
    regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
    if after_a_step:
        regularizer.backward(problem.closure())
    problem.model.zero_grad()
    for one in (problem, twin):
        torch.manual_seed(7)
        change(one.model)
    before = values(problem.model)
    regularizer_at(DURING_WARMUP + after_a_step, twin.model, penalty).backward(twin.closure())
    message = said(lambda: regularizer.backward(problem.closure()))
    assert_close(values(problem.model), before, tolerance=0)
    if message is None:
        assert_close(gradients(problem.model), gradients(twin.model))
    else:
        assert re.match(r"(TypeError|ValueError|RuntimeError): .*parameter", message), message
        assert "GradientRegularizer" in message or "regularizer" in message, f"the remedy is missing: {message}"


def test_a_resized_embedding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).double()
    tokens = torch.tensor([0, 3, 4, 1])

    def closure() -> Tensor:
        return nn.functional.cross_entropy(model(tokens), tokens)

    regularizer = GradientRegularizer(model, gradreg.sam(rho=0.3))
    regularizer.backward(closure)
    model.zero_grad()
    larger = nn.Embedding(8, 3).double()
    with torch.no_grad():
        larger.weight[:5] = model[0].weight
    model[0] = larger
    message = said(lambda: regularizer.backward(closure))
    if message is None:
        found = gradients(model)
        model.zero_grad()
        GradientRegularizer(model, gradreg.sam(rho=0.3)).backward(closure)
        assert_close(found, gradients(model))
    else:
        assert re.match(r"(TypeError|ValueError|RuntimeError): .*parameter", message), message


def test_frozen_parameters_may_join_and_known_ones_may_be_frozen_and_unfrozen() -> None:
    problem, twin = tanh_problem(), tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3))
    for one in (problem, twin):
        torch.manual_seed(7)
        one.model.append(nn.Linear(2, 2).double().requires_grad_(False))
        one.model[0].requires_grad_(False)  # type: ignore[index]
    regularizer.backward(problem.closure())
    GradientRegularizer(twin.model, gradreg.sam(rho=0.3)).backward(twin.closure())
    assert_close(gradients(problem.model), gradients(twin.model))
    for one in (problem, twin):
        one.model.zero_grad()
        one.model[0].requires_grad_(True)  # type: ignore[index]
    regularizer.backward(problem.closure())
    GradientRegularizer(twin.model, gradreg.sam(rho=0.3)).backward(twin.closure())
    assert_close(gradients(problem.model), gradients(twin.model))


def test_no_perturbed_parameter_received_a_gradient() -> None:
    """The selected parameters are none that the loss depends on: no penalty would be trained, and nothing would say so."""
    problem = tanh_problem()
    problem.model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), parameters=lambda name, p: name == "unused")
    with pytest.raises(IN_WORDS, match=r"parameter.*gradient"):
        regularizer.backward(problem.closure())


class CheckpointedHalves(nn.Module):
    """Two layers, of which ``which`` are in a reentrant checkpoint."""

    def __init__(self, which: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.which = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), which

    def head(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(x))

    def forward(self, x: Tensor) -> Tensor:
        again = partial(checkpoint, use_reentrant=True)
        if self.which == "both":
            return again(lambda x: self.head(torch.tanh(self.first(x))), x)
        if self.which == "first":
            return self.head(again(lambda x: torch.tanh(self.first(x)), x))
        if self.which == "second":
            return again(self.head, torch.tanh(self.first(x)))
        return self.head(torch.tanh(self.first(x)))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("which", ["both", "first", "second"])
def test_exact_with_reentrant_checkpointing(which: str, power: int, micro_batches: int) -> None:
    """Right, or an error in words; what autograd cannot see is no gradient of zero."""
    torch.manual_seed(1)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    penalty = gradreg.exact(gamma=0.3, power=power)
    plain, model = CheckpointedHalves("none"), CheckpointedHalves(which)
    GradientRegularizer(plain, penalty).backward(lambda: plain(x).square().sum())
    x.grad = None
    rows = 6 // micro_batches
    closures = [lambda i=i: model(x[i * rows : (i + 1) * rows]).square().sum() for i in range(micro_batches)]
    message = said(lambda: GradientRegularizer(model, penalty).backward(closures))
    if message is None:
        assert_close(gradients(model), gradients(plain))
    else:
        assert re.match(r"RuntimeError: difference='exact' .*(use_reentrant=False|checkpoint)", message), message


def test_exact_with_a_parameter_that_the_loss_does_not_depend_on_goes_on() -> None:
    problem = tanh_problem()
    problem.model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    twin = tanh_problem()
    for one in (problem, twin):
        GradientRegularizer(one.model, gradreg.exact(gamma=0.3)).backward(one.closure())
    assert_close(gradients(problem.model), gradients(twin.model))


LATE = r"closure.*(loop|late|same)"


def parts_of(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    return [(problem.x[i : i + 2], problem.y[i : i + 2]) for i in range(0, 8, 2)]


def late_by_a_loop(problem: Problem) -> list[Callable[[], Tensor]]:
    closures = []
    for x, y in parts_of(problem):
        closures.append(lambda: nn.functional.mse_loss(problem.model(x), y) / 4)  # noqa: B023
    return closures


def late_by_a_comprehension(problem: Problem) -> list[Callable[[], Tensor]]:
    return [lambda: nn.functional.mse_loss(problem.model(x), y) / 4 for x, y in parts_of(problem)]  # noqa: B023


def late_by_functions(problem: Problem) -> list[Callable[[], Tensor]]:
    closures = []
    for x, y in parts_of(problem):

        def closure() -> Tensor:
            return nn.functional.mse_loss(problem.model(x), y) / 4  # noqa: B023

        closures.append(closure)
    return closures


SCRIPT = """
closures = []
for x, y in parts:
    closures.append(lambda: loss(model(x), y) / 4)
"""


def late_in_a_script(problem: Problem) -> list[Callable[[], Tensor]]:
    """At the top of a file the loop's variables are globals, and no closure cell tells of them."""
    names: dict[str, Any] = {"parts": parts_of(problem), "model": problem.model, "loss": nn.functional.mse_loss}
    exec(SCRIPT, names)
    return names["closures"]


LATE_BOUND = {
    "loop": late_by_a_loop,
    "comprehension": late_by_a_comprehension,
    "functions": late_by_functions,
    "script": late_in_a_script,
}


@pytest.mark.parametrize("name", ["sam", "exact", "none"])
@pytest.mark.parametrize("make", LATE_BOUND.values(), ids=LATE_BOUND)
def test_closures_that_share_the_variable_of_their_loop_are_reported(make: Callable[[Problem], list], name: str) -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, PENALTIES.get(name))
    with pytest.warns(UserWarning, match=LATE):
        regularizer.backward(make(problem))


def test_late_bound_ascent_closures_are_reported() -> None:
    problem = tanh_problem()
    with pytest.warns(UserWarning, match=LATE):
        GradientRegularizer(problem.model, PENALTIES["sam"]).backward(problem.closure(), ascent=late_by_a_loop(problem))


def bound_by_default(problem: Problem) -> list[Callable[[], Tensor]]:
    return [lambda x=x, y=y: nn.functional.mse_loss(problem.model(x), y) / 4 for x, y in parts_of(problem)]


def bound_by_keyword(problem: Problem) -> list[Callable[[], Tensor]]:
    return [lambda *, x=x, y=y: nn.functional.mse_loss(problem.model(x), y) / 4 for x, y in parts_of(problem)]


def bound_by_partial(problem: Problem) -> list[Callable[[], Tensor]]:
    return [partial(lambda x, y: nn.functional.mse_loss(problem.model(x), y) / 4, x, y) for x, y in parts_of(problem)]


def bound_by_a_function(problem: Problem) -> list[Callable[[], Tensor]]:
    def of(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        return lambda: nn.functional.mse_loss(problem.model(x), y) / 4

    return [of(x, y) for x, y in parts_of(problem)]


class Bound:
    def __init__(self, problem: Problem, x: Tensor, y: Tensor) -> None:
        self.problem, self.x, self.y = problem, x, y

    def __call__(self) -> Tensor:
        return nn.functional.mse_loss(self.problem.model(self.x), self.y) / 4


def bound_by_objects(problem: Problem) -> list[Callable[[], Tensor]]:
    return [Bound(problem, x, y) for x, y in parts_of(problem)]


def bound_by_methods(problem: Problem) -> list[Callable[[], Tensor]]:
    return [Bound(problem, x, y).__call__ for x, y in parts_of(problem)]


BOUND = {
    "defaults": bound_by_default,
    "keywords": bound_by_keyword,
    "partial": bound_by_partial,
    "a function": bound_by_a_function,
    "objects": bound_by_objects,
    "methods": bound_by_methods,
}


@pytest.mark.parametrize("make", BOUND.values(), ids=BOUND)
def test_closures_that_hold_their_own_batch_are_not_reported(make: Callable[[Problem], list]) -> None:
    problem, twin = tanh_problem(), tanh_problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradientRegularizer(problem.model, PENALTIES["sam"]).backward(make(problem))
    GradientRegularizer(twin.model, PENALTIES["sam"]).backward(twin.closure())
    assert_close(gradients(problem.model), gradients(twin.model))


OUTSIDE = r"closure must .*forward"


def all_outside(problem: Problem) -> Callable[[], Tensor]:
    output = problem.model(problem.x)
    return lambda: nn.functional.mse_loss(output, problem.y)


def loss_outside(problem: Problem) -> Callable[[], Tensor]:
    loss = problem.loss()
    return lambda: loss


def encoder_outside(problem: Problem) -> Callable[[], Tensor]:
    hidden = problem.model[:2](problem.x)  # type: ignore[index]
    return lambda: nn.functional.mse_loss(problem.model[2](hidden), problem.y)  # type: ignore[index]


def term_outside(problem: Problem) -> Callable[[], Tensor]:
    squares = sum(p.square().sum() for p in problem.model.parameters())
    return lambda: problem.loss() + squares / 100


PARTS_OUTSIDE = {"all": all_outside, "loss": loss_outside, "encoder": encoder_outside, "a term": term_outside}


@pytest.mark.parametrize("name", ["sam", "gnp", "cgr", "fgr", "sam-3-steps", "gsam"])
@pytest.mark.parametrize("make", PARTS_OUTSIDE.values(), ids=PARTS_OUTSIDE)
def test_a_forward_outside_of_the_closure_is_an_error_in_words(make: Callable[[Problem], Callable[[], Tensor]], name: str) -> None:
    problem = tanh_problem()
    before = values(problem.model)
    closure = make(problem)
    with pytest.raises(IN_WORDS, match=OUTSIDE):
        GradientRegularizer(problem.model, PENALTIES[name]).backward(closure)
    assert_close(values(problem.model), before, tolerance=0)
    assert not gradients(problem.model)


def test_an_error_of_the_closure_s_own_is_not_renamed() -> None:
    problem = tanh_problem()

    def closure() -> Tensor:
        raise RuntimeError("a user's own error")

    with pytest.raises(RuntimeError, match=r"^a user's own error$"):
        GradientRegularizer(problem.model, PENALTIES["sam"]).backward(closure)
