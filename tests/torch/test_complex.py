"""Complex parameters are pairs of real ones, for every penalty, or an error in words says that they are not supported."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg.torch import GradientRegularizer

from .cases import DURING_WARMUP, PENALTIES, assert_close, gradients, regularizer_at, said


class OfComplex(nn.Module):
    """A smooth loss of complex numbers, stored as such or as pairs of real ones."""

    def __init__(self, as_complex: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        pairs = [torch.randn(*shape, 2, dtype=torch.float64, generator=generator) for shape in ((3, 2), (2,))]
        self.weights = nn.ParameterList([torch.view_as_complex(p) if as_complex else p for p in pairs])
        self.x = torch.randn(5, 3, dtype=torch.complex128, generator=generator)
        self.at: list[list[Tensor]] = []

    def pairs(self) -> list[Tensor]:
        return [torch.view_as_real(p) if p.is_complex() else p for p in self.weights]

    def gradient_pairs(self) -> dict[str, Tensor]:
        found = {n: g if not g.is_complex() else torch.view_as_real(g) for n, g in gradients(self).items()}
        return {n: g.clone() for n, g in found.items()}

    def forward(self) -> Tensor:
        self.at.append([p.detach().clone() for p in self.pairs()])
        weight, bias = (torch.view_as_complex(p) for p in self.pairs())
        return (self.x @ weight + bias).abs().square().tanh().sum()


DRAWN = ("random", "sparse-random")
OF_THEIR_SHAPE = ("fan-scaled",)
OF_THEIR_SIZE = ("asam", "asam-everywhere", "adaptive-central", "layerwise", "adaptive-sparse-fisher", "sparse-fisher")
COMPLEX = [name for name in PENALTIES if name not in (*DRAWN, *OF_THEIR_SIZE, *OF_THEIR_SHAPE)]
OF_COMPLEX = r"complex"


def complex_and_pairs(name: str) -> tuple[OfComplex, OfComplex, str | None]:
    """Two steps of both, and what the complex one said."""
    complex_model, real = OfComplex(True), OfComplex(False)

    def two_steps(model: OfComplex) -> None:
        regularizer = regularizer_at(DURING_WARMUP, model, PENALTIES[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):
            model.zero_grad()
            regularizer.backward(model)
            regularizer.decoupled_step(optimizer)

    two_steps(real)
    return complex_model, real, said(lambda: two_steps(complex_model))


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_parameters_are_pairs_of_real_ones(name: str) -> None:
    model, real, message = complex_and_pairs(name)
    if message is None:
        assert_close(model.gradient_pairs(), real.gradient_pairs())
        for here, there in zip(model.at, real.at, strict=True):
            for a, b in zip(here, there, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    else:
        assert re.match(rf"(TypeError|ValueError|RuntimeError): .*{OF_COMPLEX}.*; got", message), message


@pytest.mark.parametrize("name", [*DRAWN, *OF_THEIR_SIZE, *OF_THEIR_SHAPE])
def test_complex_parameters_keep_their_imaginary_parts(name: str) -> None:
    """What is drawn or measured for each coordinate may be for the pair or for each half, but no half is left out; or an error in words."""
    model, _, message = complex_and_pairs(name)
    if message is not None:
        assert re.match(rf"(TypeError|ValueError|RuntimeError): .*{OF_COMPLEX}.*; got", message), message
        return
    start = model.at[0] if name not in DRAWN else [p.detach() for p in model.pairs()]
    moved = [there - here for at in model.at for here, there in zip(start, at, strict=True)]
    assert max(float(m[..., 0].abs().max()) for m in moved) > 1e-3
    assert max(float(m[..., 1].abs().max()) for m in moved) > 1e-3, "the imaginary parts stayed"
    if name == "random":
        length = torch.cat([(there - here).flatten() for here, there in zip(start, model.at[0], strict=True)]).norm()
        assert float(length) == pytest.approx(0.5, rel=1e-9)
    assert all(float(g[..., 1].abs().max()) > 0 for g in model.gradient_pairs().values())


class MostlyImaginary(nn.Module):
    """Two coordinates whose gradient is large and imaginary, and two whose gradient is small and real."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, dtype=torch.complex128))
        self.at: list[Tensor] = []

    def forward(self) -> Tensor:
        self.at.append(self.w.detach().clone())
        return 10.0 * self.w[:2].imag.sum() + self.w[2:].real.sum() + self.w.abs().square().sum()


def test_a_fisher_mask_sees_imaginary_parts() -> None:
    model = MostlyImaginary()

    def one_step() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns once a process that a cast drops them
            GradientRegularizer(model, gradreg.sam(rho=0.5).sparse(0.5)).backward(model)

    message = said(one_step)
    if message is not None:
        assert re.match(rf"(TypeError|ValueError|RuntimeError): .*{OF_COMPLEX}.*; got", message), message
        return
    moved = model.at[1] - model.at[0]
    assert float(moved[:2].imag.abs().min()) > 0.3, f"the largest gradients are those of the first two; moved {moved.tolist()}"
