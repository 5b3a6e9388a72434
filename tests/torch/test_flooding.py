"""Flooding of tensors: the sign of its gradient, and what two steps of it do."""

import torch

import gradreg
from gradreg import Flooding, IndividualFlooding
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import assert_close, gradients, plain_gradients, tanh_problem, values


def test_flooding_is_a_sign_and_two_steps_of_it_are_gradient_regularization() -> None:
    """METHODS: a step of size η below the level, then one above: −η²·ΔR_F(η); above, then below: −η²·ΔR_B(η)."""
    eta = 0.02
    for build, first in ((gradreg.fgr, "below"), (gradreg.bgr, "above")):
        problem = tanh_problem()
        start, g = twins.parameters_of(problem.model), plain_gradients(problem)
        losses = [float(problem.loss().detach())]
        for name, p in problem.model.named_parameters():
            p.data.add_(g[name], alpha=eta if first == "below" else -eta)
        losses.append(float(problem.loss().detach()))
        for name, p in problem.model.named_parameters():
            p.data.copy_(start[name])
        flooding = Flooding(level=sum(losses) / 2)
        assert (losses[0] < flooding.level) == (first == "below")
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=eta)
        for _ in range(2):
            optimizer.zero_grad()
            flooding(problem.loss()).backward()
            optimizer.step()
        twin = tanh_problem()
        GradientRegularizer(twin.model, build(gamma=1.0, epsilon=eta)).backward(twin.closure())
        expected = {name: start[name] - eta**2 * (strong - g[name]) for name, strong in gradients(twin.model).items()}
        assert_close(values(problem.model), expected, tolerance=1e-12)


def test_individual_flooding_floods_each_sample() -> None:
    problem = tanh_problem()
    losses = (problem.model(problem.x) - problem.y).square().mean(1)
    level = float(losses.detach().median())
    flooded = IndividualFlooding(level=level)(losses)
    expected = torch.stack([Flooding(level=level)(own) for own in losses]).mean()
    torch.testing.assert_close(flooded, expected)
    signs = torch.autograd.grad(flooded, losses)[0] * len(losses)
    assert set(signs.tolist()) == {-1.0, 1.0} | ({0.0} if level in losses.tolist() else set())
