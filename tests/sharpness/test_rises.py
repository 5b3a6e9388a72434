"""What losses say of sharpness: SAM-sharpness, directions, critical sharpness and slices, against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradreg import sharpness

from .cases import Case, convolutions, known, mlp


def moved(case: Case, direction: dict[str, Tensor], step: float, closure: Callable[[], Tensor] | None = None) -> float:
    """The loss at θ + step·direction, by changing a copy of the parameters' values."""
    values = {name: p + step * direction[name] for name, p in case.values.items()}
    if closure is None:
        return float(case.criterion(torch.func.functional_call(case.model, values, (case.x,)), case.y))
    with torch.no_grad():
        before = case.values
        before = {n: v.clone() for n, v in before.items()}
        for n, p in case.model.named_parameters():
            p.copy_(values[n])
        found = float(closure().detach())
        for n, p in case.model.named_parameters():
            p.copy_(before[n])
    return found


def gradient(case: Case, closure: Callable[[], Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(closure(), list(case.model.parameters()))
    return dict(zip(case.values, found, strict=True))


def norm(tree: dict[str, Tensor]) -> float:
    return float(torch.cat([v.reshape(-1) for v in tree.values()]).norm())


def test_sam_sharpness_is_its_definition() -> None:
    case = mlp()
    g = gradient(case, case.closure())
    found = sharpness.sam_sharpness(case.model, case.closure(), rho=0.3)
    loss = float(case.closure()().detach())
    assert found.value == pytest.approx(moved(case, g, 0.3 / norm(g)) - loss, rel=1e-12)
    assert (found.loss, found.gradient_norm, found.rho) == (pytest.approx(loss), pytest.approx(norm(g)), 0.3)
    assert found.first_order == pytest.approx(0.3 * norm(g))
    assert found.shares["0.weight"] == pytest.approx(float((g["0.weight"] / norm(g)).square().sum()))
    assert (found.passes.forward, found.passes.backward) == (2, 1)
    assert (found.method, found.standard_error) == ("losses", None)


def test_the_m_version_perturbs_each_closure_by_its_own_gradient() -> None:
    case = mlp()
    rows = [slice(0, 10), slice(10, 30), slice(30, 48)]
    rises = []
    for r in rows:
        g = gradient(case, case.closure(r))
        rises.append(moved(case, g, 0.3 / norm(g), case.closure(r)) - float(case.closure(r)().detach()))
    closures = [case.closure(r) for r in rows]
    each = sharpness.sam_sharpness(case.model, closures, rho=0.3, perturb="each", sizes=[10, 20, 18])
    assert each.samples == pytest.approx(rises, rel=1e-10)
    assert each.value == pytest.approx(np.dot([10, 20, 18], rises) / 48)
    assert each.worst == pytest.approx(max(rises))
    together = sharpness.sam_sharpness(case.model, closures, rho=0.3, sizes=[10, 20, 18])
    assert together.value == pytest.approx(sharpness.sam_sharpness(case.model, case.closure(), rho=0.3).value, rel=1e-9)
    assert each.value > together.value  # each climbs its own loss
    weights = np.array([10, 20, 18]) / 48
    assert each.standard_error == pytest.approx(np.std(rises, ddof=1) * np.sqrt((weights**2).sum()))


def test_random_directions_rise_by_the_trace() -> None:
    truth = known("mlp")
    rho = 0.05
    found = sharpness.random_sharpness(truth.case.model, truth.case.closure(), rho=rho, samples=200)
    gradient_part = found.gradient_norm * rho / math.sqrt(len(truth.values))  # the spread of the first-order part
    assert found.standard_error == pytest.approx(gradient_part / 200**0.5, rel=0.2)
    expected = rho**2 / 2 * float(truth.matrix.trace()) / len(truth.values)
    assert abs(found.value - expected) < 3.5 * found.standard_error
    assert found.worst == max(found.samples)


def test_a_given_direction_shows_its_curvature() -> None:
    truth = known("mlp")
    top = sharpness.eigenvalues(truth.case.model, truth.case.closure(), tolerance=1e-10)
    found = sharpness.directional_sharpness(truth.case.model, truth.case.closure(), direction=top.vectors[0], rho=1e-3)
    assert found.value == pytest.approx(0.5e-6 * float(truth.values[-1]), rel=1e-4)
    listed = sharpness.directional_sharpness(truth.case.model, truth.case.closure(), direction=list(top.vectors[0].values()), rho=1e-3)
    assert listed.samples == found.samples
    assert found.shares == pytest.approx(top.shares[0])


class Quadratic(nn.Module):
    """½θᵀAθ with a diagonal A."""

    def __init__(self, curvatures: list[float], start: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.curvatures = curvatures

    def loss(self) -> Tensor:
        return 0.5 * (torch.tensor(self.curvatures, dtype=torch.float64) * self.w.square()).sum()


def test_critical_sharpness_of_a_quadratic_is_the_curvature_along_the_update() -> None:
    model = Quadratic([4.0, 1.0, 0.5], [1.0, 2.0, -3.0])
    g = np.array([4.0, 2.0, -1.5])
    along = (g**2 * [4.0, 1.0, 0.5]).sum() / (g**2).sum()
    found = sharpness.critical_sharpness(model, model.loss, tolerance=1e-3)
    assert found.value == pytest.approx(along, rel=1e-6)
    low, high = found.bracket
    assert low < 2 / along < high <= low * 1.001 * (1 + 1e-8)
    update = {"w": torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)}
    assert sharpness.critical_sharpness(model, model.loss, update).value == pytest.approx(4.0 / 4.0, rel=1e-6)


@pytest.mark.parametrize("start", [None, 1e-4, 1.0, 1e4])
def test_critical_sharpness_of_a_network_brackets_the_crossing(start: float | None) -> None:
    case = convolutions()
    g = gradient(case, case.closure())
    loss = float(case.closure()().detach())
    found = sharpness.critical_sharpness(case.model, case.closure(), start=start)
    low, high = found.bracket
    assert moved(case, g, -low) < loss < moved(case, g, -high)
    assert high / low <= 1.05 * (1 + 1e-8)
    assert low < found.learning_rate < high
    again = sharpness.critical_sharpness(case.model, case.closure(), start=found.learning_rate * 1.03)
    assert again.passes.forward <= 6  # with the gradient's own
    assert again.value == pytest.approx(found.value, rel=0.05)


def test_slices_are_the_losses_along_a_filter_normalized_direction() -> None:
    case = convolutions()
    found = sharpness.slice_1d(case.model, case.closure(), points=5, extent=0.5)
    assert found.positions.tolist() == [-0.5, -0.25, 0, 0.25, 0.5]
    assert found.losses[2] == float(case.closure()().detach())
    # Each filter of the direction has the parameters' own length, so together they have the length of all weights.
    weights = [p.detach() for p in case.model.parameters() if p.dim() > 1]
    assert found.length == pytest.approx(float(torch.cat([w.reshape(-1) for w in weights]).norm()))
    raw = {name: torch.randn_like(p) for name, p in case.values.items()}
    scaled = {}
    for name, d in raw.items():
        p, dims = case.values[name], tuple(range(1, d.dim()))
        length = torch.linalg.vector_norm
        scaled[name] = d * length(p, dim=dims, keepdim=True) / length(d, dim=dims, keepdim=True) if dims else torch.zeros_like(d)
    given = sharpness.slice_1d(case.model, case.closure(), direction=raw, points=3)
    assert given.losses.tolist() == pytest.approx([moved(case, scaled, -1), found.loss, moved(case, scaled, 1)], rel=1e-12)
    plain = sharpness.slice_1d(case.model, case.closure(), direction=raw, normalization="none", points=3, extent=0.1)
    assert plain.losses[0] == pytest.approx(moved(case, raw, -0.1), rel=1e-12)
    by_tensor = sharpness.slice_1d(case.model, case.closure(), normalization="parameter", points=3)
    assert by_tensor.length == pytest.approx(norm(case.values))


def test_filter_normalization_does_not_see_the_scale_of_weights() -> None:
    """Weights before a BatchNorm times ten: the same function, and the same slice; the eigenvalue is not the same."""
    case = convolutions()
    case.model.train()
    before = sharpness.slice_1d(case.model, case.closure(), points=5, extent=0.3, mode="train")
    sharp = sharpness.eigenvalues(case.model, case.closure(), mode="train", parameters=lambda n, p: n == "0.weight")
    with torch.no_grad():
        case.model[0].weight.mul_(10)  # type: ignore[index, union-attr, operator]
        case.model[0].bias.mul_(10)  # type: ignore[index, union-attr, operator]
    after = sharpness.slice_1d(case.model, case.closure(), points=5, extent=0.3, mode="train")
    np.testing.assert_allclose(after.losses, before.losses, rtol=1e-4)
    flatter = sharpness.eigenvalues(case.model, case.closure(), mode="train", parameters=lambda n, p: n == "0.weight")
    assert float(flatter.values) == pytest.approx(float(sharp.values) / 100, rel=0.01)
