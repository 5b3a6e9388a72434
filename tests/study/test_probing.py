"""The probe: the alignments it measures are those of the loss, whatever the framework; what it recommends, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradreg import cli, study
from gradreg.study.probing import FLOOR, Climb, Probe

CURVATURES, POINT = np.array([1.0, 4.0, 20.0]), np.array([3.0, 1.0, 0.1])


@study.task(metric="loss", mode="min")
def by_torch(run: study.Run, *, lr: float = 0.0) -> None:
    """½θᵀAθ, at one point unless it trains."""
    theta = nn.Parameter(torch.tensor(POINT))
    regularizer = run.regularizer(nn.ParameterList([theta]))
    optimizer = torch.optim.SGD([theta], lr=lr)
    for _ in run.epochs(10):
        for _ in range(20):
            optimizer.zero_grad()
            loss = regularizer.backward(lambda: 0.5 * (torch.tensor(CURVATURES) * theta.square()).sum())
            optimizer.step()
        run.log(loss=loss, test_loss=float(loss))


@study.task(metric="loss", mode="min")
def by_jax(run: study.Run) -> None:
    """The same inside of a program."""
    import jax
    import jax.numpy as jnp

    oracle = run.value_and_grad(lambda p: 0.5 * jnp.sum(jnp.asarray(CURVATURES) * p**2), state=True)
    theta = jnp.asarray(POINT)
    state = oracle.init(theta)
    step = jax.jit(lambda theta, state: oracle(theta, state=state))
    for _ in run.epochs(10):
        for _ in run.steps(20):
            loss, _, state = step(theta, state)
        run.log(loss=loss, test_loss=float(loss))


@study.task(metric="loss", mode="min")
def normalized(run: study.Run) -> None:
    """A loss that does not see the length of its weights, along which alone its gradient could turn: it is constant."""
    theta = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    regularizer = run.regularizer(nn.ParameterList([theta]))
    for _ in run.epochs(5):
        for _ in range(30):
            theta.grad = None
            loss = regularizer.backward(theta.sum)
        run.log(loss=loss, test_loss=float(loss))


def alignment(radius: float, power: int) -> float:
    g = CURVATURES * POINT
    moved = CURVATURES * (POINT + radius * (g / np.linalg.norm(g) if power == 1 else g))
    return float(g @ moved / np.linalg.norm(g) / np.linalg.norm(moved))


def crossing(power: int, target: float) -> float:
    """The radius of that alignment, by bisection."""
    low, high = 1e-6, 1e3
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if alignment(middle, power) > target else (low, middle)
    return low


@pytest.mark.parametrize(("penalty", "power"), [("sam", 1), ("gnp", 1), ("fgr", 2), ("friendly_sam:sigma=0", 1)])
def test_alignments_are_those_of_the_loss(penalty: str, power: int) -> None:
    found = study.probe(by_torch, penalty=penalty, share=1.0, alignment=0.95)
    assert len(found.climbs) >= 10
    for climb in found.climbs:
        assert climb.alignments == pytest.approx([alignment(radius, power) for radius in climb.radii], abs=1e-9)
        assert list(climb.radii) == pytest.approx([climb.radii[0] * 2**i for i in range(len(climb.radii))])
    assert found.start == pytest.approx(crossing(power, 0.95), rel=0.05)  # between neighbours of the grid it is a straight line
    assert found.range is not None
    assert found.range[0] < found.start / 2
    assert found.range[1] > 2 * found.start


def test_a_climb_ends_where_the_gradients_disagree() -> None:
    """With curvatures of opposite signs they do, which those of one sign need not."""
    climb = Climb([0.1, 0.2, 0.4], [1.0, 0.96, 0.4], [0.0, 0.0, 0.0])
    assert climb.radius_at(0.96) == pytest.approx(0.2)
    assert climb.radius_at(0.68) == pytest.approx(0.2 * math.sqrt(2))
    assert climb.radius_at(0.3) is None
    assert Climb([0.1], [0.4], [0.0]).radius_at(0.95) is None


def test_nonlinearities_are_what_the_loss_rises_beyond_its_gradient() -> None:
    """On a quadratic: ½·radius·ĝᵀAĝ/‖g‖ for power 1."""
    found = study.probe(by_torch, penalty="sam", share=0.5)
    g = CURVATURES * POINT
    unit = g / np.linalg.norm(g)
    bend = 0.5 * float(unit @ (CURVATURES * unit)) / float(np.linalg.norm(g))
    climb = found.climbs[0]
    assert climb.nonlinearities == pytest.approx([bend * radius for radius in climb.radii], rel=1e-6, abs=1e-6)


def test_a_program_of_jax_is_probed_as_well() -> None:
    pytest.importorskip("jax")
    ours, theirs = study.probe(by_jax, penalty="sam", share=0.5), study.probe(by_torch, penalty="sam", share=0.5)
    assert len(ours.climbs) == len(theirs.climbs)
    for one, other in zip(ours.climbs, theirs.climbs, strict=True):
        assert one.radii == pytest.approx(other.radii, rel=1e-5)
        assert one.alignments == pytest.approx(other.alignments, abs=1e-5)
    assert ours.start == pytest.approx(theirs.start, rel=1e-4)


def test_it_trains_as_without_a_penalty_but_for_a_hundredth() -> None:
    found = study.probe(by_torch, share=1.0, options={"lr": 0.01})
    theta = POINT.copy()
    for epoch, loss in found.losses:
        expected = 0.5 * float(CURVATURES @ theta**2)
        for _ in range(20):
            expected = 0.5 * float(CURVATURES @ theta**2)
            theta = theta - 0.01 * CURVATURES * theta
        assert loss == pytest.approx(expected, rel=0.06), epoch
    assert [epoch for epoch, _ in found.losses] == list(range(1, 11))


def test_no_start_where_the_alignment_does_not_fall() -> None:
    found = study.probe(normalized, penalty="sam", share=1.0)
    assert found.start is None
    assert found.range is None
    assert "no start: the alignment stays above 0.95 up to rho" in found.sentences()[-1]


def test_no_start_where_it_is_too_low_at_once() -> None:
    found = Probe("mine", "sam", "rho", 0.95, 0.1, [Climb([0.1, 0.2], [0.9, 0.4], [0.0, 0.0])] * 2, [])
    assert found.start is None
    assert "no start: the gradients disagree at the smallest radius already, with alignment 0.9" in found.sentences()[-1]


def test_late_climbs_count() -> None:
    early, late = Climb([0.1, 0.2, 0.4], [1.0, 0.9, FLOOR], [0.0] * 3), Climb([0.1, 0.2, 0.4], [1.0, 1.0, 0.9], [0.0] * 3)
    found = Probe("mine", "sam", "rho", 0.95, 0.1, [early, late], [])
    assert found.start == pytest.approx(0.2 * math.sqrt(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: study.probe(by_torch, penalty="exact"), "penalty must compare a gradient at perturbed parameters .* got 'exact'"),
        (lambda: study.probe(by_torch, penalty="random_sam"), "penalty must compare a gradient at perturbed parameters"),
        (lambda: study.probe(by_torch, penalty="none"), "unknown penalty 'none'"),
        (lambda: study.probe(by_torch, penalty="auto"), "penalty must have a radius to probe; got 'auto'. Use sam, gnp, fgr"),
        (lambda: study.probe(by_torch, share=0.0), r"share must be in \(0, 1\]; got 0"),
        (lambda: study.probe(by_torch, alignment=1.0), "alignment must be a cosine between 0.5 and 1; got 1. Leave it out for 0.95"),
        (lambda: cli._run(["tune", "digits-noisy-labels", "--probe", "--trials", "3"]), None),
    ],
)
def test_what_cannot_be_probed(call: Callable[[], Any], message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if message is None:
        assert call() == 2
        assert "--trials must be left out with --probe, which searches nothing; got it with that" in capsys.readouterr().err
        return
    with pytest.raises(ValueError, match=message):
        call()


def test_an_option_of_the_probe_needs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "digits-noisy-labels", "--alignment", "0.9"]) == 2
    assert "--alignment must go with --probe; got it without that" in capsys.readouterr().err


def test_the_command_probes_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "digits-noisy-labels", "--probe", "--penalty", "sam", "fgr", "--probe-share", "0.1", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [one["argument"] for one in found["probes"]] == ["rho", "epsilon"]
    assert f"start with sam:rho={found['probes'][0]['start']:.2g}; search with --search rho=log:" in printed
    # The best fixed radii of docs/choosing.md on this task lie around .2 for SAM and .5 for F-GR.
    assert 0.07 < found["probes"][0]["start"] < 0.5
    assert 0.12 < found["probes"][1]["start"] < 1.5
    assert [one["epoch"] for one in found["probes"][0]["losses"]] == list(range(1, 7))
    assert not (tmp_path / "out" / "run").exists()
