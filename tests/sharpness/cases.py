"""Small networks in float64 whose whole Hessian can be computed, by autograd alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.functional import cross_entropy, mse_loss


class Attention(nn.Module):
    """One head of attention over four tokens, without a fused kernel, behind a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return x + self.out(weights @ v)


@dataclass
class Case:
    """A model, a batch, and the loss."""

    model: nn.Module
    x: Tensor
    y: Tensor
    criterion: Callable[..., Tensor] = cross_entropy

    def closure(self, rows: slice = slice(None)) -> Callable[[], Tensor]:
        return lambda: self.criterion(self.model(self.x[rows]), self.y[rows])

    def with_outputs(self, rows: slice = slice(None)) -> Callable[[], tuple[Tensor, Tensor]]:
        def closure() -> tuple[Tensor, Tensor]:
            outputs = self.model(self.x[rows])
            return self.criterion(outputs, self.y[rows]), outputs

        return closure

    @property
    def values(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def hessian(self) -> Tensor:
        """The whole matrix, in the order of ``model.parameters()``."""

        def loss(values: dict[str, Tensor]) -> Tensor:
            return self.criterion(functional_call(self.model, values, (self.x,)), self.y)

        blocks, values = jacrev(grad(loss))(self.values), self.values
        return torch.cat([torch.cat([blocks[a][b].reshape(values[a].numel(), -1) for b in values], dim=1) for a in values])

    def gauss_newton(self) -> Tensor:
        """Jᵀ·L″·J from whole Jacobians."""
        values = self.values
        outputs = functional_call(self.model, values, (self.x,))
        jacobian = jacrev(lambda v: functional_call(self.model, v, (self.x,)))(values)
        rows = torch.cat([jacobian[name].reshape(outputs.numel(), -1) for name in values], dim=1)
        inner = jacrev(grad(lambda o: self.criterion(o, self.y)))(outputs).reshape(outputs.numel(), outputs.numel())
        return rows.T @ inner @ rows


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 18), nn.Tanh(), nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 4)).double()
    return Case(model, torch.randn(48, 8).double(), torch.randint(0, 4, (48,)))


def regression() -> Case:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 24), nn.GELU(), nn.Linear(24, 16), nn.Softplus(), nn.Linear(16, 2)).double()
    return Case(model, torch.randn(40, 5).double(), torch.randn(40, 2).double(), mse_loss)


def convolutions() -> Case:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    return Case(model.eval(), torch.randn(8, 2, 6, 6).double(), torch.randint(0, 3, (8,)))


def attention() -> Case:
    torch.manual_seed(3)
    model = nn.Sequential(Attention(10), Attention(10), nn.Flatten(), nn.Linear(40, 5)).double()
    return Case(model, torch.randn(12, 4, 10).double(), torch.randint(0, 5, (12,)))


def wide() -> Case:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 10)).double()
    return Case(model, torch.randn(32, 20).double(), torch.randint(0, 10, (32,)))


CASES = {"mlp": mlp, "regression": regression, "convolutions": convolutions, "attention": attention, "wide": wide}
SLOW = ("attention", "wide")


@dataclass
class Known:
    """A case with its whole Hessian and the eigenvalues, ascending."""

    case: Case
    matrix: Tensor
    values: Tensor


@cache
def known(name: str) -> Known:
    case = CASES[name]()
    matrix = case.hessian()
    return Known(case, matrix, torch.linalg.eigvalsh(matrix))


every_case = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
both_ways = pytest.mark.parametrize("products", ["exact", "differences"])
