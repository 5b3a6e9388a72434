"""The cases that the tests of the engine share: every kind of penalty, and one small problem that is no quadratic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradreg import Gradient, GradientPenalty, Plain, Unit
from tests.penalties import OF_EACH_TRAIT, PENALTIES, each_trait, every_penalty

__all__ = ["PENALTIES", "each_trait", "every_penalty"]  # for the tests that import all their cases from here

FINITE = {name: penalty for name, penalty in PENALTIES.items() if penalty.difference != "exact"}

BASE = {
    n: p
    for n, p in PENALTIES.items()
    if (p.direction, p.mask, p.ascent_steps, p.reuse, p.decoupled) == (Gradient(), None, 1, None, False) and p.mixing in (Plain(), Unit())
}
"""The penalties of the two tables of ``gradreg.penalties``, without what relatives change."""

UNPERTURBED_FIRST = {name: penalty for name, penalty in PENALTIES.items() if penalty.starts_unperturbed_at(100)}
"""Those whose first pass is that of plain training."""


def _takes_ascent(penalty: GradientPenalty) -> bool:
    try:
        penalty.check_ascent("closures")
    except ValueError:
        return False
    return True


TAKES_ASCENT = {name: penalty for name, penalty in PENALTIES.items() if _takes_ascent(penalty)}


def _each(penalties: dict[str, GradientPenalty]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("penalty", penalties.values(), ids=penalties)


every_base_penalty = _each(BASE)
every_penalty_unperturbed_first = _each(UNPERTURBED_FIRST)
every_penalty_that_takes_ascent = _each(TAKES_ASCENT)
every_finite_difference_unperturbed_first = _each({name: penalty for name, penalty in FINITE.items() if name in UNPERTURBED_FIRST})
every_finite_difference = _each(FINITE)

each_trait_unperturbed_first = _each({name: penalty for name, penalty in OF_EACH_TRAIT.items() if name in UNPERTURBED_FIRST})
each_finite_trait = _each({name: penalty for name, penalty in OF_EACH_TRAIT.items() if name in FINITE})
each_finite_trait_unperturbed_first = _each({n: p for n, p in OF_EACH_TRAIT.items() if n in FINITE and n in UNPERTURBED_FIRST})
"""Those of ``each_trait``, for tests that have another factor beside the penalty."""

DURING_WARMUP = 2
"""A step at which all penalties but those in a zero-warm-up have a strength, and the warming ones a smaller one than at the end."""


def calls_at(step: int, penalty: GradientPenalty) -> int:
    """How often a closure is called at ``step``: double backprop calls it once."""
    return 1 if penalty.difference == "exact" else penalty.evaluations_at(step)


@dataclass
class Problem:
    """A model, its data, and the closure that a user would write."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self, rows: slice = slice(None)) -> Tensor:
        return nn.functional.mse_loss(self.model(self.x[rows]), self.y[rows])

    def closure(self, rows: slice = slice(None)) -> Callable[[], Tensor]:
        return lambda: self.loss(rows)


def tanh_problem(dtype: torch.dtype = torch.float64) -> Problem:
    """Regression by a network of two layers: smooth, and far from quadratic."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    return Problem(model, torch.randn(8, 3, dtype=dtype), 2 * torch.randn(8, 2, dtype=dtype))


def dropout_batchnorm_problem() -> Problem:
    """The same with dropout and BatchNorm in training mode."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    return Problem(model, torch.randn(8, 3, dtype=torch.float64), 2 * torch.randn(8, 2, dtype=torch.float64))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what ``.grad`` holds, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers, by name."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def plain_gradients(problem: Problem, rows: slice = slice(None)) -> dict[str, Tensor]:
    """The gradients of plain training; leaves ``.grad`` empty."""
    problem.model.zero_grad()
    problem.loss(rows).backward()
    plain = gradients(problem.model)
    problem.model.zero_grad()
    return plain


def said(call: Callable[[], object]) -> str | None:
    """What the error says that ``call`` raises, and of which type; None if none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def regularizer_at(step: int, model: nn.Module, penalty: GradientPenalty | None, **options: object):
    """A ``GradientRegularizer`` whose clock stands at ``step``."""
    from gradreg.torch import GradientRegularizer

    regularizer = GradientRegularizer(model, penalty, **options)  # type: ignore[arg-type]
    regularizer.load_state_dict({**regularizer.state_dict(), "step": step})
    return regularizer


def assert_same_state(actual: Any, expected: Any) -> None:
    """Equal nested dictionaries of numbers and tensors, bit for bit."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_state(actual[key], value)
    else:
        assert torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    """Equal names, and values equal to ``tolerance`` relative to the largest."""
    assert actual.keys() == expected.keys()
    scale = max(float(e.abs().max()) for e in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance * max(scale, 1e-30), msg=lambda m, n=name: f"{n}: {m}")


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names and equal bits, NaN included."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].numpy().tobytes() == value.numpy().tobytes(), f"{name} differs"
