"""Norms that underflow, where the perturbation must never be longer than the radius, and radii that the parameters cannot hold."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from .cases import (
    DURING_WARMUP,
    PENALTIES,
    assert_close,
    each_trait,
    gradients,
    regularizer_at,
    tanh_problem,
)

TINY = [1e-19, 1e-21, 1e-23, 1e-25, 1e-27, 1e-30]
NORMALISED = ("sam", "gnp", "gnp-unit", "asam", "asam-everywhere", "layerwise", "friendly", "norm-central", "sam-3-steps", "gsam")


class Tiny(nn.Module):
    """A loss that is ``scale`` times something of ordinary size, in float32, of two parameters."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a, self.b = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), nn.Parameter(torch.tensor([[0.5, -1.0]]))
        self.at: list[Tensor] = []

    def forward(self) -> Tensor:
        self.at.append(torch.cat([self.a.detach(), self.b.detach().flatten()]))
        target = torch.tensor([2.0, 1.0, 0.0])
        return ((self.a - target).square().sum() + (self.a[:2] * self.b).sum() ** 2) * self.scale


@pytest.mark.parametrize("scale", TINY)
@pytest.mark.parametrize("name", NORMALISED)
def test_a_perturbation_is_never_longer_than_the_radius_however_small_the_gradient(name: str, scale: float) -> None:
    """A normalised direction does not depend on the scale of the loss; where the gradient underflows it may be shorter, never longer."""
    penalty, model, ordinary = PENALTIES[name], Tiny(scale), Tiny(1.0)
    for one in (model, ordinary):
        regularizer_at(100, one, penalty).backward(one)
    asked = [at - ordinary.at[0] for at in ordinary.at[1:]]
    moved = [at - model.at[0] for at in model.at[1:]]
    assert len(asked) == len(moved)
    for there, here in zip(asked, moved, strict=True):
        assert float(here.norm()) <= float(there.norm()) * (1 + 1e-4)
        if float(here.norm()) > 1e-3 * float(there.norm()):
            assert float(torch.cosine_similarity(here, there, dim=0)) > 0.999
    if scale >= 1e-25:  # a norm is representable, and a length of the radius with it
        assert float(moved[0].norm()) == pytest.approx(float(asked[0].norm()), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-18, 1e-19, 1e-21, 1e-23, 1e-25])
@pytest.mark.parametrize("name", ["sam", "gsam", "norm-central", "looksam", "friendly"])
def test_a_result_is_multiplied_by_the_scale_of_the_loss(name: str, scale: float) -> None:
    """Inner products and squared norms of small gradients underflow before the gradients do."""
    penalty, model, ordinary = PENALTIES[name], Tiny(scale), Tiny(1.0)
    for one in (model, ordinary):
        regularizer = GradientRegularizer(one, penalty)
        for _ in range(2):
            one.zero_grad()
            regularizer.backward(one)
    assert_close({n: g / scale for n, g in gradients(model).items()}, gradients(ordinary), tolerance=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"])
def test_tiny_and_subnormal_gradients_move_nothing_far(dtype: torch.dtype) -> None:
    for exponent in (-45, -42, -40, -38, -36, -33, -28, -25):
        model = nn.Linear(3, 1).to(dtype)
        at: list[Tensor] = []

        def closure(model=model, at=at, exponent=exponent) -> Tensor:
            at.append(model.weight.detach().double().clone())
            return sum((p * 10.0**exponent).sum() for p in model.parameters())  # type: ignore[return-value]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of 16 bits, what rounding leaves is told elsewhere
            GradientRegularizer(model, gradreg.sam(rho=0.05)).backward(closure)
        assert all(float((there - at[0]).norm()) <= 0.055 for there in at), exponent
        assert all(torch.isfinite(p).all() and torch.isfinite(p.grad).all() for p in model.parameters())  # type: ignore[arg-type]


TOO_SMALL = {
    "fgr 1e-8": gradreg.fgr(gamma=0.1, epsilon=1e-8),
    "fgr 1e-12": gradreg.fgr(gamma=0.1, epsilon=1e-12),
    "bgr 1e-9": gradreg.bgr(gamma=0.1, epsilon=1e-9),
    "cgr 1e-9": gradreg.cgr(gamma=0.1, epsilon=1e-9),
    "sam 1e-9": gradreg.sam(rho=1e-9),
    "gnp 1e-9": gradreg.gnp(r=1e-9, alpha=0.8),
    "asam 1e-9": gradreg.asam(rho=1e-9),
}


@pytest.mark.parametrize("penalty", TOO_SMALL.values(), ids=TOO_SMALL)
def test_a_radius_below_the_precision_of_float32_is_reported_once(penalty: GradientPenalty) -> None:
    problem = tanh_problem(torch.float32)
    regularizer = GradientRegularizer(problem.model, penalty)
    with pytest.warns(UserWarning, match=r"float32.*perturbation"):
        regularizer.backward(problem.closure())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer.backward(problem.closure())


@pytest.mark.parametrize("penalty", [gradreg.sam(rho=1e-17), gradreg.fgr(gamma=0.1, epsilon=1e-17)], ids=["sam", "fgr"])
def test_a_radius_below_the_precision_of_float64_is_reported(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    with pytest.warns(UserWarning, match=r"float64.*perturbation"):
        GradientRegularizer(problem.model, penalty).backward(problem.closure())


@each_trait
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_radii_that_fit_are_not_reported(penalty: GradientPenalty, dtype: torch.dtype) -> None:
    problem = tanh_problem(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure())


def test_a_gradient_of_zero_is_not_reported() -> None:
    model = nn.Linear(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradientRegularizer(model, gradreg.sam(rho=0.05)).backward(lambda: 0.0 * model(torch.ones(1, 2)).sum())
