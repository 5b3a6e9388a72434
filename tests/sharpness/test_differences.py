"""Differences of gradients against exact products, on a ViT with fused attention and wherever else PyTorch cannot differentiate twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradreg import sharpness
from gradreg.sharpness.function import LossFunction
from gradreg.sharpness.products import ExactGaussNewton, ExactHessian, products_of

from .cases import mlp


class Vit:
    """A small ViT in eval mode, its batch, and a twin in float64 without the fused kernel."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=10
        ).eval()
        self.x, self.y = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
        self.twin = copy.deepcopy(self.model).double()
        for fused, model in ((True, self.model), (False, self.twin)):
            for block in model.blocks:
                block.attn.fused_attn = fused
        self.model.to(dtype)

    def closure(self, model: nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
        x = self.x.to(next(model.parameters()).dtype)

        def closure() -> tuple[Tensor, Tensor]:
            outputs = model(x)
            return nn.functional.cross_entropy(outputs.float() if outputs.dtype == torch.bfloat16 else outputs, self.y), outputs

        return closure


@pytest.fixture(scope="module")
def vit() -> Vit:
    return Vit()


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("sharpen", [False, True], ids=["random", "sharp"])
def test_differences_are_exact_to_a_thousandth_and_know_their_error(vit: Vit, curvature: str, sharpen: bool) -> None:
    function, truth = LossFunction(vit.model, vit.closure(vit.model)), LossFunction(vit.twin, vit.closure(vit.twin))
    space = function.space
    with function.measuring(), truth.measuring():
        multiply = {"hessian": ExactHessian, "gauss-newton": ExactGaussNewton}[curvature](truth)
        probe = space.signs(1, 1)
        products, _ = products_of(function, curvature, "auto", None, probe, sharpen=sharpen)  # type: ignore[arg-type]
        assert products.method == "differences"
        assert products.relative_error is not None
        vectors = [probe, space.normal(7, 0), space.normal(7, 1)]
        if sharpen:  # vectors along large eigenvalues, as those of a Lanczos iteration come to be
            vectors = [multiply(v.double()).float() for v in vectors]
        errors: list[float] = []
        for v in vectors:
            exact = multiply((v / space.norm(v)).double())
            errors.append(float((products(v / space.norm(v)) - exact).norm() / exact.norm()))
        assert max(errors) < 1e-3
        known = errors if curvature == "hessian" else errors[:1]  # Gauss-Newton's few outputs make directions differ more
        for error in known:
            assert products.relative_error / 3 < error < products.relative_error * 3


def test_eigenvalues_and_trace_under_fused_attention(vit: Vit) -> None:
    with pytest.raises(RuntimeError, match="products='exact' need a model that PyTorch can differentiate twice"):
        sharpness.eigenvalues(vit.model, vit.closure(vit.model), products="exact")
    found = sharpness.eigenvalues(vit.model, vit.closure(vit.model), k=2, tolerance=1e-5)
    exact = sharpness.eigenvalues(vit.twin, vit.closure(vit.twin), k=2, tolerance=1e-7)
    assert (found.method, exact.method) == ("differences", "exact")
    assert any("differentiate twice" in note for note in found.notes)
    assert found.product_error < 1e-3
    wrong = (found.values - exact.values).abs()
    assert (wrong < 1e-3 * exact.values).all()
    assert (wrong < 3 * found.errors).all()
    ours = sharpness.trace(vit.model, vit.closure(vit.model), samples=5)
    theirs = sharpness.trace(vit.twin, vit.closure(vit.twin), samples=5)
    assert ours.samples == pytest.approx(theirs.samples, rel=5e-3)


def test_the_fused_kernel_of_the_outputs_does_not_matter_to_gauss_newton(vit: Vit) -> None:
    found = sharpness.eigenvalues(vit.model, vit.closure(vit.model), curvature="gauss-newton", tolerance=1e-5)
    exact = sharpness.eigenvalues(vit.twin, vit.closure(vit.twin), curvature="gauss-newton", tolerance=1e-7)
    assert (found.method, exact.method) == ("differences", "exact")
    assert float(found.values) == pytest.approx(float(exact.values), rel=1e-3)


def test_sixteen_bit_weights_say_how_coarse_they_are() -> None:
    """Rounding of weights and gradients leaves little of a difference: exact products where possible, else the error is said."""
    low = Vit(torch.bfloat16)
    twin = copy.deepcopy(low.model).double()
    for block in twin.blocks:
        block.attn.fused_attn = False
    found = sharpness.trace(low.model, low.closure(low.model), samples=1)
    exact = sharpness.trace(twin, low.closure(twin), samples=1)
    assert found.method == "differences"
    assert 0.01 < found.product_error < 0.1
    length = exact.dimension**0.5 * float(torch.cat([h.reshape(-1) for h in twin_product(twin, low)]).norm())
    assert abs(found.value - exact.value) < 3 * found.product_error * length
    case = mlp()
    truth = float(sharpness.largest_eigenvalues(case.model, case.closure()))
    case.model.to(torch.bfloat16)
    case.x = case.x.to(torch.bfloat16)
    exact = sharpness.eigenvalues(case.model, case.closure(), tolerance=1e-2)
    assert exact.method == "exact"
    assert float(exact.values) == pytest.approx(truth, rel=0.05)


def twin_product(twin: nn.Module, vit: Vit) -> list[Tensor]:
    """The Hessian's product with the first vector of signs."""
    function = LossFunction(twin, vit.closure(twin))
    with function.measuring():
        return [ExactHessian(function)(function.space.signs(0, 0))]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models(reentrant: bool) -> None:
    """Non-reentrant checkpointing can be differentiated twice; of reentrant the first layer is one that only ``backward`` reaches."""
    case = mlp()
    expected = sharpness.eigenvalues(case.model, case.closure(), tolerance=1e-7)

    def closure() -> Tensor:
        h = checkpoint(case.model[0], case.x, use_reentrant=reentrant) if not reentrant else None  # type: ignore[index]
        if h is None:
            h = case.model[0](case.x)  # type: ignore[index, operator]
        h = checkpoint(case.model[1:4], h, use_reentrant=reentrant)  # type: ignore[index]
        return case.criterion(case.model[4](h), case.y)  # type: ignore[index, operator]

    found = sharpness.eigenvalues(case.model, closure, tolerance=1e-7)
    assert found.method == ("differences" if reentrant else "exact")
    assert float(found.values) == pytest.approx(float(expected.values), rel=1e-6)


def test_parameters_that_only_backward_reaches_are_not_left_out() -> None:
    """A checkpointed segment of which no input requires a gradient: autograd.grad would give none, silently."""
    case = mlp()
    expected = sharpness.eigenvalues(case.model, case.closure(), tolerance=1e-7)

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, dummy: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return case.model[:2](x)  # type: ignore[index]

        @staticmethod
        def backward(ctx, *gradients: Tensor) -> tuple[None, Tensor]:
            with torch.enable_grad():
                torch.autograd.backward(case.model[:2](ctx.saved_tensors[0]), gradients[0])  # type: ignore[index]
            return None, torch.zeros(())

    dummy = torch.zeros((), requires_grad=True)
    closure = lambda: case.criterion(case.model[2:](Hidden.apply(case.x, dummy)), case.y)  # noqa: E731
    found = sharpness.eigenvalues(case.model, closure, tolerance=1e-7)
    assert found.method == "differences"
    assert any("loss.backward() alone" in note for note in found.notes)
    assert float(found.values) == pytest.approx(float(expected.values), rel=1e-6)


def test_a_given_step_is_used_and_judged() -> None:
    case = mlp()
    exact = sharpness.eigenvalues(case.model, case.closure(), tolerance=1e-8)
    near = sharpness.eigenvalues(case.model, case.closure(), step=1e-4, tolerance=1e-8)
    assert (near.method, near.step) == ("differences", 1e-4)
    far = sharpness.eigenvalues(case.model, case.closure(), step=0.3, tolerance=1e-8)
    assert far.product_error > 1e-3 > 1e-6 > near.product_error
    assert abs(float(far.values - exact.values)) > 100 * abs(float(near.values - exact.values))
    assert abs(float(far.values - exact.values)) < 3 * float(far.errors)
