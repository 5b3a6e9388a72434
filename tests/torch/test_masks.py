"""Masks: only normalization layers, or a share of the coordinates, are moved; all are updated."""

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import Problem, assert_close, gradients, tanh_problem

SAM = gradreg.sam(rho=0.4)


class Normed(nn.Module):
    """A network with two normalization layers, one of a class of its own, and a bias outside of them."""

    class RootMeanSquareNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((5,), 0.8))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x / x.square().mean(-1, keepdim=True).sqrt()

    def __init__(self) -> None:
        super().__init__()
        self.first, self.batch = nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False)
        self.own, self.last = self.RootMeanSquareNorm(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.own(torch.tanh(self.batch(self.first(x)))))


@pytest.mark.parametrize("penalty", [SAM, gradreg.asam(rho=0.5, one_dimensional=True), gradreg.exact(gamma=0.3)], ids=str)
def test_only_norms_are_moved_and_all_are_updated(penalty: GradientPenalty) -> None:
    torch.manual_seed(0)
    problem = Problem(Normed().double(), torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))
    theta, loss = twins.parameters_of(problem.model), twins.loss_of(problem.model, problem.x, problem.y)
    expected = twins.family(penalty, loss, theta, perturbed={"batch.weight", "batch.bias", "own.scale"})
    GradientRegularizer(problem.model, penalty.only_norms()).backward(problem.closure())
    assert_close(gradients(problem.model), expected)
    assert gradients(problem.model)["first.weight"].abs().max() > 0


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="mask OnlyNorms must find parameters of normalization layers"):
        GradientRegularizer(tanh_problem().model, SAM.only_norms())


def test_a_sparse_mask_leaves_that_share_where_it_is() -> None:
    for choice in ("fisher", "random"):
        torch.manual_seed(0)
        model = nn.Linear(60, 50).double()
        x, before, moved = torch.randn(4, 60, dtype=torch.float64), [], []

        def closure(model=model, x=x, moved=moved) -> Tensor:
            moved.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
            return model(x).square().sum()

        GradientRegularizer(model, SAM.sparse(0.7, choice=choice)).backward(closure)
        before, there = moved
        share = float((there != before).double().mean())
        assert share == pytest.approx(0.3, abs=1e-3 if choice == "fisher" else 0.03)


def test_a_sparse_mask_changes_when_it_is_due() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, SAM.sparse(0.5, choice="random", every=2))
    moves = []
    for _ in range(4):
        there: list[Tensor] = []

        def closure(there=there) -> Tensor:
            there.append(torch.cat([p.detach().flatten().clone() for p in problem.model.parameters()]))
            return problem.loss()

        regularizer.backward(closure)
        moves.append(there[1] != there[0])
        problem.model.zero_grad()
    assert torch.equal(moves[0], moves[1])
    assert torch.equal(moves[2], moves[3])
    assert not torch.equal(moves[1], moves[2])
