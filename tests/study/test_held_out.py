"""What looking at held-out data costs the run of a task, and a penalty that never acts in it: alike in both engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradreg
from gradreg import HeldOut, study
from gradreg.study.tasks import Metric

STEPS = 14


def by_torch(run: study.Run, helps: bool) -> None:
    """½‖θ‖² at one point, with a held-out loss that falls along its gradient, or rises."""
    theta = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    regularizer = run.regularizer(nn.ParameterList([theta]), held_out=HeldOut(every=2))
    sign = 0.5 if helps else -0.5
    for _ in range(STEPS):
        theta.grad = None
        regularizer.backward(lambda: 0.5 * theta.square().sum(), held_out=lambda: sign * theta.square().sum())


def by_jax(run: study.Run, helps: bool) -> None:
    """The same."""
    jnp = pytest.importorskip("jax.numpy")
    theta, sign = jnp.array([3.0, 4.0]), 0.5 if helps else -0.5
    oracle = run.value_and_grad(lambda p: 0.5 * jnp.sum(p**2), state=True, held_out=lambda p: sign * jnp.sum(p**2), rule=HeldOut(every=2))
    state = oracle.init(theta)
    for _ in range(STEPS):
        _, _, state = oracle(theta, state=state)


ENGINES = {"torch": by_torch, "jax": by_jax}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize(("helps", "expected"), [(True, 2 * STEPS + 7), (False, 2 * 10 + 5 + 3 + 1 + 3 + 1)], ids=["helps", "hurts"])
def test_looks_are_counted(engine: Callable[[study.Run, bool], None], helps: bool, expected: int, tmp_path: Path) -> None:
    """Every second step looks, at one pass more. What five looks decide holds from the sixth on: other steps are plain then."""
    run = study.Run(gradreg.sam(rho=0.1), 0, tmp_path, metric=Metric("loss", "min"))
    for _ in run.epochs(1):
        engine(run, helps)
        run.log(loss=1.0, test_loss=1.0)
    assert run.finish()["gradient_evaluations"] == expected


def learned_by_torch(run: study.Run) -> None:
    theta = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    regularizer = run.regularizer(nn.ParameterList([theta]))
    for _ in range(STEPS):
        theta.grad = None
        regularizer.backward(lambda: 0.5 * theta.square().sum(), held_out=lambda: theta.square().sum())


def learned_by_jax(run: study.Run) -> None:
    jnp = pytest.importorskip("jax.numpy")
    theta = jnp.array([3.0, 4.0])
    oracle = run.value_and_grad(lambda p: 0.5 * jnp.sum(p**2), state=True, held_out=lambda p: jnp.sum(p**2))
    state = oracle.init(theta)
    for _ in range(STEPS):
        _, _, state = oracle(theta, state=state)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [learned_by_torch, learned_by_jax])
def test_looks_for_a_radius_that_is_learned_are_counted(engine: Callable[[study.Run], None], tmp_path: Path) -> None:
    """Every fourth step, from the first on."""
    run = study.Run(gradreg.sam(rho=gradreg.LETS(every=4)), 0, tmp_path, metric=Metric("loss", "min"))
    for _ in run.epochs(1):
        engine(run)
        run.log(loss=1.0, test_loss=1.0)
    assert run.finish()["gradient_evaluations"] == 2 * STEPS + 4


NEVER: dict[str, Callable[[study.Run], Any]] = {
    "torch": lambda run: run.regularizer(nn.Linear(1, 1), total_steps=4),
    "jax": lambda run: run.value_and_grad(lambda p: p, total_steps=4),
}


@pytest.mark.parametrize("make", NEVER.values(), ids=NEVER)
@pytest.mark.parametrize("penalty", [gradreg.sam().warmup("zero", steps=4), gradreg.sam().tail(0.1)], ids=["warm-up", "tail"])
def test_a_penalty_that_acts_at_no_step_of_the_run_is_an_error(
    penalty: gradreg.GradientPenalty, make: Callable[[study.Run], Any], tmp_path: Path
) -> None:
    run = study.Run(penalty, 0, tmp_path, metric=Metric("loss", "min"))
    with pytest.raises(ValueError, match="a penalty must act at a step of the run, of which there are 4; got SAM"):
        make(run)
