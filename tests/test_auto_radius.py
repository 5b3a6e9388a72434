"""``AutoRadius`` as a specification: its fields, where it may stand, and the numbers of a step with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import gradreg
from gradreg import AutoRadius, Constant, GradientPenalty
from gradreg.auto_radius import NUMBERS, Guards, Measurement, RadiusState

AUTO = AutoRadius()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: AutoRadius(target=1.0), ValueError, "^target must be a cosine < 1; got 1"),
        (lambda: AutoRadius(target=0.0), ValueError, "^target must be .*> 0; got 0"),
        (lambda: AutoRadius(start=20.0), ValueError, "^start must lie between lower and upper; got 20 with lower 0.0001 and upper 10"),
        (lambda: AutoRadius(lower=0.1), ValueError, "^start must lie between lower and upper"),
        (lambda: AutoRadius(gain=math.inf), ValueError, "^gain must be .*finite"),
        (lambda: AutoRadius(every=0), ValueError, "^every must be .*>= 1; got 0"),
        (lambda: AutoRadius(upper="1"), TypeError, "^upper must be a number"),  # type: ignore[arg-type]
        (lambda: gradreg.msam(rho=AUTO), ValueError, "^radius must be a number or a schedule for a direction that needs no gradient"),
        (lambda: gradreg.random_sam(rho=AUTO), ValueError, "^radius must be a number or a schedule for a direction that needs no gradient"),
        (lambda: gradreg.remembered(epsilon=AUTO), ValueError, "^radius must be a number or a schedule for a direction that needs no"),
        (lambda: gradreg.exact(gamma=AUTO), ValueError, "^strength must follow the radius where it is AutoRadius"),
        (lambda: gradreg.fgr(gamma=AUTO, epsilon=0.5), ValueError, "^strength must follow the radius where it is AutoRadius"),
        (lambda: gradreg.fgr(gamma=AutoRadius(start=1.0), epsilon=AUTO), ValueError, "^strength must follow the radius where it is"),
        (lambda: gradreg.sam(rho=AUTO).warmup("radius", steps=3), ValueError, "^radius must not be a multiple of AutoRadius"),
        (lambda: gradreg.sam(rho=AUTO).radius_at(0), ValueError, r"^radius must be given where the penalty sets it itself; got auto\("),
        (lambda: gradreg.sam(rho=AUTO).at(0), ValueError, "^radius must be given where the penalty sets it itself"),
        (lambda: gradreg.sam(rho=AUTO).at(0, radius=0.0), ValueError, "^radius must be .*> 0; got 0"),
        (lambda: gradreg.sam(rho=0.1).at(0, radius=0.1), ValueError, "^radius must be left out for a penalty that does not set it itself"),
        (lambda: gradreg.fgr(epsilon=0.5), TypeError, r"^fgr needs gamma; got only epsilon=0.5. Write fgr\(gamma=..., epsilon=...\), or"),
        (lambda: gradreg.sam(rho=AUTO).check_ascent("closures"), ValueError, "^ascent must be None with a radius that sets itself"),
    ],
)
def test_what_it_refuses(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("penalty", "strength", "coefficient"),
    [
        (gradreg.sam(rho=AUTO), 0.3, 1.0),
        (gradreg.gnp(r=AUTO, alpha=0.8), 0.24, 0.8),
        (gradreg.fgr(epsilon=AUTO), 0.3, 1.0),
        (gradreg.fgr(gamma=0.6, epsilon=AUTO), 0.6, 2.0),
        (gradreg.sam(rho=AUTO).warmup("strength", steps=8), 0.15, 0.5),
        (gradreg.sam(rho=AUTO).every(2, compensate=True), 0.6, 2.0),
        (gradreg.sam(rho=AUTO).warmup("zero", steps=5), 0.0, 0.0),
    ],
)
def test_numbers_of_a_step(penalty: GradientPenalty, strength: float, coefficient: float) -> None:
    """At step 4 with radius 0.3; an engine that knows the radius as a scalar of its own gets the same."""
    values = penalty.at(4, radius=0.3)
    assert (values.strength, values.coefficient) == (pytest.approx(strength), pytest.approx(coefficient))
    assert (values.radius, values.acts) == (0.3, strength > 0)

    scalar: Any = Opaque(0.3)
    other = penalty.at(4, radius=scalar)
    assert other.acts is values.acts
    assert float(other.strength) == pytest.approx(strength)
    assert float(other.coefficient) == pytest.approx(coefficient)
    assert isinstance(other.coefficient, float) == (penalty.strength != 0.6)


class Opaque:
    """A number whose value cannot be looked at: it has arithmetic, and no truth."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __mul__(self, other: Any) -> Opaque:
        return Opaque(self._value * float(other))

    __rmul__ = __mul__

    def __rtruediv__(self, other: Any) -> Opaque:
        return Opaque(float(other) / self._value)

    def __float__(self) -> float:
        return self._value

    def __bool__(self) -> bool:
        raise AssertionError("a value on a device was waited for")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a value on a device was waited for")


@pytest.mark.parametrize("text", [{"name": "sam", "rho": "auto"}, {"name": "sam", "rho": {"schedule": "auto"}}])
def test_in_dictionaries(text: dict[str, Any]) -> None:
    penalty = GradientPenalty.from_dict(text)
    assert penalty == gradreg.sam(rho=AUTO)
    assert GradientPenalty.from_dict(penalty.to_dict()) == penalty
    assert GradientPenalty.from_dict({"name": "auto"}) == gradreg.auto() == gradreg.fgr(epsilon=AUTO)
    stronger = GradientPenalty.from_dict({"name": "fgr", "epsilon": {"schedule": "auto", "target": 0.9}})
    assert stronger == gradreg.auto(target=0.9) != gradreg.auto()
    with pytest.raises(TypeError, match=r"^rho must be a number"):
        GradientPenalty.from_dict({"name": "sam", "rho": "automatic"})


def test_what_it_depends_on() -> None:
    assert not gradreg.auto().depends_on_step
    assert gradreg.auto().every(2).depends_on_step
    assert gradreg.auto().has_memory
    assert not gradreg.auto().keeps_tensors
    assert gradreg.auto().coefficient_is_one
    assert gradreg.auto().evaluations_at(0) == 2
    assert gradreg.gnp(r=AUTO, alpha=0.8).coefficient_at(0) == pytest.approx(0.8)
    assert AutoRadius(lower=0.05).bounds() == (0.05, 10.0)
    assert Constant(value=0.1).needs_step


def test_the_rule_by_hand() -> None:
    """Cosine .8 at target .9: −.05 · clip(−1); cosine .92: + .05 · .2; both kept inside the bounds."""
    rule, guards = AutoRadius(target=0.9, start=1.0, upper=1.005), Guards(rises=True, power=1)
    state = RadiusState(0.0, 1.0, 2.0, 2.0, 7)
    lower = rule.update(state, Measurement(4.0, 0.8 * 2 * 3, 9.0, 0.1), guards, NUMBERS)
    assert lower == (pytest.approx(-0.05), 1.0, 2.0, 2.0, 8)
    higher = rule.update(state, Measurement(4.0, 0.92 * 2 * 3, 9.0, 0.1), guards, NUMBERS)
    assert higher.log_radius == pytest.approx(math.log(1.005))  # not .01
    # The loss rises by more than twice radius·‖g‖ = 2.
    assert rule.update(state, Measurement(4.0, 0.92 * 2 * 3, 9.0, 4.1), guards, NUMBERS).log_radius == pytest.approx(-0.05)
    assert rule.update(state, Measurement(4.0, 0.92 * 2 * 3, 9.0, 3.9), guards, NUMBERS).log_radius > 0
    fell = rule.update(state, Measurement(4.0, 0.92 * 2 * 3, 9.0, -0.1), guards, NUMBERS)
    assert fell.rising == pytest.approx(0.9)
    for rise, scaled in ((math.inf, False), (math.nan, True)):
        assert rule.update(state, Measurement(4.0, 5.0, 9.0, rise), guards, NUMBERS, scaled=scaled).log_radius == pytest.approx(
            -math.log(2)
        )
    assert rule.update(state, Measurement(4.0, math.nan, 9.0, 0.1), guards, NUMBERS, scaled=True).log_radius == pytest.approx(-0.05)
    assert rule.update(state, Measurement(0.0, 0.0, 0.0, 0.0), guards, NUMBERS) == (0.0, 1.0, 2.0, 2.0, 8)


def test_steps_that_grow_by_hand() -> None:
    """A norm of 40 where 2 is usual makes the average 0.8·2 + 0.2·40 = 9.6, more than four times as much; one of 30 makes it 7.6."""
    rule, guards = AutoRadius(start=1.0), Guards(rises=True, power=None)

    def after(log_radius: float, norm: float) -> RadiusState:
        state = RadiusState(log_radius, 1.0, 2.0, 2.0, 7)
        return rule.update(state, Measurement(norm**2, norm**2, norm**2, 0.1), guards, NUMBERS)

    assert after(0.0, 40.0) == pytest.approx((-math.log(2.0), 1.0, 9.6, 2.04, 8))
    assert after(0.0, 30.0) == pytest.approx((0.05, 1.0, 7.6, 2.04, 8))
    assert after(0.0, 1.0) == pytest.approx((0.05, 1.0, 1.8, 1.9, 8))
    assert after(0.0, 1.95).usual == pytest.approx(1.99)
    assert after(math.log(0.15), 40.0).log_radius == pytest.approx(math.log(0.1))
    assert after(math.log(0.05), 40.0).log_radius == pytest.approx(math.log(0.05)), "it does not grow either"
    for norm in (math.inf, 0.0):
        assert after(0.0, norm)[2:4] == (2.0, 2.0)
    first = rule.update(rule.initial, Measurement(9.0, 9.0, 9.0, 0.1), guards, NUMBERS)
    assert first == pytest.approx((0.05, 1.0, 3.0, 3.0, 1))
