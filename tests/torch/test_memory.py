"""A step holds one copy of the parameters beyond what plain gradient accumulation holds, by the allocator's own account."""

import pytest
import torch
from torch import nn

import gradreg
from benchmarks.memory import peak_bytes
from gradreg import LETS, GradientPenalty
from gradreg.torch import GradientRegularizer

from .cases import PENALTIES

LAYERS, WIDTH = 10, 128
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:CUDA initialization")
@pytest.mark.parametrize("name", ["sam", "gnp", "gnp-unit", "fgr", "cgr"])
def test_one_copy_of_the_parameters(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(1, WIDTH)
    regularizer = GradientRegularizer(model, PENALTIES[name])

    def step() -> None:
        regularizer.backward(lambda: model(x).square().mean())

    peak = peak_bytes(step, CPU)
    # The gradients themselves, one copy, and while a layer's second gradient is added to its first, that one layer's.
    assert peak / size == pytest.approx(2 + 1 / LAYERS, abs=0.12)
    model.zero_grad()
    assert peak_bytes(step, CPU) / size < 1.25, "the copy is made once"


@pytest.mark.filterwarnings("ignore:CUDA initialization")
@pytest.mark.parametrize("penalty", [gradreg.sam(rho=0.1), gradreg.sam(rho=LETS()), gradreg.gnp(r=LETS(), alpha=0.8)], ids=str)
def test_a_look_at_held_out_data_takes_four_copies_of_the_gradients(penalty: GradientPenalty) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    x, other = torch.randn(1, WIDTH), torch.randn(1, WIDTH)
    regularizer = GradientRegularizer(model, penalty)

    def step() -> None:
        regularizer.backward(lambda: model(x).square().mean(), held_out=lambda: model(other).square().mean())

    # The gradients, the copy of the parameters, and those four.
    assert peak_bytes(step, CPU) / size == pytest.approx(6, abs=0.3)
