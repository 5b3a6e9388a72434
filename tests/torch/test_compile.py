"""Compiled models and closures, and operations that cannot be derived twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg.torch import GradientRegularizer

from .cases import (
    DURING_WARMUP,
    FINITE,
    Problem,
    assert_close,
    assert_same_bits,
    every_finite_difference,
    gradients,
    regularizer_at,
    values,
)


def eager_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("_orig_mod."): v for n, v in found.items()}


def noisy_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()


@pytest.fixture(scope="module")
def compiled() -> tuple[nn.Module, nn.Module]:
    """A model and its compiled twin: compiling is what costs, so all penalties share it."""
    model = noisy_model()
    return copy.deepcopy(model), torch.compile(model)


@every_finite_difference
def test_a_compiled_model(penalty: gradreg.GradientPenalty, compiled: tuple[nn.Module, nn.Module]) -> None:
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    found = []
    for model in compiled:
        model.zero_grad()
        problem = Problem(model, x, y)
        before = values(model)
        regularizer_at(DURING_WARMUP, model, penalty).backward(problem.closure())
        after = values(model)
        assert all(torch.equal(after[n], before[n]) for n, _ in model.named_parameters())
        found.append((eager_names(gradients(model)), eager_names(after)))
    assert_close(found[1][0], found[0][0], tolerance=1e-12)
    assert_close(found[1][1], found[0][1], tolerance=1e-12)


def test_a_compiled_closure_with_dropout_repeats_its_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 2)).double()
    x, y = torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    losses: list[Tensor] = []

    @torch.compile
    def compiled_loss() -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    def closure() -> Tensor:
        loss = compiled_loss()
        losses.append(loss.detach())
        return loss

    GradientRegularizer(model, gradreg.fgr(gamma=1e-9, epsilon=1e-9)).backward(closure)
    assert losses[1] == pytest.approx(float(losses[0]), rel=1e-6), "the same mask at almost the same parameters"


@pytest.mark.parametrize("make", ["compiled model", "fused attention"])
def test_exact_names_its_alternative_where_nothing_can_be_derived_twice(make: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 16)
    if make == "compiled model":
        model = nn.Linear(16, 16)
        forward: Callable[[Tensor], Tensor] = torch.compile(model)
    else:
        model = nn.Linear(16, 16)

        def forward(x: Tensor) -> Tensor:
            q = model(x)
            return nn.functional.scaled_dot_product_attention(q, q, q)

    def closure() -> Tensor:
        return forward(x).square().mean()

    before = values(model)
    with pytest.raises(RuntimeError, match=r"difference='exact' needs every operation to be twice differentiable; .*Use gradreg\.fgr"):
        GradientRegularizer(model, gradreg.exact(gamma=0.1)).backward(closure)
    assert_same_bits(values(model), before)
    for name, penalty in FINITE.items():
        model.zero_grad()
        regularizer_at(3, model, penalty).backward(closure)
        assert_same_bits(values(model), before)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters()), name
