"""The two engines side by side in float64: the same specification, weights and batches, six steps of SGD."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import decoupled_update, microbatched, value_and_grad
from gradreg.torch import GradientRegularizer
from tests.penalties import PENALTIES, every_penalty

from .cases import arrays, first_state

pytestmark = pytest.mark.usefixtures("x64")

STEPS, RATE = 6, 0.1
SHAPES = {"hidden.weight": (5, 3), "hidden.bias": (5,), "norm.weight": (5,), "norm.bias": (5,), "out.weight": (2, 5), "out.bias": (2,)}
WEIGHTS = dict(zip(SHAPES, arrays(*SHAPES.values()), strict=True))
BATCHES = [tuple(arrays((8, 3), (8, 2), seed=1 + step)) for step in range(STEPS)]
EPSILON = 1e-5

Trajectory = list[tuple[float, dict[str, np.ndarray]]]
Selection = Callable[[str, Any], bool] | None


def by_torch(penalty: GradientPenalty | None, *, parts: int = 1, ascent: int | None = None, parameters: Selection = None) -> Trajectory:
    """The loss and the parameters after each step; ``ascent``: how many rows give the direction."""
    layers = OrderedDict(hidden=nn.Linear(3, 5), norm=nn.LayerNorm(5, EPSILON), tanh=nn.Tanh(), out=nn.Linear(5, 2))
    model = nn.Sequential(layers).double()
    model.load_state_dict({name: torch.tensor(value) for name, value in WEIGHTS.items()})
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
        if penalty is not None and penalty.decoupled:
            regularizer.decoupled_step(optimizer)
        trajectory.append((float(loss), {name: p.detach().numpy().copy() for name, p in model.named_parameters()}))
    return trajectory


def squared_error(params: Any, x: Any, y: Any) -> jax.Array:
    h = x @ params["hidden.weight"].T + params["hidden.bias"]
    h = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + EPSILON)
    h = jnp.tanh(h * params["norm.weight"] + params["norm.bias"])
    return jnp.mean((h @ params["out.weight"].T + params["out.bias"] - y) ** 2)


@cache
def by_jax(penalty: GradientPenalty | None, *, parts: int = 1, ascent: int | None = None, parameters: Selection = None) -> Trajectory:
    rows = slice(ascent)
    oracle = value_and_grad(
        squared_error if parts == 1 else microbatched(squared_error),
        penalty,
        parameters=parameters,
        ascent=None if ascent is None else lambda params, x, y: squared_error(params, x[rows], y[rows]),
    )

    @jax.jit
    def train(params: Any, state: Any, step: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        if parts > 1:
            x, y = (a.reshape(parts, -1, *a.shape[1:]) for a in (x, y))
        loss, gradients, *following = oracle(params, x, y, step=step, **state)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
        if following and penalty is not None and penalty.decoupled:
            params = decoupled_update(params, following[0], RATE)
        return loss, params, {"state": following[0]} if following else {}

    params: Any = OrderedDict((name, jnp.asarray(value)) for name, value in WEIGHTS.items())  # in this order: PyTorch's
    state = first_state(oracle, params)
    trajectory = []
    for step, (x, y) in enumerate(BATCHES):
        loss, params, state = train(params, state, jnp.int32(step), x, y)
        trajectory.append((float(loss), {name: np.asarray(value) for name, value in params.items()}))
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


COMBINED = {
    "norms": gradreg.asam(rho=0.6, eta=0.1).only_norms(),
    "exact-norms": gradreg.exact(gamma=0.3).only_norms(),
    "friendly-fisher-gap": GradientPenalty(
        power=1,
        strength=0.3,
        radius=0.4,
        direction=gradreg.Friendly(sigma=0.5, beta=0.7),
        mask=gradreg.Sparse(sparsity=0.3, every=2),
        mixing=gradreg.SurrogateGap(a=0.2),
    ),
    "friendly-reuse-late": GradientPenalty(
        power=2, strength=0.3, radius=0.4, direction=gradreg.Friendly(sigma=0.5, beta=0.7), reuse=gradreg.Reuse(k=2, a=0.5)
    ).warmup("zero", steps=2),
    "fisher-at-the-first-step-after-a-pause": gradreg.sam(rho=0.5).every(2).sparse(0.4, every=3),
    "remembered-random-seldom": gradreg.remembered(epsilon=0.3).sparse(0.3, choice="random", every=2).every(2),
    "remembered-decoupled": GradientPenalty(power=2, strength=0.2, radius=0.3, direction=gradreg.EmaDirection(decay=0.3), decoupled=True),
    "random-central": GradientPenalty(power=1, strength=0.2, radius=0.3, difference="central", direction=gradreg.Random(seed=2**32 - 1)),
    "sparse-3-steps": gradreg.sam(rho=0.5, steps=3).sparse(0.4, every=2),
    "unit-3-steps": GradientPenalty(power=1, strength=0.2, radius=0.5, mixing="unit", ascent_steps=3),
}
"""Parts together, and the mask for which only this network has the layers."""


@pytest.mark.parametrize("penalty", COMBINED.values(), ids=COMBINED)
def test_parts_together(penalty: GradientPenalty) -> None:
    assert_same(penalty)


@pytest.mark.parametrize("name", ["gnp", "exact", "friendly", "remembered", "sparse-fisher", "fgr-2-steps", "gsam", "looksam"])
def test_micro_batches(name: str) -> None:
    assert_same(PENALTIES[name], parts=4)


ASCENT = {name: PENALTIES[name] for name in ("sam", "fgr-mixing", "bgr", "asam", "friendly", "sparse-fisher", "sam-3-steps")} | {
    "bgr-coefficient-one": gradreg.bgr(gamma=0.4, epsilon=0.4),
    "cgr-coefficient-one": gradreg.cgr(gamma=0.4, epsilon=0.4),
}


@pytest.mark.parametrize("penalty", ASCENT.values(), ids=ASCENT)
def test_ascent_by_part_of_the_batch(penalty: GradientPenalty) -> None:
    assert_same(penalty, ascent=3)


@pytest.mark.parametrize("name", ["gnp-unit", "cgr", "exact-norm", "friendly", "remembered", "random", "sparse-fisher", "gsam", "looksam"])
def test_selected_parameters(name: str) -> None:
    assert_same(PENALTIES[name], parameters=lambda name, _: name in ("hidden.weight", "out.bias"))


def test_the_cases_differ_from_plain_training() -> None:
    plain = by_jax(None)[-1][1]
    for penalty in COMBINED.values():
        regularized = by_jax(penalty)[-1][1]
        assert max(np.abs(plain[name] - regularized[name]).max() for name in plain) > 3e-3, str(penalty)
