"""What comes back beside the loss, which evaluation it is of, and the step's clock: ``has_aux``, ``repeats_pass``, ``step=``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from .cases import (
    DURING_WARMUP,
    PENALTIES,
    assert_close,
    assert_same_bits,
    calls_at,
    dropout_batchnorm_problem,
    every_penalty,
    every_penalty_that_takes_ascent,
    gradients,
    regularizer_at,
    tanh_problem,
)

PART, REST = slice(0, 3), slice(3, 8)


@every_penalty
def test_aux_is_of_the_first_pass(penalty: GradientPenalty) -> None:
    """Logits and a nested structure, and a gradient that does not know of them; dropout and batch statistics draw and write as always."""
    problem, twin = dropout_batchnorm_problem(), dropout_batchnorm_problem()
    outputs: list[Tensor] = []

    def closure() -> tuple[Tensor, dict[str, object]]:
        outputs.append(problem.model(problem.x))
        loss = torch.nn.functional.mse_loss(outputs[-1], problem.y)
        return loss, {"logits": outputs[-1].detach(), "at": (len(outputs), "any object")}

    torch.manual_seed(5)
    expected = regularizer_at(DURING_WARMUP, twin.model, penalty).backward(twin.closure())
    torch.manual_seed(5)
    loss, aux = regularizer_at(DURING_WARMUP, problem.model, penalty).backward(closure, has_aux=True)
    assert len(outputs) == calls_at(DURING_WARMUP, penalty)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert aux["at"] == (1, "any object")
    assert torch.equal(aux["logits"], outputs[0])
    assert torch.equal(torch.nn.functional.mse_loss(aux["logits"], problem.y), loss), "loss and aux are of one evaluation"
    assert_same_bits(gradients(problem.model), gradients(twin.model))


def test_aux_without_a_penalty() -> None:
    problem = tanh_problem()
    loss, aux = GradientRegularizer(problem.model, None).backward(lambda: (problem.loss(), "aux"), has_aux=True)
    assert aux == "aux"
    assert torch.equal(loss, problem.loss().detach())


@every_penalty
def test_a_list_of_closures_has_a_list_of_aux(penalty: GradientPenalty) -> None:
    problem, calls = tanh_problem(), []

    def part(rows: slice) -> tuple[Tensor, tuple[int, slice]]:
        calls.append(rows)
        return problem.loss(rows), (len(calls), rows)

    regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
    loss, aux = regularizer.backward([lambda: part(PART), lambda: part(slice(3, 8))], has_aux=True)
    assert aux == [(1, PART), (2, REST)]
    if penalty.starts_unperturbed_at(DURING_WARMUP):
        torch.testing.assert_close(loss, (problem.loss(PART) + problem.loss(REST)).detach())


def test_a_list_of_one_has_a_list_of_one() -> None:
    problem = tanh_problem()
    for penalty in (gradreg.sam(rho=0.3), gradreg.exact(gamma=0.3), None):
        _, aux = GradientRegularizer(problem.model, penalty).backward([lambda: (problem.loss(), 1)], has_aux=True)
        assert aux == [1]


@every_penalty_that_takes_ascent
def test_with_ascent_loss_and_aux_are_of_one_evaluation_at_the_unperturbed_parameters(penalty: GradientPenalty) -> None:
    """That of the ascent closure where ``closure`` is evaluated nowhere else than at the perturbed ones."""
    problem, step = tanh_problem(), 100
    theta = [p.detach().clone() for p in problem.model.parameters()]

    def closure(rows: slice) -> tuple[Tensor, tuple[slice, Tensor, bool]]:
        loss = problem.loss(rows)
        return loss, (rows, loss.detach(), all(torch.equal(p, t) for p, t in zip(problem.model.parameters(), theta, strict=True)))

    regularizer = regularizer_at(step, problem.model, penalty)
    loss, aux = regularizer.backward(lambda: closure(REST), ascent=lambda: closure(PART), has_aux=True)
    rows, value, unperturbed = aux
    c = penalty.coefficient_at(step)
    assert c is not None
    assert rows == (REST if c != 1.0 or penalty.difference != "forward" else PART)
    assert torch.equal(value, loss)
    assert unperturbed


def test_with_lists_of_ascent_closures_aux_is_the_list_of_theirs() -> None:
    problem = tanh_problem()
    ascents = [lambda: (problem.loss(PART), "ascent 0"), lambda: (problem.loss(REST), "ascent 1")]
    _, aux = GradientRegularizer(problem.model, gradreg.sam(rho=0.3)).backward(
        lambda: (problem.loss(), "closure"), ascent=ascents, has_aux=True
    )
    assert aux == ["ascent 0", "ascent 1"]


def test_aux_keeps_its_values_and_its_graph_is_nobody_s_business() -> None:
    """A tensor with a graph comes back as it was, and what later passes write elsewhere does not reach it."""
    problem = tanh_problem()

    def closure() -> tuple[Tensor, Tensor]:
        output = problem.model(problem.x)
        return torch.nn.functional.mse_loss(output, problem.y), output

    with torch.no_grad():
        expected = problem.model(problem.x)
    _, output = GradientRegularizer(problem.model, gradreg.cgr(gamma=0.3, epsilon=0.4)).backward(closure, has_aux=True)
    assert torch.equal(output, expected)


PENALTY_KINDS = [gradreg.sam(rho=0.3), gradreg.exact(gamma=0.3), None]


@pytest.mark.parametrize("returned", [lambda loss: loss, lambda loss: (loss,), lambda loss: (loss, 1, 2), lambda loss: [loss, 1]])
@pytest.mark.parametrize("penalty", PENALTY_KINDS, ids=["sam", "exact", "plain"])
def test_has_aux_with_a_closure_that_returns_no_pair(penalty: GradientPenalty | None, returned) -> None:
    problem = tanh_problem()
    before = [p.detach().clone() for p in problem.model.parameters()]
    with pytest.raises((TypeError, ValueError), match=r"closure must return .*\(loss, aux\).*has_aux.*; got "):
        GradientRegularizer(problem.model, penalty).backward(lambda: returned(problem.loss()), has_aux=True)
    assert all(torch.equal(p, b) for p, b in zip(problem.model.parameters(), before, strict=True))
    assert not gradients(problem.model)


@pytest.mark.parametrize("penalty", PENALTY_KINDS, ids=["sam", "exact", "plain"])
def test_a_pair_without_has_aux(penalty: GradientPenalty | None) -> None:
    problem = tanh_problem()
    with pytest.raises(TypeError, match=r"closure must return .*; got .*has_aux=True"):
        GradientRegularizer(problem.model, penalty).backward(lambda: (problem.loss(), 1))  # type: ignore[arg-type,return-value]


def test_has_aux_whose_loss_is_no_scalar() -> None:
    problem = tanh_problem()
    with pytest.raises(ValueError, match="closure must return a scalar loss; got a tensor of shape"):
        GradientRegularizer(problem.model, gradreg.sam(rho=0.3)).backward(lambda: (problem.loss().expand(2), 1), has_aux=True)


@every_penalty
def test_repeats_pass_tells_the_first_evaluation_of_each_closure_from_the_later_ones(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
    repeats: dict[str, list[bool]] = {"first": [], "second": []}

    def part(name: str, rows: slice) -> Tensor:
        repeats[name].append(regularizer.repeats_pass)
        return problem.loss(rows)

    assert regularizer.repeats_pass is False
    for _ in range(2):
        regularizer.backward([lambda: part("first", PART), lambda: part("second", slice(3, 8))])
        assert regularizer.repeats_pass is False, "outside of a step nothing is repeated"
        regularizer.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.1))
        for found in repeats.values():
            assert found == [False] + [True] * (len(found) - 1)
            found.clear()


@every_penalty_that_takes_ascent
def test_repeats_pass_is_about_each_closure_for_itself(penalty: GradientPenalty) -> None:
    """Ascent closures and closures are each evaluated for the first time once."""
    problem = tanh_problem()
    regularizer = regularizer_at(100, problem.model, penalty)
    repeats: dict[str, list[bool]] = {"ascent": [], "closure": []}

    def evaluated(name: str, rows: slice) -> Tensor:
        repeats[name].append(regularizer.repeats_pass)
        return problem.loss(rows)

    regularizer.backward(lambda: evaluated("closure", REST), ascent=lambda: evaluated("ascent", PART))
    for found in repeats.values():
        assert found == [False] + [True] * (len(found) - 1)


def test_repeats_pass_after_an_exception() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3))
    repeats: list[bool] = []

    def closure() -> Tensor:
        repeats.append(regularizer.repeats_pass)
        if len(repeats) == 2:
            raise RuntimeError("injected")
        return problem.loss()

    with pytest.raises(RuntimeError, match="injected"):
        regularizer.backward(closure)
    assert regularizer.repeats_pass is False
    regularizer.backward(closure)
    assert repeats == [False, True, False, True]


def test_a_counter_of_one_s_own_counts_batches() -> None:
    """What it is for: a metric that a closure keeps outside of the model."""
    problem = tanh_problem()
    regularizer, seen = GradientRegularizer(problem.model, gradreg.cgr(gamma=0.3, epsilon=0.4)), []

    def closure() -> Tensor:
        loss = problem.loss()
        if not regularizer.repeats_pass:
            seen.append(float(loss.detach()))
        return loss

    losses = [float(regularizer.backward(closure)) for _ in range(3)]
    assert seen == losses


@every_penalty
def test_step_sets_the_clock_of_one_step(penalty: GradientPenalty) -> None:
    """As a regularizer whose state says so, and the clock goes on from there."""
    problem, twin = tanh_problem(), tanh_problem()
    regularizer, expected = GradientRegularizer(problem.model, penalty), regularizer_at(DURING_WARMUP, twin.model, penalty)
    regularizer.backward(problem.closure(), step=DURING_WARMUP)
    expected.backward(twin.closure())
    assert_same_bits(gradients(problem.model), gradients(twin.model))
    assert regularizer.step == expected.step == DURING_WARMUP + 1
    assert regularizer.metrics.strength == expected.metrics.strength
    assert regularizer.metrics.evaluations == expected.metrics.evaluations
    for one, of in ((regularizer, problem), (expected, twin)):
        one.decoupled_step(torch.optim.SGD(of.model.parameters(), lr=0.1))
    regularizer.backward(problem.closure())
    expected.backward(twin.closure())
    assert_close(gradients(problem.model), gradients(twin.model), tolerance=0)
    assert regularizer.step == DURING_WARMUP + 2


def test_step_may_go_back_and_none_goes_on() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3).warmup("zero", steps=5))
    strengths = []
    for step in (7, None, 0, None, 5, 4):
        regularizer.backward(problem.closure(), step=step)
        strengths.append(regularizer.metrics.strength)
    assert strengths == [0.3, 0.3, 0.0, 0.0, 0.3, 0.0]
    assert regularizer.step == 5
    assert regularizer.state_dict()["step"] == 5


def test_a_step_that_failed_leaves_the_clock() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3))
    regularizer.backward(problem.closure())
    with pytest.raises(ValueError, match="closure must return a scalar loss"):
        regularizer.backward(lambda: torch.zeros(2), step=40)
    assert regularizer.step == 1


@pytest.mark.parametrize("step", [-1, 1.5, "3", True], ids=["negative", "fraction", "text", "flag"])
def test_a_step_that_is_no_whole_number(step: object) -> None:
    problem = tanh_problem()
    with pytest.raises((TypeError, ValueError), match=r"step must be .*; got "):
        GradientRegularizer(problem.model, PENALTIES["sam"]).backward(problem.closure(), step=step)  # type: ignore[arg-type]
