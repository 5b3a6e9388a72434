"""The handwritten digits of scikit-learn and two small networks for them: the data on which the adapters are tested."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradreg import GradientPenalty

BATCH = 64


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images as rows of 64 numbers in [0, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)


def batch(i: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]


def network(seed: int = 0, *, dropout: float = 0.2) -> nn.Module:
    """An MLP with dropout and batch normalization, so that masks and running statistics matter."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 10))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers, by name without the prefixes of wrappers."""
    return {name.removeprefix("module."): value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


Weights = dict[str, Tensor]


def check_a_penalty_of_any_kind(
    penalty: GradientPenalty,
    trained: Callable[[GradientPenalty], Weights],
    by_hand: Callable[[GradientPenalty | None], Weights],
    *,
    last: int,
    within: float,
) -> None:
    """A framework's training with ``penalty`` is that by hand; one that is decoupled is refused.

    Args:
        penalty: of any kind.
        trained: the weights after the framework's training.
        by_hand: those after the loop by hand, with a penalty or without.
        last: the last step, at which most penalties act.
        within: the largest difference that rounding explains.
    """
    if penalty.decoupled:
        with pytest.raises(ValueError, match="penalty must not be decoupled under"):
            trained(penalty)
        return
    found = trained(penalty)
    assert largest_difference(found, by_hand(penalty)) <= within
    if penalty.strength_at(last) != 0:
        assert largest_difference(found, by_hand(None)) > within
