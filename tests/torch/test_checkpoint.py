"""``state_dict``: a warm-up that is interrupted and resumed goes on as if it had not been."""

import io

import pytest
import torch

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from .cases import assert_same_bits, assert_same_state, every_penalty, tanh_problem, values


def train(steps: int, interrupted_at: int | None, penalty: GradientPenalty) -> tuple[dict[str, torch.Tensor], GradientRegularizer]:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, penalty)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    for step in range(steps):
        if step == interrupted_at:
            file = io.BytesIO()
            torch.save({"model": problem.model.state_dict(), "regularizer": regularizer.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            problem = tanh_problem()
            problem.model.load_state_dict(saved["model"])
            regularizer = GradientRegularizer(problem.model, penalty)
            regularizer.load_state_dict(saved["regularizer"])
            optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
        optimizer.zero_grad()
        regularizer.backward(problem.closure())
        optimizer.step()
        regularizer.decoupled_step(optimizer)
    return values(problem.model), regularizer


@every_penalty
def test_resumed_training_is_the_uninterrupted_one(penalty: GradientPenalty) -> None:
    whole, first = train(8, None, penalty)
    resumed, second = train(8, 3, penalty)
    assert_same_bits(resumed, whole)
    assert dict(second.metrics) == pytest.approx(dict(first.metrics), nan_ok=True)
    assert_same_state(second.state_dict(), first.state_dict())


def test_state_is_plain_numbers() -> None:
    _, regularizer = train(3, None, gradreg.sam(rho=0.1).warmup("zero", steps=2))
    assert regularizer.state_dict() == {"step": 3, "evaluations": 4}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, r"state must have the keys step and evaluations; got \[\]"),
        ({"step": 1}, ValueError, r"got \['step'\]. Pass what state_dict\(\) returned"),
        ({"step": -1, "evaluations": 0}, ValueError, "step must be >= 0; got -1"),
        ({"step": 1.5, "evaluations": 0}, TypeError, r"step must be a whole number >= 0; got 1.5"),
        ({"step": 1, "evaluations": "2"}, TypeError, r"evaluations must be a number >= 0; got '2' \(str\)"),
    ],
)
def test_bad_state_changes_nothing(state: dict[str, object], error: type[Exception], message: str) -> None:
    regularizer = GradientRegularizer(tanh_problem().model, gradreg.sam(rho=0.1))
    regularizer.load_state_dict({"step": 7, "evaluations": 9})
    with pytest.raises(error, match=message):
        regularizer.load_state_dict(state)
    assert regularizer.state_dict() == {"step": 7, "evaluations": 9}
