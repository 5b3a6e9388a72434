"""How often closures are called, what sequences of micro-batches give, and what a direction from other closures gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import (
    DURING_WARMUP,
    FINITE,
    Problem,
    assert_close,
    calls_at,
    every_penalty,
    every_penalty_that_takes_ascent,
    gradients,
    plain_gradients,
    regularizer_at,
    tanh_problem,
)

PART = slice(0, 3)


class Counted:
    """A closure that counts its calls."""

    def __init__(self, closure: Callable[[], Tensor]) -> None:
        self.closure, self.calls = closure, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.closure()


def micro_batches(problem: Problem) -> list[Counted]:
    """The batch in unequal parts, weighted so that their sum is the loss of the whole."""
    n = len(problem.x)
    parts = [slice(0, 2), slice(2, 3), slice(3, n)]
    return [Counted(lambda rows=rows: problem.loss(rows) * (len(problem.x[rows]) / n)) for rows in parts]


@every_penalty
def test_calls(penalty: GradientPenalty) -> None:
    for step in (0, DURING_WARMUP, 5, 50):
        problem = tanh_problem()
        closure = Counted(problem.closure())
        regularizer_at(step, problem.model, penalty).backward(closure)
        assert closure.calls == calls_at(step, penalty), step


def test_calls_of_each_difference_as_documented() -> None:
    problem = tanh_problem()
    for penalty, calls in (
        (None, 1),
        (gradreg.sam(rho=0.1), 2),
        (gradreg.gnp(r=0.1, alpha=0.8), 2),
        (gradreg.fgr(gamma=0.1, epsilon=0.3), 2),
        (gradreg.bgr(gamma=0.1, epsilon=0.3), 2),
        (gradreg.cgr(gamma=0.1, epsilon=0.3), 3),
        (gradreg.exact(gamma=0.1), 1),
    ):
        closure = Counted(problem.closure())
        regularizer_at(0, problem.model, penalty).backward(closure)
        assert closure.calls == calls, penalty


@every_penalty
def test_micro_batches_are_called_in_rounds_and_give_the_whole_batch(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure())
    whole = gradients(problem.model)
    problem.model.zero_grad()

    closures = micro_batches(problem)
    loss = regularizer_at(DURING_WARMUP, problem.model, penalty).backward(closures)
    assert_close(gradients(problem.model), whole)
    if penalty.starts_unperturbed_at(DURING_WARMUP):
        torch.testing.assert_close(loss, problem.loss().detach())
    rounds = calls_at(DURING_WARMUP, penalty)
    if penalty.difference == "exact" and penalty.strength_at(DURING_WARMUP) > 0:
        rounds = 2  # the direction of the whole batch first, then its product with each part's Hessian
    assert [c.calls for c in closures] == [rounds] * 3


def test_a_sequence_of_one_is_the_closure() -> None:
    for penalty in (gradreg.gnp(r=0.3, alpha=0.8), gradreg.exact(gamma=0.3)):
        problem = tanh_problem()
        closure = Counted(problem.closure())
        regularizer_at(0, problem.model, penalty).backward((closure,))
        assert closure.calls == calls_at(0, penalty)


@every_penalty_that_takes_ascent
def test_ascent_twin(penalty: GradientPenalty) -> None:
    """The direction from a part of the batch, both gradients from all of it."""
    problem, step = tanh_problem(), 100
    theta = twins.parameters_of(problem.model)
    whole = twins.loss_of(problem.model, problem.x, problem.y)
    part = twins.loss_of(problem.model, problem.x[PART], problem.y[PART])
    regularizer_at(step, problem.model, penalty).backward(problem.closure(), ascent=problem.closure(PART))
    assert_close(gradients(problem.model), twins.family(penalty, whole, theta, step=step, ascent=part))


@every_penalty_that_takes_ascent
def test_ascent_calls_cost_and_loss(penalty: GradientPenalty) -> None:
    problem, step = tanh_problem(), 100
    ascent, closure = Counted(problem.closure(PART)), Counted(problem.closure())
    regularizer, share = regularizer_at(step, problem.model, penalty), 3 / 8
    loss = regularizer.backward(closure, ascent=ascent, ascent_share=share)
    assert ascent.calls == penalty.ascent_steps
    assert regularizer.metrics.evaluations == closure.calls + share * ascent.calls == penalty.evaluations_at(step, ascent_share=share)
    c = penalty.coefficient_at(step)
    assert c is not None
    expected = problem.loss() if c != 1.0 or penalty.difference != "forward" else problem.loss(PART)
    torch.testing.assert_close(loss, expected.detach())


@every_penalty_that_takes_ascent
def test_ascent_is_not_called_without_a_strength(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    late = penalty.warmup("zero", steps=5)
    ascent, closure = Counted(problem.closure(PART)), Counted(problem.closure())
    regularizer_at(0, problem.model, late).backward(closure, ascent=ascent)
    assert (ascent.calls, closure.calls) == (0, 1)
    assert_close(gradients(problem.model), plain_gradients(problem), tolerance=0)


@pytest.mark.parametrize("name", ["sam", "gnp", "cgr"])
def test_ascent_and_closure_may_both_be_sequences(name: str) -> None:
    penalty = FINITE[name]
    problem = tanh_problem()
    regularizer_at(0, problem.model, penalty).backward(problem.closure(), ascent=problem.closure())
    whole = gradients(problem.model)
    problem.model.zero_grad()
    regularizer_at(0, problem.model, penalty).backward(micro_batches(problem), ascent=micro_batches(problem))
    assert_close(gradients(problem.model), whole)


@every_penalty
def test_backward_callable_replaces_loss_backward(penalty: GradientPenalty) -> None:
    """It is called once a pass, and its result is what plain backward gives."""
    problem = tanh_problem()
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure())
    expected = gradients(problem.model)
    problem.model.zero_grad()
    seen = []

    def backward(loss: Tensor) -> None:
        seen.append(loss)
        loss.backward()

    regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure(), backward=backward)
    assert_close(gradients(problem.model), expected, tolerance=0)
    assert len(seen) == calls_at(DURING_WARMUP, penalty)


def test_works_under_no_grad() -> None:
    """Frameworks that call closures under ``torch.no_grad`` (Lightning's, some optimizers') get the same gradient."""
    problem = tanh_problem()
    with torch.no_grad():
        regularizer_at(0, problem.model, gradreg.sam(rho=0.3)).backward(problem.closure())
    loss = twins.loss_of(problem.model, problem.x, problem.y)
    assert_close(gradients(problem.model), twins.sam(loss, twins.parameters_of(problem.model), 0.3))


def test_a_closure_that_calls_backward_in_its_second_pass_alone_is_named() -> None:
    model = nn.Linear(3, 1)
    regularizer = GradientRegularizer(model, gradreg.sam(rho=0.1))

    def closure() -> Tensor:
        loss = model(torch.ones(4, 3)).square().mean()
        if regularizer.repeats_pass:
            loss.backward(retain_graph=True)
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"it called backward\(\) itself"):
        regularizer.backward(closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
