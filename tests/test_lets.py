"""``LETS`` as a rule: against Adam as PyTorch has it, within its bounds, and with what is not finite."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

import gradreg
from gradreg import LETS, AutoRadius, GradientPenalty
from gradreg.auto_radius import NUMBERS, Guards
from gradreg.lets import LetsState, Slope

GUARDS = Guards(True, 1)


def after(rule: LETS, slopes: list[float], **options: Any) -> list[LetsState]:
    states = [rule.initial]
    for slope in slopes:
        states.append(rule.update(states[-1], Slope(slope), GUARDS, NUMBERS, **options))
    return states[1:]


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize(("momentum", "memory"), [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)])
def test_the_logarithm_follows_the_slopes_by_adam(momentum: float, memory: float, scale: float) -> None:
    draw = random.Random(4)
    slopes = [draw.gauss(0.3 if i < 60 else -0.3, 1.0) for i in range(120)]
    rule = LETS(start=0.1, rate=0.02, momentum=momentum, memory=memory)
    log_radius = torch.tensor(math.log(0.1), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([log_radius], lr=0.02, betas=(momentum, memory), eps=0.0)
    lowest = 0.0
    for slope, state in zip(slopes, after(rule, [scale * slope for slope in slopes]), strict=True):
        log_radius.grad = torch.tensor(slope, dtype=torch.float64)
        adam.step()
        assert state.log_radius == pytest.approx(log_radius.item(), abs=1e-12)
        lowest = min(lowest, state.log_radius)
    assert lowest < math.log(0.1) - 0.2
    assert state.steps == 120


def test_slopes_that_agree_move_it_by_the_rate() -> None:
    for sign in (1.0, -1.0):
        states = after(LETS(rate=0.1), [sign] * 5)
        assert [state.log_radius for state in states] == pytest.approx([math.log(0.05) - sign * 0.1 * i for i in range(1, 6)])


def test_it_stays_within_its_bounds() -> None:
    rule = LETS(start=0.1, lower=0.08, upper=0.2, rate=0.5)
    assert [math.exp(state.log_radius) for state in after(rule, [1.0] * 3)] == pytest.approx([0.08] * 3)
    assert math.exp(after(rule, [-1.0] * 5)[-1].log_radius) == pytest.approx(0.2)
    assert rule.bounds() == (0.08, 0.2)


def test_what_cannot_be_told_changes_nothing_and_an_infinite_slope_halves_it() -> None:
    before = after(LETS(), [0.4, -0.2])[-1]
    for slope, scaled, halves in ((math.nan, False, False), (-math.inf, False, False), (math.inf, False, True), (math.inf, True, False)):
        state = LETS().update(before, Slope(slope), GUARDS, NUMBERS, scaled=scaled)
        assert state.log_radius == pytest.approx(before.log_radius - (math.log(2.0) if halves else 0.0))
        assert state[1:-1] == before[1:-1]
        assert state.steps == before.steps + 1


def test_slopes_of_zero_leave_it() -> None:
    assert after(LETS(), [0.0] * 3)[-1].log_radius == math.log(0.05)


PENALTIES = {
    "sam": lambda radius: gradreg.sam(rho=radius),
    "gnp": lambda radius: gradreg.gnp(r=radius, alpha=0.8),
    "fgr": lambda radius: gradreg.fgr(epsilon=radius),
    "asam": lambda radius: gradreg.asam(rho=radius),
    "friendly": lambda radius: gradreg.friendly_sam(rho=radius),
    "gsam": lambda radius: gradreg.gsam(rho=radius, a=0.3),
    "wsam": lambda radius: gradreg.wsam(rho=radius, gamma=0.6, decoupled=True),
    "warmup": lambda radius: gradreg.sam(rho=radius).warmup("zero", steps=3),
}


@pytest.mark.parametrize("build", PENALTIES.values(), ids=PENALTIES)
def test_it_stands_in_the_place_of_a_radius(build: Any) -> None:
    penalty = build(LETS(rate=0.1))
    assert penalty.auto_radius == LETS(rate=0.1)
    assert penalty.has_memory
    assert GradientPenalty.from_dict(penalty.to_dict()) == penalty
    assert penalty.at(5, radius=0.2).radius == 0.2
    with pytest.raises(ValueError, match=r"^radius must be given where the penalty sets it itself; got lets\(rate 0\.1\)"):
        penalty.radius_at(5)


def test_its_name_tells_what_differs() -> None:
    assert str(LETS(start=0.1, every=1)) == "lets(rate 0.01, start 0.1, every 1)"


def test_recipes_name_it() -> None:
    assert GradientPenalty.from_dict({"name": "sam", "rho": "lets"}) == gradreg.sam(rho=LETS())
    assert GradientPenalty.from_dict({"name": "fgr", "epsilon": {"schedule": "lets", "every": 1}}) == gradreg.fgr(epsilon=LETS(every=1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LETS(rate=0.0), r"^rate must be finite and > 0; got 0\.0"),
        (lambda: LETS(momentum=1.0), r"^momentum must be in \[0, 1\); got 1\.0"),
        (lambda: LETS(memory=-0.1), r"^memory must be in \[0, 1\); got -0\.1"),
        (lambda: LETS(every=0), r"^every must be"),
        (lambda: LETS(start=20.0), r"^start must lie between lower and upper; got 20"),
        (
            lambda: gradreg.random_sam(rho=LETS()),
            r"^radius must be .* for a direction that needs no gradient, because LETS",
        ),
        (
            lambda: gradreg.fgr(gamma=0.3, epsilon=LETS()),
            r"^radius must be .* does not tend to the plain one .*; got lets\(.*\) with",
        ),
        (lambda: gradreg.gnp(r=LETS(), alpha=0.8, mixing="unit"), r"^radius must be .* does not tend to the plain one .* mixing unit"),
        (lambda: gradreg.fgr(epsilon=LETS(), clip=0.3), r"^radius must be .* does not tend to the plain one .* mixing each clipped at 0.3"),
        (lambda: gradreg.le_sam(sigma=LETS()), r"^radius must be .* does not tend to the plain one .* direction loss-equated"),
        (lambda: GradientPenalty(power=1, strength=AutoRadius(), radius=LETS()), r"^strength must follow the radius where it is LETS"),
        (lambda: gradreg.sam(rho=2 * LETS()), r"^(rho|radius) must not be a multiple of LETS"),
        (lambda: gradreg.sam(rho=LETS()).check_ascent("closures"), r"^ascent must be None with a radius that sets itself"),
    ],
)
def test_what_it_cannot_be_is_said(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
