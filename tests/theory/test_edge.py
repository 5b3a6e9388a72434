"""The edge of stability, on data that are made: curvature rises to the edge and stays around it, and SAM's lies below."""

import numpy as np
import pytest
import torch

from gradreg.theory.edge import Problem, follow, mnist, synthetic
from gradreg.theory.stability import sam_edge


@pytest.fixture(scope="module")
def problem():
    return synthetic(samples=200, seed=0)


def test_gradient_descent_and_sam_sharpen_to_their_edges(problem):
    common = {"learning_rate": 0.2, "steps": 320, "every": 20, "hidden": (24, 24)}
    plain, sam = follow(problem, **common), follow(problem, **common, rho=0.1)
    assert plain.edge.tolist() == [2 / 0.2] * 17
    assert plain.arrival is not None
    assert plain.arrival > 20  # it rises there from below
    assert plain.sharpness[0] < 5
    middle, low, high = plain.settled()
    assert 0.9 < low <= middle <= high < 1.5
    assert plain.loss[-1] < plain.loss[plain.step == plain.arrival][0]  # and the loss goes on falling
    assert np.allclose(sam.edge, [sam_edge(g, 0.1, learning_rate=0.2) for g in sam.gradient_norm])
    assert 0.9 < sam.settled()[0] < 1.7
    assert sam.sharpness[-1] < 0.6 * plain.sharpness[-1]
    assert not plain.diverged
    assert (plain.error < 0.05 * plain.sharpness).all()


def test_a_run_is_full_batch_training_by_the_formula(problem):
    found = follow(problem, learning_rate=0.1, rho=0.3, steps=2, every=1, hidden=(5,), seed=3)
    random = torch.Generator().manual_seed(3)
    first, second = (torch.randn(a, b, generator=random) * 0.5 * b**-0.5 for a, b in ((5, 64), (10, 5)))
    weights = [first, torch.zeros(5), second, torch.zeros(10)]

    def loss(weights):
        hidden = torch.tanh(problem.x @ weights[0].T + weights[1])
        return ((hidden @ weights[2].T + weights[3] - problem.y) ** 2).sum() / 2 / 200

    for step in range(3):
        weights = [w.requires_grad_() for w in weights]
        value = loss(weights)
        gradient = torch.autograd.grad(value, weights)
        norm = torch.sqrt(sum((g**2).sum() for g in gradient))
        assert found.loss[step] == pytest.approx(float(value.detach()), rel=1e-5)
        assert found.gradient_norm[step] == pytest.approx(float(norm), rel=1e-4)
        moved = [(w + 0.3 * g / norm).detach().requires_grad_() for w, g in zip(weights, gradient, strict=True)]
        weights = [(w - 0.1 * g).detach() for w, g in zip(weights, torch.autograd.grad(loss(moved), moved), strict=True)]


def test_a_run_that_diverges_ends_where_it_does():
    problem = synthetic(samples=50, seed=0)
    loud = Problem(100 * problem.x, problem.y)
    found = follow(loud, learning_rate=1e9, steps=40, every=5, hidden=(4,))
    assert found.diverged
    assert len(found.step) < 9


def test_a_run_that_never_arrives_says_so(problem):
    found = follow(problem, learning_rate=1e-3, steps=4, every=2, hidden=(4,))
    assert found.arrival is None
    assert np.isnan(found.settled()).all()


def test_data_that_are_made_are_the_same_for_one_seed_and_scaled():
    one, again, other = synthetic(samples=30, seed=1), synthetic(samples=30, seed=1), synthetic(samples=30, seed=2)
    assert torch.equal(one.x, again.x)
    assert not torch.equal(one.x, other.x)
    assert float(one.x.mean()) == pytest.approx(0.0, abs=1e-6)
    assert one.y.sum(dim=1).tolist() == [1.0] * 30


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="root must hold MNIST's files as torchvision lays them out"):
        mnist(tmp_path, samples=10)
    with pytest.raises(ValueError, match="rho must be finite and >= 0"):
        follow(synthetic(samples=10), learning_rate=0.1, rho=-1.0)
