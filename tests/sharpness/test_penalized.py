"""The curvature under a penalty: a quadratic's h(1 + γh) exactly, a network's against the derivative of the penalty's formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg import GradientPenalty, sharpness

from .cases import convolutions

CURVATURES = torch.tensor([4.0, 1.5, -2.0], dtype=torch.float64)


def quadratic(place: list[float]) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Module()
    model.p = nn.Parameter(torch.tensor(place, dtype=torch.float64))
    return model, lambda: (CURVATURES * model.p**2).sum() / 2


def axis(i: int) -> dict[str, Tensor]:
    return {"p": 3.0 * torch.eye(3, dtype=torch.float64)[i]}


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize(
    "penalty",
    [
        gradreg.fgr(gamma=0.3, epsilon=0.7),
        gradreg.bgr(gamma=0.3, epsilon=0.7),
        gradreg.cgr(gamma=0.3, epsilon=0.7),
        gradreg.exact(gamma=0.3),
        gradreg.sam(rho=0.4),
        gradreg.gnp(r=0.4, alpha=0.6),
        gradreg.exact(gamma=0.4, power=1),
    ],
    ids=str,
)
def test_a_quadratic_is_known(penalty: GradientPenalty, i: int) -> None:
    model, closure = quadratic([0.3, -0.2, 0.5])
    norm = float((CURVATURES * model.p.detach()).norm())
    found = sharpness.penalized_curvature(model, closure, penalty, axis(i))
    gamma = penalty.strength_at(0) / (norm if penalty.power == 1 else 1.0)
    h = float(CURVATURES[i])
    assert found.gamma == pytest.approx(gamma)
    assert found.plain == pytest.approx(h, rel=1e-8)
    assert found.value == pytest.approx(h * (1 + gamma * h), rel=1e-8)
    assert found.error < 1e-6
    radius = penalty.radius_at(0)
    assert found.perturbation == pytest.approx(0.0 if radius is None else radius * (1.0 if penalty.power == 1 else norm))


@pytest.mark.parametrize("power", [1, 2])
def test_a_network_is_measured_a_perturbation_away(power: int) -> None:
    """vᵀ∂G/∂θ v = (1 − c)vᵀHv + c·vᵀH(θ + εg)(v + εHv), with Hessians by double backward of a loss written apart from the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = torch.randn(15, 4).double(), torch.randn(15, 1).double()
    names, sizes = [n for n, _ in model.named_parameters()], [p.numel() for p in model.parameters()]

    def loss(vector: Tensor) -> Tensor:
        parts = {n: part.view_as(p) for n, part, p in zip(names, vector.split(sizes), model.parameters(), strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(model, parts, (x,)), y)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    v = torch.randn(len(theta)).double()
    v /= v.norm()
    gradient = torch.func.grad(loss)
    g = gradient(theta)
    penalty = gradreg.sam(rho=0.3) if power == 1 else gradreg.fgr(gamma=0.2, epsilon=0.5)
    epsilon, c = (0.3 / float(g.norm()), 1.0) if power == 1 else (0.5, 0.4)
    products = lambda at, u: torch.autograd.functional.hvp(loss, at, u)[1]  # noqa: E731
    wanted = (1 - c) * v @ products(theta, v) + c * v @ products(theta + epsilon * g, v + epsilon * products(theta, v))
    split = dict(zip(names, (part.view_as(p) for part, p in zip(v.split(sizes), model.parameters(), strict=True)), strict=True))
    closures = [lambda: nn.functional.mse_loss(model(x[:5]), y[:5]), lambda: nn.functional.mse_loss(model(x[5:]), y[5:])]
    found = sharpness.penalized_curvature(model, closures, penalty, split, sizes=[5, 10], move=1e-4)
    assert found.value == pytest.approx(float(wanted), rel=1e-6)
    assert found.plain == pytest.approx(float(v @ products(theta, v)), rel=1e-6)
    assert abs(found.value - found.plain) > 0.01
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), theta)
    assert all(p.grad is None for p in model.parameters())


def test_buffers_gradients_and_random_numbers_are_left_alone() -> None:
    case = convolutions()
    case.model.train()
    kept = [p.grad for p in case.model.parameters()]
    before = {name: t.clone() for name, t in case.model.state_dict().items()}
    state = torch.get_rng_state()
    direction = {n: torch.ones_like(p) for n, p in case.model.named_parameters()}
    sharpness.penalized_curvature(case.model, case.closure(), gradreg.sam(rho=0.1), direction, mode="train")
    assert all(torch.equal(t, before[name]) for name, t in case.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.grad for p in case.model.parameters()] == kept


def test_what_has_no_penalized_curvature_is_said() -> None:
    model, closure = quadratic([0.3, -0.2, 0.5])
    late = gradreg.sam(rho=0.1).warmup("zero", steps=5)
    with pytest.raises(ValueError, match=r"penalty must act at step 2.*Take a later step: at="):
        sharpness.penalized_curvature(model, closure, late, axis(0), at=2)
    assert sharpness.penalized_curvature(model, closure, late, axis(0), at=5).value > 4.0
    with pytest.raises(ValueError, match="direction must not be zero"):
        sharpness.penalized_curvature(model, closure, late, {"p": torch.zeros(3).double()}, at=5)
    with pytest.raises(ValueError, match="move must be finite and > 0"):
        sharpness.penalized_curvature(model, closure, late, axis(0), at=5, move=0.0)
    flat, closure = quadratic([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="the gradient must not be zero for a power of 1"):
        sharpness.penalized_curvature(flat, closure, gradreg.sam(rho=0.1), axis(0))
