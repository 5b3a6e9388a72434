"""curvlinops as a peer: products with the Hessian and the generalized Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from gradreg import sharpness

from .cases import Case, both_ways, mlp

curvlinops = pytest.importorskip("curvlinops")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of PyTorch's own forward-mode differentiation


def tanh_convolutions() -> Case:
    """Without SiLU, which curvlinops 3.0 cannot multiply with, and LayerNorm, in whose weights its Hessian is another than autograd's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)).double()
    return Case(model, torch.randn(12, 2, 8, 8).double(), torch.randint(0, 3, (12,)))


@both_ways
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("make_case", [mlp, tanh_convolutions])
def test_products_are_those_of_curvlinops(make_case: Callable[[], Case], curvature: str, products: str) -> None:
    case = make_case()
    kind = {"hessian": curvlinops.HessianLinearOperator, "gauss-newton": curvlinops.GGNLinearOperator}[curvature]
    parameters = list(case.model.parameters())
    data = [(case.x[:5], case.y[:5]), (case.x[5:], case.y[5:])]
    theirs = kind(case.model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    sizes = [len(y) for _, y in data]
    closures = [case.with_outputs(slice(0, 5)), case.with_outputs(slice(5, None))]
    make = {"hessian": sharpness.hessian, "gauss-newton": sharpness.gauss_newton}[curvature]
    ours = make(case.model, closures, sizes=sizes, products=products)
    vector = np.random.default_rng(0).standard_normal(ours.shape[0])
    expected = theirs @ torch.from_numpy(vector)
    np.testing.assert_allclose(ours @ vector, expected.detach().numpy(), rtol=1e-6, atol=1e-7 * float(expected.abs().max()))
