"""What brings a radius back that has left the region where the loss and the gradients of the perturbed point mean something."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg import AutoRadius
from gradreg.torch import GradientRegularizer

from .cases import assert_close, gradients, tanh_problem
from .test_auto_radius import accelerated  # noqa: F401  # every test runs twice


class Cliff(nn.Module):
    """½‖w‖² inside of a ball of radius ``edge``, infinite outside of it."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.w, self.edge = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)), edge
        self.unperturbed = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def forward(self) -> Tensor:
        inside = 0.5 * self.w.square().sum() + 0.5 * self.unperturbed.square().sum()
        return inside if float(self.w.detach().norm()) < self.edge else inside * torch.inf


@pytest.mark.parametrize("difference", ["sam", "gnp", "cgr", "gsam"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_radius_that_leaves_the_loss_comes_back(difference: str, earlier: bool) -> None:
    """Where the loss at the perturbed point is infinite, the step gives the plain gradient and the radius is halved."""
    auto = AutoRadius(start=4.0, target=0.5)
    penalty = {
        "sam": gradreg.sam(rho=auto),
        "gnp": gradreg.gnp(r=auto, alpha=0.8),
        "cgr": gradreg.cgr(epsilon=auto),
        "gsam": gradreg.gsam(rho=auto, a=0.3),
    }[difference]
    model = Cliff(edge=4.0)
    regularizer = GradientRegularizer(model, penalty, parameters=lambda name, p: name == "w")
    before = model.w.detach().clone()
    halvings = 0
    for _ in range(6):
        was = regularizer.state_dict()["radius"]["log_radius"]
        for p in model.parameters():
            p.grad = torch.full_like(p, 3.0) if earlier else None
        loss = regularizer.backward(model)
        assert float(loss) == pytest.approx(2.625)
        assert torch.equal(model.w, before)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())  # type: ignore[arg-type]
        change = regularizer.state_dict()["radius"]["log_radius"] - was
        if change == pytest.approx(-math.log(2.0)):
            halvings += 1
            assert_close(gradients(model), {name: p.detach() + 3.0 * earlier for name, p in model.named_parameters()})
        else:
            assert abs(change) <= 0.05 + 1e-12
    assert halvings == {"sam": 2, "gnp": 2, "cgr": 3, "gsam": 2}[difference]


class Wave(nn.Module):
    """sin(w): two periods further the gradient is as at w, whatever the loss did on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))

    def forward(self) -> Tensor:
        return torch.sin(self.w).sum()


def radii_of(regularizer: GradientRegularizer, closure: Any, steps: int) -> list[float]:
    """The radius of each of ``steps`` steps at resting parameters."""
    found: list[float] = []
    for _ in range(steps):
        regularizer.model.zero_grad()
        regularizer.backward(closure)
        found.append(regularizer.metrics.radius)
    return found


def test_a_step_backward_that_passes_the_valley_is_halved_and_left_out() -> None:
    """On ½θ² a step of 1.5·g back from 2 ends at −1, where the gradient is opposed; forward and shorter ones are not."""
    for penalty, expected in ((gradreg.bgr(epsilon=AutoRadius(start=1.5)), 2.0), (gradreg.fgr(epsilon=AutoRadius(start=1.5)), 5.0)):
        p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        regularizer = GradientRegularizer(nn.ParameterList([p]), penalty)
        regularizer.backward(lambda p=p: 0.5 * p.square().sum())
        assert p.grad is not None
        assert float(p.grad) == pytest.approx(expected)
        after = regularizer.state_dict()["radius"]["log_radius"]
        assert after == pytest.approx(math.log(1.5 / 2) if expected == 2.0 else math.log(1.5) + 0.05)
    shorter = GradientRegularizer(nn.ParameterList([p]), gradreg.bgr(epsilon=AutoRadius(start=0.5)))
    p.grad = None
    shorter.backward(lambda p=p: 0.5 * p.square().sum())
    assert p.grad is not None
    assert float(p.grad) == pytest.approx(3.0)


@pytest.mark.parametrize("seed", range(3))
def test_backward_differences_do_not_leave_a_plateau_for_good(seed: int) -> None:
    """Two hundred steps of a small network: the radius grows on a plateau, and where that ends the gradient turns within five steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    x, y = torch.randn(64, 3), 2 * torch.randn(64, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = GradientRegularizer(model, gradreg.bgr(epsilon=AutoRadius()))
    losses, radii = [], []
    for _ in range(200):
        optimizer.zero_grad()
        losses.append(float(regularizer.backward(lambda: nn.functional.mse_loss(model(x), y))))
        radii.append(regularizer.metrics.radius)
        optimizer.step()
    assert max(radii) > 1.0, "the plateau"
    assert min(pair[1] / pair[0] for pair in pairwise(radii)) == pytest.approx(0.5, rel=1e-3), "its end"
    assert losses[-1] < losses[0]
    assert max(losses) < 1.1 * losses[0]


@pytest.mark.parametrize("rate", [1.0, 1.8])
def test_beyond_the_edge_of_stability_it_comes_back(rate: float) -> None:
    """½θ² at the learning rate ``rate``: F-GR's step is rate·(1 + ε)·θ, which overshoots more than θ itself from ε = 2/rate − 1 on."""
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    regularizer = GradientRegularizer(nn.ParameterList([p]), gradreg.auto())
    optimizer = torch.optim.SGD([p], lr=rate)
    radii, sizes = [], []
    for _ in range(600):
        optimizer.zero_grad()
        regularizer.backward(lambda: 0.5 * p.square().sum())
        optimizer.step()
        radii.append(regularizer.metrics.radius)
        sizes.append(p.detach().abs().item())
    assert max(radii) > 2 / rate - 1, "the alignment is 1 at every radius"
    assert min(pair[1] / pair[0] for pair in pairwise(radii)) == pytest.approx(0.5, rel=1e-9)
    assert max(sizes) < 10.0
    assert max(sizes[-100:]) < 1e-3


def test_steps_that_grow_in_a_network_come_back() -> None:
    """At half of the learning rate at which plain training diverges; the radius shrinks by 5 % a step too slowly there."""
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.auto())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.5)
    losses, radii = [], []
    for _ in range(200):
        optimizer.zero_grad()
        losses.append(float(regularizer.backward(problem.closure())))
        optimizer.step()
        radii.append(regularizer.metrics.radius)
    assert min(pair[1] / pair[0] for pair in pairwise(radii)) == pytest.approx(0.5, rel=1e-9)
    assert losses[0] < max(losses) < 1000.0
    assert losses[-1] < losses[0]


def test_a_loss_that_falls_uphill_shrinks_the_radius() -> None:
    """The alignment is 1 far outside; that the loss is lower there, at more than three of four steps, brings the radius back."""
    model = Wave()
    far = AutoRadius(start=4 * math.pi - 1.0, upper=20.0, gain=0.001)
    radii = radii_of(GradientRegularizer(model, gradreg.sam(rho=far)), model, 30)
    assert all(b > a for a, b in pairwise(radii[:14]))  # 0.9^13 > 1/4
    assert all(b < a for a, b in pairwise(radii[14:]))


def test_a_loss_that_rises_much_faster_than_predicted_shrinks_the_radius() -> None:
    """Along the axis of a quartic the two gradients are parallel at any radius; its loss is not to be trusted at all of them."""
    model = Wave()

    def quartic() -> Tensor:
        return (model.w**4).sum()

    radii = radii_of(GradientRegularizer(model, gradreg.sam(rho=AutoRadius(start=1.0))), quartic, 60)
    assert all(b < a for a, b in pairwise(radii[:20]))
    # (w + r)⁴ − w⁴ = 2·4w³·r at the radius about which it then settles.
    assert ((0.3 + radii[-1]) ** 4 - 0.3**4) / (4 * 0.3**3 * radii[-1]) == pytest.approx(2.0, abs=0.2)


def test_with_a_scaler_an_overflow_is_the_scalers() -> None:
    """A gradient that is not finite stays, so that the scaler skips the step; an infinite loss still halves the radius."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    model = Cliff(edge=4.0)
    regularizer = GradientRegularizer(model, gradreg.sam(rho=AutoRadius(start=4.0)))
    regularizer.backward(model, scaler=scaler)
    assert not torch.isfinite(model.w.grad).all()  # type: ignore[union-attr]
    assert regularizer.metrics.radius == pytest.approx(4.0)
    assert math.exp(regularizer.state_dict()["radius"]["log_radius"]) == pytest.approx(2.0)
