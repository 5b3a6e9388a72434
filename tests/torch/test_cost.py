"""The cost dial, counted: passes and samples of every cheap setting are what ``evaluations_at`` says."""

from collections.abc import Callable

import pytest
from torch import Tensor

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from .cases import tanh_problem

SAM = gradreg.sam(rho=0.4)


CHEAP: dict[str, tuple[GradientPenalty, int]] = {
    "every third": (SAM.every(3), 10 + 4),
    "by chance": (SAM.with_probability(0.5, seed=1), 10 + sum(gradreg.Chance(p=0.5, seed=1)(step) > 0 for step in range(10))),
    "looksam, k 4": (gradreg.looksam(rho=0.4, k=4), 10 + 3),
    "remembered": (gradreg.remembered(epsilon=0.3), 10),
    "random": (gradreg.random_sam(rho=0.3), 10),
}


@pytest.mark.parametrize("name", CHEAP)
def test_passes_and_samples_of_ten_steps(name: str) -> None:
    penalty, passes = CHEAP[name]
    problem, seen = tanh_problem(), []
    regularizer = GradientRegularizer(problem.model, penalty)

    def closure() -> Tensor:
        seen.append(len(problem.x))
        return problem.loss()

    for _ in range(10):
        problem.model.zero_grad()
        regularizer.backward(closure)
    assert len(seen) == passes == regularizer.metrics.evaluations == sum(penalty.evaluations_at(step) for step in range(10))
    assert sum(seen) == passes * 8


def test_samples_of_a_direction_from_a_quarter_of_the_batch() -> None:
    for penalty, cost in ((SAM, 1.25), (gradreg.gnp(r=0.3, alpha=0.8), 2.25), (SAM.every(2), 1.125)):
        problem, seen = tanh_problem(), []
        regularizer = GradientRegularizer(problem.model, penalty)

        def closure(rows: slice, seen=seen, problem=problem) -> Callable[[], Tensor]:
            def evaluated() -> Tensor:
                seen.append(len(problem.x[rows]))
                return problem.loss(rows)

            return evaluated

        for _ in range(4):
            problem.model.zero_grad()
            regularizer.backward(closure(slice(0, 8)), ascent=closure(slice(0, 2)), ascent_share=0.25)
        assert sum(seen) / 8 / 4 == cost == regularizer.metrics.evaluations / 4


def test_ascent_share_is_checked() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, SAM)
    with pytest.raises(ValueError, match=r"ascent_share must be in \(0, 1\]; got 2"):
        regularizer.backward(problem.closure(), ascent=problem.closure(), ascent_share=2)
    with pytest.raises(ValueError, match=r"ascent_share must be left out without ascent; got 0\.5"):
        regularizer.backward(problem.closure(), ascent_share=0.5)
