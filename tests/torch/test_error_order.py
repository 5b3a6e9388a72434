"""Off quadratics the finite differences converge to double backprop: error O(radius), or O(radius²) for the central one."""

from itertools import pairwise

import pytest
import torch

from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import gradients, tanh_problem


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("difference", "ratio", "slack"), [("forward", 2, 0.2), ("backward", 2, 0.2), ("central", 4, 0.4)])
def test_halving_the_radius(power: int, difference, ratio: float, slack: float) -> None:
    problem = tanh_problem()
    expected = twins.double_backprop(
        twins.loss_of(problem.model, problem.x, problem.y), twins.parameters_of(problem.model), strength=0.5, power=power
    )
    errors = []
    for radius in (0.04, 0.02, 0.01):
        problem.model.zero_grad()
        penalty = GradientPenalty(power=power, strength=0.5, radius=radius, difference=difference)
        GradientRegularizer(problem.model, penalty).backward(problem.closure())
        errors.append(float(twins.norm({name: g - expected[name] for name, g in gradients(problem.model).items()})))
    assert errors[-1] > 1e-7, "the errors must be far above rounding to say anything"
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(ratio, abs=slack)


def test_the_two_sided_errors_cancel() -> None:
    """The central difference is the mean of the forward and the backward one."""
    results = {}
    for difference in ("forward", "backward", "central"):
        problem = tanh_problem()
        penalty = GradientPenalty(power=2, strength=0.3, radius=0.4, difference=difference)
        GradientRegularizer(problem.model, penalty).backward(problem.closure())
        results[difference] = gradients(problem.model)
    for name, central in results["central"].items():
        torch.testing.assert_close(central, (results["forward"][name] + results["backward"][name]) / 2, rtol=1e-11, atol=1e-13)
