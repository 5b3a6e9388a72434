"""What cannot be measured, and what a reader of the numbers must know, is said in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradreg import sharpness

from .cases import Case, convolutions, mlp
from .test_unchanged import MEASURES

CURVATURES = {name: MEASURES[name] for name in ("eigenvalues", "differences", "trace", "spectrum", "operator")}
every_curvature = pytest.mark.parametrize("measure", CURVATURES.values(), ids=CURVATURES)


def linear(criterion: Callable[..., Tensor]) -> Case:
    torch.manual_seed(0)
    return Case(nn.Linear(4, 1).double(), torch.randn(9, 4).double(), torch.randn(9, 1).double(), criterion)


@every_curvature
@pytest.mark.parametrize(
    "criterion",
    [nn.functional.l1_loss, lambda p, y: torch.relu(1 - p * y.sign()).mean(), lambda p, y: (p * y).mean()],
    ids=["l1", "hinge", "linear"],
)
def test_a_loss_without_second_derivative(measure: Callable[..., Any], criterion: Callable[..., Tensor]) -> None:
    case = linear(criterion)
    if measure is CURVATURES["differences"] and criterion is not nn.functional.l1_loss:
        return  # a few rows may cross the kink of a hinge: below
    with pytest.raises(ValueError, match=r"the loss has no second derivative to measure.*Use sam_sharpness"):
        measure(case.model, case.closure())
    assert sharpness.sam_sharpness(case.model, case.closure(), rho=0.5).value > 0


def test_gauss_newton_of_a_loss_without_second_derivative() -> None:
    for criterion in (nn.functional.l1_loss, lambda p, y: (p * y).mean()):
        case = linear(criterion)
        with pytest.raises(ValueError, match="second derivative"):
            sharpness.eigenvalues(case.model, case.with_outputs(), curvature="gauss-newton")


def test_differences_that_do_not_settle_warn() -> None:
    """A closure with a generator of its own is another function each time."""
    torch.manual_seed(0)
    model = nn.Linear(50, 1).double()
    x = torch.randn(30, 50).double()
    own = torch.Generator().manual_seed(0)
    closure = lambda: model(x).square().mean() + (model.weight * torch.randn(50, generator=own)).sum()  # noqa: E731
    with pytest.warns(UserWarning, match="Differences do not settle.*be random"):
        found = sharpness.trace(model, closure, products="differences", samples=1)
    assert any("do not settle" in note for note in found.notes)
    assert found.product_error > 0.3


@every_curvature
def test_curvature_that_is_not_a_number(measure: Callable[..., Any]) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))

        def forward(self) -> Tensor:
            return self.w.pow(1.5).sum() + self.w.sum()

    model = Root()
    way = "not defined all around" if measure is CURVATURES["differences"] else "no second derivative"
    with pytest.raises(ValueError, match=f"curvature must be finite.*{way}"):
        measure(model, model)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_weights_that_have_diverged(measure: Callable[..., Any]) -> None:
    case = mlp()
    with torch.no_grad():
        case.model[4].weight[0, 0] = float("nan")  # type: ignore[index, union-attr]
    if measure is MEASURES["directional"]:
        return  # which names a parameter of another model
    with pytest.raises(ValueError, match="the loss must be finite at the parameters as they are; got nan"):
        measure(case.model, case.closure())


def test_a_gradient_that_is_not_a_number_is_named() -> None:
    model = nn.Linear(2, 1).double()
    nn.init.zeros_(model.bias)
    closure = lambda: model.weight.square().sum() + model.bias.square().sum().sqrt()  # noqa: E731
    with pytest.raises(ValueError, match=r"the gradient must be finite.*'bias'"):
        sharpness.trace(model, closure)


def test_a_batch_without_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # every unit is dead
        model[2].bias.zero_()
    x = torch.randn(5, 3).double()
    closure = lambda: model(x).square().mean()  # noqa: E731
    with pytest.raises(ValueError, match=r"the gradient must not be zero.*random_sharpness"):
        sharpness.sam_sharpness(model, closure, rho=0.1)
    with pytest.raises(ValueError, match="update must be finite and not zero"):
        sharpness.critical_sharpness(model, closure)
    with pytest.warns(UserWarning, match="exactly zero.*dead units"):
        found = sharpness.eigenvalues(model, closure)
    assert float(found.values) == pytest.approx(2.0)  # of the last bias alone: a minimum has curvature
    other = lambda: (model(x) - 1).square().mean()  # noqa: E731
    with pytest.warns(UserWarning, match="its rise counts as 0"):
        each = sharpness.sam_sharpness(model, [closure, other], rho=0.1, perturb="each")
    assert each.samples[0] == 0 < each.samples[1]


def test_batchnorm_in_train_mode_is_said() -> None:
    case = convolutions()
    case.model.train()
    with pytest.warns(UserWarning, match="BatchNorm2d in train mode normalizes by the statistics of each batch.*mode='eval'"):
        found = sharpness.eigenvalues(case.model, case.closure(), tolerance=0.1)
    assert found.mode == "train"
    meant = sharpness.eigenvalues(case.model, case.closure(), tolerance=0.1, mode="train")
    assert any("couples the samples" in note for note in meant.notes)
    quiet = sharpness.eigenvalues(case.model, case.closure(), tolerance=0.1, mode="eval")
    assert (quiet.mode, quiet.notes) == ("eval", ())
    assert float(quiet.values) != pytest.approx(float(found.values), rel=0.01)


def test_dropout_in_train_mode_is_said() -> None:
    case = mlp()
    case.model.insert(2, nn.Dropout(0.5))  # type: ignore[operator]
    found = sharpness.sam_sharpness(case.model, case.closure(), rho=0.1)
    assert any("one draw of its masks" in note for note in found.notes)
    case.model[2].eval()  # type: ignore[index, union-attr]
    mixed = sharpness.sam_sharpness(case.model, case.closure(), rho=0.1)
    assert (mixed.mode, mixed.notes) == ("mixed", ())


def test_critical_sharpness_of_losses_that_never_rise_or_never_fall() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    with pytest.raises(ValueError, match="the loss must rise somewhere along the update"):
        sharpness.critical_sharpness(model, lambda: (-model.weight).exp().sum())
    with pytest.raises(ValueError, match="update must decrease the loss to first order"):
        sharpness.critical_sharpness(model, lambda: (-model.weight).exp().sum(), [-torch.ones(1, 1).double()])
    kinked = lambda: torch.where(model.weight < float(model.weight.detach()), 1.0, 0.0).sum() * 0 + Cliff.apply(model.weight)  # noqa: E731
    with pytest.raises(ValueError, match="the loss must fall somewhere along the update"):
        sharpness.critical_sharpness(model, kinked)


class Cliff(torch.autograd.Function):
    """Rises on either side of where it is first evaluated, and claims a slope there."""

    start: Tensor | None = None

    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        if Cliff.start is None:
            Cliff.start = w.detach().clone()
        return (w - Cliff.start).abs().sum()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        return gradients[0].expand(1, 1)


CASE = mlp()
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "model": (lambda: sharpness.trace([CASE.model], CASE.closure()), TypeError, "model must be a torch.nn.Module"),  # type: ignore[list-item]
    "closure": (lambda: sharpness.trace(CASE.model, 3), TypeError, "closure must be a callable"),  # type: ignore[arg-type]
    "loss": (lambda: sharpness.trace(CASE.model, lambda: 3.0), TypeError, "closure must return the loss as a tensor"),
    "scalar": (lambda: sharpness.trace(CASE.model, lambda: CASE.model(CASE.x)), ValueError, "closure must return a scalar loss"),
    "detached": (
        lambda: sharpness.trace(CASE.model, lambda: CASE.closure()().detach()),
        ValueError,
        "closure must return a loss that requires grad",
    ),
    "unreached": (
        lambda: sharpness.trace(CASE.model, lambda: torch.ones((), requires_grad=True) * 2),
        ValueError,
        "closure must reach a selected parameter",
    ),
    "none selected": (
        lambda: sharpness.trace(CASE.model, CASE.closure(), parameters=lambda n, p: False),
        ValueError,
        "parameters must select at least one",
    ),
    "k": (lambda: sharpness.eigenvalues(CASE.model, CASE.closure(), k=0), ValueError, "k must be >= 1"),
    "k above": (lambda: sharpness.eigenvalues(CASE.model, CASE.closure(), k=10**6), ValueError, "k must be at most the number of coord"),
    "rho": (lambda: sharpness.sam_sharpness(CASE.model, CASE.closure(), rho=0), ValueError, "rho must be finite and > 0"),
    "mode": (lambda: sharpness.trace(CASE.model, CASE.closure(), mode="test"), ValueError, "unknown mode 'test'"),  # type: ignore[arg-type]
    "sizes": (lambda: sharpness.trace(CASE.model, CASE.closure(), sizes=[1, 2]), ValueError, "sizes must hold one number for each closure"),
    "curvature": (
        lambda: sharpness.trace(CASE.model, CASE.closure(), curvature="fisher"),  # type: ignore[arg-type]
        ValueError,
        "unknown curvature 'fisher'",
    ),
    "no outputs": (
        lambda: sharpness.trace(CASE.model, CASE.closure(), curvature="gauss-newton"),
        ValueError,
        r"closure must return \(loss, outputs\) for Gauss-Newton",
    ),
    "other outputs": (
        lambda: sharpness.trace(CASE.model, lambda: (CASE.closure()(), CASE.model(CASE.x)), curvature="gauss-newton"),
        ValueError,
        "closure must compute its loss from the outputs",
    ),
    "step with exact": (
        lambda: sharpness.trace(CASE.model, CASE.closure(), products="exact", step=0.1),
        ValueError,
        "step must be left out with products='exact'",
    ),
    "direction": (
        lambda: sharpness.directional_sharpness(CASE.model, CASE.closure(), direction={"9.weight": torch.ones(1)}, rho=1),
        ValueError,
        "direction must be a dictionary of tensors by parameter name.*'9.weight'",
    ),
    "direction's shape": (
        lambda: sharpness.slice_1d(CASE.model, CASE.closure(), direction={"4.bias": torch.ones(1)}),
        ValueError,
        r"direction must hold for '4.bias' a tensor of shape \(4,\)",
    ),
    "zero direction": (
        lambda: sharpness.directional_sharpness(CASE.model, CASE.closure(), direction={"4.bias": torch.zeros(4)}, rho=1),
        ValueError,
        "direction must be finite and not zero",
    ),
    "biases alone": (
        lambda: sharpness.slice_1d(CASE.model, CASE.closure(), parameters=lambda n, p: p.dim() == 1),
        ValueError,
        "not zero after normalization 'filter'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call()


def test_complex_parameters() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    with pytest.raises(TypeError, match="complex parameter 'weight'"):
        sharpness.trace(model, lambda: model.weight.abs().sum())


def test_an_iteration_that_is_cut_short() -> None:
    case = mlp()
    with pytest.warns(UserWarning, match="The iteration has not converged in 3 products"):
        found = sharpness.eigenvalues(case.model, case.closure(), limit=3, tolerance=1e-6)
    assert not found.converged
    assert float(found.errors) > 0.01


def test_what_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'flatness'"):
        sharpness.flatness  # noqa: B018
    assert all(getattr(sharpness, name) is not None for name in sharpness.__all__)


def test_a_matrix_with_one_eigenvalue_alone() -> None:
    """The iteration ends after one product, whose eigenvalue is exact."""
    model = nn.Linear(3, 1, bias=False).double()
    for which in ("largest", "smallest"):
        found = sharpness.eigenvalues(model, lambda: model.weight.square().sum(), which=which)  # type: ignore[arg-type]
        assert found.values.tolist() == pytest.approx([2.0], abs=1e-12)
