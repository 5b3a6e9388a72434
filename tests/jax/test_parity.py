"""The two engines side by side in float64: the same specification, weights and batches, five steps of SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import microbatched, value_and_grad
from gradreg.torch import GradientRegularizer
from tests.penalties import PENALTIES, every_penalty

from .cases import arrays, squared_error

pytestmark = pytest.mark.usefixtures("x64")

STEPS, RATE = 5, 0.1
WEIGHTS = dict(zip(["0.weight", "0.bias", "2.weight", "2.bias"], arrays((3, 5), (5,), (5, 2), (2,)), strict=True))
BATCHES = [tuple(arrays((8, 3), (8, 2), seed=1 + step)) for step in range(STEPS)]

Trajectory = list[tuple[float, dict[str, np.ndarray]]]


def by_torch(
    penalty: GradientPenalty | None, *, parts: int = 1, ascent: int | None = None, parameters: Callable[[str, Any], bool] | None = None
) -> Trajectory:
    """The loss and the parameters after each step; ``ascent``: how many rows give the direction."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    for name, p in model.named_parameters():
        p.data = torch.tensor(WEIGHTS[name].T if name.endswith("weight") else WEIGHTS[name]).contiguous()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    regularizer = GradientRegularizer(model, penalty, parameters=parameters)
    trajectory = []
    for batch in BATCHES:
        x, y = map(torch.tensor, batch)

        def closure(rows: slice, share: float = 1.0, x: torch.Tensor = x, y: torch.Tensor = y) -> Callable[[], torch.Tensor]:
            return lambda: share * nn.functional.mse_loss(model(x[rows]), y[rows])

        size = len(x) // parts
        closures = [closure(slice(i * size, (i + 1) * size), 1 / parts) for i in range(parts)]
        optimizer.zero_grad()
        loss = regularizer.backward(closures, ascent=None if ascent is None else closure(slice(ascent)))
        optimizer.step()
        values = {name: p.detach().numpy() for name, p in model.named_parameters()}
        trajectory.append((float(loss), {name: (v.T if name.endswith("weight") else v).copy() for name, v in values.items()}))
    return trajectory


def by_jax(
    penalty: GradientPenalty | None, *, parts: int = 1, ascent: int | None = None, parameters: Callable[[str, Any], bool] | None = None
) -> Trajectory:
    rows = slice(ascent)
    oracle = value_and_grad(
        squared_error if parts == 1 else microbatched(squared_error),
        penalty,
        parameters=parameters,
        ascent=None if ascent is None else lambda params, x, y: squared_error(params, x[rows], y[rows]),
    )

    @jax.jit
    def train(params: Any, step: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        if parts > 1:
            x, y = (a.reshape(parts, -1, *a.shape[1:]) for a in (x, y))
        loss, gradients = oracle(params, x, y, step=step)
        return loss, jax.tree.map(lambda p, g: p - RATE * g, params, gradients)

    params: Any = {"0": {}, "2": {}}
    for name, value in WEIGHTS.items():
        layer, kind = name.split(".")
        params[layer][kind] = jnp.asarray(value)
    trajectory = []
    for step, (x, y) in enumerate(BATCHES):
        loss, params = train(params, jnp.int32(step), x, y)
        trajectory.append((float(loss), {name: np.asarray(params[name[0]][name[2:]]) for name in WEIGHTS}))
    return trajectory


def assert_same(penalty: GradientPenalty | None, **options: Any) -> None:
    for (loss, params), (expected_loss, expected) in zip(by_jax(penalty, **options), by_torch(penalty, **options), strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        for name, value in expected.items():
            np.testing.assert_allclose(params[name], value, rtol=0, atol=1e-12, err_msg=name)


def test_plain() -> None:
    assert_same(None)


@every_penalty
def test_every_penalty(penalty: GradientPenalty) -> None:
    assert_same(penalty)


@every_penalty
def test_micro_batches(penalty: GradientPenalty) -> None:
    assert_same(penalty, parts=4)


@pytest.mark.parametrize("name", [n for n, p in PENALTIES.items() if p.difference != "exact" and p.mixing == "plain"])
def test_ascent_by_part_of_the_batch(name: str) -> None:
    assert_same(PENALTIES[name], ascent=3)


@every_penalty
def test_selected_parameters(penalty: GradientPenalty) -> None:
    assert_same(penalty, parameters=lambda name, _: name.startswith("0") and name.endswith("weight"))


def test_the_cases_differ_from_plain_training() -> None:
    plain, regularized = by_torch(None)[-1][1], by_torch(gradreg.fgr(gamma=0.4, epsilon=0.4))[-1][1]
    assert max(np.abs(plain[name] - regularized[name]).max() for name in plain) > 1e-2
