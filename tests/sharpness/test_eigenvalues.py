"""Eigenvalues against whole Hessians in float64, by both ways of multiplying."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from gradreg import sharpness

from .cases import both_ways, every_case, known, mlp, regression


@every_case
@both_ways
def test_eigenvalues_are_those_of_the_whole_hessian(name: str, products: str) -> None:
    truth = known(name)
    assert 500 <= len(truth.values) <= 5000
    scale = float(truth.values.abs().max())
    for which, expected in (("largest", truth.values.flip(0)[:3]), ("smallest", truth.values[:3])):
        found = sharpness.eigenvalues(truth.case.model, truth.case.closure(), k=3, which=which, tolerance=1e-7, products=products)
        assert found.converged
        assert found.method == products
        assert float((found.values - expected).abs().max()) < 1e-6 * scale
        assert ((found.values - expected).abs() <= 2 * found.errors + 1e-12 * scale).all()
        assert found.dimension == len(truth.values)


def test_the_default_is_the_largest_one_to_four_digits() -> None:
    truth = known("mlp")
    found = sharpness.largest_eigenvalues(truth.case.model, truth.case.closure())
    assert found.shape == (1,)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(truth.values[-1]), rel=1e-4)


def test_eigenvectors_and_their_shares() -> None:
    truth = known("regression")
    found = sharpness.eigenvalues(truth.case.model, truth.case.closure(), k=2, tolerance=1e-9)
    for value, vector, shares in zip(found.values, found.vectors, found.shares, strict=True):
        flat = torch.cat([v.reshape(-1) for v in vector.values()])
        assert float(flat.norm()) == pytest.approx(1, abs=1e-9)
        assert float((truth.matrix @ flat - value * flat).norm()) < 1e-4 * float(value.abs())
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["2.weight"] == pytest.approx(float(vector["2.weight"].square().sum()))
    assert set(sharpness.by_layer(found.shares[0])) == {"0", "2", "4"}


def test_restarts_reach_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradreg.sharpness import lanczos

    truth = known("mlp")
    free = sharpness.eigenvalues(truth.case.model, truth.case.closure(), k=4, tolerance=1e-8)
    monkeypatch.setattr(lanczos, "_MEMORY", 0)
    monkeypatch.setattr(lanczos, "_FEWEST", 10)
    tight = sharpness.eigenvalues(truth.case.model, truth.case.closure(), k=4, tolerance=1e-8)
    assert tight.products > free.products  # so it was restarted
    assert tight.products > 16
    torch.testing.assert_close(tight.values, truth.values.flip(0)[:4], rtol=1e-7, atol=0)


def test_all_eigenvalues_of_a_small_quadratic_with_repeated_ones() -> None:
    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(6, dtype=torch.float64))

    model = Quadratic()
    curvatures = torch.tensor([3.0, 1.0, -2.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    found = sharpness.largest_eigenvalues(model, lambda: 0.5 * (curvatures * model.w.square()).sum(), k=6)
    torch.testing.assert_close(found, curvatures.sort(descending=True).values, rtol=0, atol=1e-12)


@both_ways
def test_selected_parameters_are_a_block_of_the_matrix(products: str) -> None:
    truth = known("mlp")
    names = [n for n, p in truth.case.model.named_parameters() for _ in range(p.numel())]
    chosen = torch.tensor([n.startswith("2.") for n in names])
    block = torch.linalg.eigvalsh(truth.matrix[chosen][:, chosen])
    found = sharpness.largest_eigenvalues(
        truth.case.model, truth.case.closure(), parameters=lambda n, p: n.startswith("2."), tolerance=1e-7, products=products
    )
    assert float(found) == pytest.approx(float(block[-1]), rel=1e-6)


@both_ways
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_streamed_batches_add_up(products: str, curvature: str) -> None:
    """Three batches of unequal size, averaged by their sizes, are the whole batch; without sizes losses are summed."""
    case = mlp()
    rows = [slice(0, 10), slice(10, 30), slice(30, 48)]
    options = {"curvature": curvature, "products": products, "tolerance": 1e-8}
    one = sharpness.eigenvalues(case.model, case.with_outputs(), **options)
    many = sharpness.eigenvalues(case.model, [case.with_outputs(r) for r in rows], sizes=[10, 20, 18], **options)
    assert float(many.values) == pytest.approx(float(one.values), rel=1e-6)
    assert many.loss == pytest.approx(one.loss)
    twice = sharpness.eigenvalues(case.model, [case.with_outputs()] * 2, **options)
    assert float(twice.values) == pytest.approx(2 * float(one.values), rel=1e-6)


@both_ways
@pytest.mark.parametrize("make", [mlp, regression])
def test_gauss_newton_is_that_of_whole_jacobians(products: str, make: object) -> None:
    case = make()  # type: ignore[operator]
    truth = torch.linalg.eigvalsh(case.gauss_newton())
    found = sharpness.eigenvalues(case.model, case.with_outputs(), k=2, curvature="gauss-newton", tolerance=1e-7, products=products)
    assert (found.method, found.curvature) == (products, "gauss-newton")
    torch.testing.assert_close(found.values, truth.flip(0)[:2], rtol=1e-6, atol=0)
    least = sharpness.eigenvalues(case.model, case.with_outputs(), which="smallest", curvature="gauss-newton", products=products)
    assert float(least.values) == pytest.approx(0, abs=3e-4 * float(truth[-1]))


@both_ways
def test_scipy_routines_take_the_operators(products: str) -> None:
    truth = known("mlp")
    operator = sharpness.hessian(truth.case.model, truth.case.closure(), products=products)
    vector = np.random.default_rng(0).standard_normal(len(truth.values))
    np.testing.assert_allclose(operator @ vector, truth.matrix.numpy() @ vector, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(operator.T @ vector, truth.matrix.numpy() @ vector, rtol=1e-7, atol=1e-8)
    with operator:
        values, _ = eigsh(operator, k=2, which="LA", v0=vector)
    np.testing.assert_allclose(values, truth.values[-2:], rtol=1e-6)
    assert operator.method == products
    assert (operator.step is None) == (products == "exact")
    assert operator.passes.gradients > 40


def test_the_seed_decides_and_the_global_generators_do_not() -> None:
    truth = known("mlp")

    def measure(seed: int) -> float:
        return sharpness.trace(truth.case.model, truth.case.closure(), samples=2, seed=seed).value

    first = measure(0)
    torch.manual_seed(99)
    assert measure(0) == first
    assert measure(1) != first


def test_what_it_cost_is_counted() -> None:
    case = mlp()
    calls = []
    closure = lambda: (calls.append(0), case.closure()())[1]  # noqa: E731
    exact = sharpness.eigenvalues(case.model, closure, products="exact")
    assert exact.passes.forward == len(calls) == 2
    assert exact.passes.double == exact.products
    calls.clear()
    differences = sharpness.eigenvalues(case.model, closure, products="differences")
    assert differences.passes.forward == differences.passes.backward == differences.passes.gradients == len(calls)
    assert len(calls) > 2 * differences.products
    calls.clear()
    both = sharpness.eigenvalues(case.model, [closure, closure], products="exact")
    assert 2 * both.passes.forward == len(calls)
