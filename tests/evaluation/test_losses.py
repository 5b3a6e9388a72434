"""The loss without gradients, what it leaves of the model, and forgetting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradreg.evaluation import Forgetting, loss


class Writes(nn.Module):
    """Everything that an evaluation must not leave behind: statistics, a counter, dropout's draws, a mode of each part."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.register_buffer("calls", torch.zeros(()))
        self.last: object = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x
        return self.layers(x + torch.rand(()))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_of_it_remains(mode):
    torch.manual_seed(0)
    model, x = Writes(), torch.randn(8, 3)
    model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    found = loss(model, lambda: model(x).square().mean(), mode=mode)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.last is None
    assert all(p.grad is None for p in model.parameters())
    for m in model.modules():
        m.training = mode == "train"
    with torch.no_grad():
        assert found == float(model(x).square().mean())


def test_it_is_left_alone_when_a_closure_raises():
    model = Writes()
    before, random = model.calls.clone(), torch.get_rng_state()

    def closure() -> torch.Tensor:
        model(torch.randn(8, 3))
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        loss(model, closure)
    assert torch.equal(model.calls, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_several_closures_are_weighted_by_their_sizes():
    model = nn.Linear(1, 1)
    values = [torch.tensor(2.0), 5.0, torch.tensor([11.0], dtype=torch.float64)]
    closures = [lambda value=value: value for value in values]
    assert loss(model, closures) == pytest.approx(6.0)
    assert loss(model, closures, sizes=[1, 1, 2]) == pytest.approx((2 + 5 + 22) / 4)


def test_forgetting_is_the_rise_of_the_loss_on_earlier_data():
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    earlier, now = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    forgetting = Forgetting(model, lambda: model(earlier).square().sum())
    assert (forgetting.before, forgetting.rise()) == (0.0, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    (model(now) - 1).square().sum().backward()
    optimizer.step()  # w = (0.5, 0.5)
    assert forgetting.rise() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((lambda: 0.0, lambda: 0.0), TypeError, "model must be a torch.nn.Module"),
        ((nn.Linear(1, 1), []), TypeError, "closure must be a callable or a non-empty sequence"),
        ((nn.Linear(1, 1), lambda: "0"), TypeError, "closure must return the loss, a number or a tensor"),
        ((nn.Linear(1, 1), lambda: torch.zeros(2)), ValueError, r"scalar loss; got a tensor of shape \(2,\)"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        loss(*arguments)


def test_bad_sizes_modes_and_a_loss_that_is_not_finite():
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="one number for each closure; got 2 for 1"):
        loss(model, lambda: 0.0, sizes=[1, 2])
    with pytest.raises(ValueError, match=r"unknown mode .test.\. Known: eval, train"):
        loss(model, lambda: 0.0, mode="test")
    with pytest.raises(ValueError, match="must be finite before training; got nan"):
        Forgetting(model, lambda: float("nan"))
