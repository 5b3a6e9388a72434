"""On L = ½θᵀAθ every finite difference is the exact product with the Hessian A, whatever the radius: known in closed form."""

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg import GradientPenalty, Unit
from gradreg.torch import GradientRegularizer

from .cases import every_base_penalty, regularizer_at


class Quadratic(nn.Module):
    """½θᵀAθ, with θ split over two parameters so that the norm must be taken over both together."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
        self.A = root @ root.T / 5 + 0.1 * torch.eye(5, dtype=torch.float64)
        self.first = nn.Parameter(torch.randn(2, dtype=torch.float64, generator=generator))
        self.second = nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator))

    @property
    def theta(self) -> Tensor:
        return torch.cat([self.first, self.second])

    def forward(self) -> Tensor:
        return 0.5 * self.theta @ self.A @ self.theta

    def gradient(self) -> Tensor:
        assert self.first.grad is not None
        assert self.second.grad is not None
        return torch.cat([self.first.grad, self.second.grad])


def test_sam_is_the_gradient_at_the_perturbed_point() -> None:
    model, rho = Quadratic(), 0.7
    A, theta = model.A, model.theta.detach()
    GradientRegularizer(model, gradreg.sam(rho=rho)).backward(model)
    torch.testing.assert_close(model.gradient(), A @ (theta + rho * A @ theta / (A @ theta).norm()), rtol=1e-13, atol=0)


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("build", [gradreg.fgr, gradreg.bgr, gradreg.cgr])
def test_squared_penalties_give_g_plus_gamma_A_g(build, epsilon: float) -> None:
    model, gamma = Quadratic(), 0.9
    g = model.A @ model.theta.detach()
    GradientRegularizer(model, build(gamma=gamma, epsilon=epsilon)).backward(model)
    torch.testing.assert_close(model.gradient(), g + gamma * model.A @ g, rtol=1e-12, atol=0)


def test_double_backprop_gives_g_plus_gamma_A_g() -> None:
    model, gamma = Quadratic(), 0.9
    g = model.A @ model.theta.detach()
    GradientRegularizer(model, gradreg.exact(gamma=gamma)).backward(model)
    torch.testing.assert_close(model.gradient(), g + gamma * model.A @ g, rtol=1e-13, atol=0)


@pytest.mark.parametrize("difference", ["forward", "backward", "central"])
def test_norm_penalties_give_g_plus_lambda_A_unit_g(difference) -> None:
    model = Quadratic()
    g = model.A @ model.theta.detach()
    GradientRegularizer(model, GradientPenalty(power=1, strength=0.9, radius=0.4, difference=difference)).backward(model)
    torch.testing.assert_close(model.gradient(), g + 0.9 * model.A @ g / g.norm(), rtol=1e-12, atol=0)


def test_unit_mixing_takes_the_normalised_plain_gradient() -> None:
    model, r, alpha = Quadratic(), 0.4, 0.8
    g = model.A @ model.theta.detach()
    GradientRegularizer(model, gradreg.gnp(r=r, alpha=alpha, mixing="unit")).backward(model)
    expected = (1 - alpha) * g / g.norm() + alpha * (g + r * model.A @ g / g.norm())
    torch.testing.assert_close(model.gradient(), expected, rtol=1e-13, atol=0)


@every_base_penalty
def test_every_penalty_at_a_step_of_its_schedule(penalty: GradientPenalty) -> None:
    model, step = Quadratic(), 7
    g = model.A @ model.theta.detach()
    d = g / g.norm() if penalty.power == 1 else g
    expected = g + penalty.strength_at(step) * model.A @ d
    if penalty.mixing == Unit():
        c = penalty.coefficient_at(step)
        assert c is not None
        expected += (1 - c) * (g / g.norm() - g)
    regularizer_at(step, model, penalty).backward(model)
    torch.testing.assert_close(model.gradient(), expected, rtol=1e-12, atol=0)


class LargeDiagonal(nn.Module):
    """½Σaθ² over one large parameter, whose memory is swapped while it is perturbed, and a small one, which is copied."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.a = torch.rand(40_010, dtype=torch.float64, generator=generator)
        self.large = nn.Parameter(torch.randn(200, 200, dtype=torch.float64, generator=generator))
        self.small = nn.Parameter(torch.randn(10, dtype=torch.float64, generator=generator))

    def forward(self) -> Tensor:
        return 0.5 * (self.a * torch.cat([self.large.flatten(), self.small]) ** 2).sum()


@pytest.mark.parametrize("constructor", [gradreg.fgr, gradreg.bgr, gradreg.cgr])
def test_large_parameters_are_perturbed_as_small_ones_are(constructor) -> None:
    model = LargeDiagonal()
    before = [p.detach().clone() for p in model.parameters()]
    GradientRegularizer(model, constructor(gamma=0.5, epsilon=0.25)).backward(model)
    theta = torch.cat([p.flatten() for p in before])
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients, model.a * theta + 0.5 * model.a**2 * theta, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
