"""Schedules: their values, their bounds, and their forms as text, dictionary and pickle; Python and jax.numpy agree on them."""

import math
import pickle
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg import Anneal, Constant, Cosine, Delay, LogTime, Product, Ramp, Schedule
from gradreg.gates import warmup
from gradreg.schedules import schedule_from_dict

from .strategies import schedules

EVERY_KIND = [
    Constant(value=0.3),
    Ramp(start=0.1, end=0.7, steps=6),
    Cosine(start=0.9, end=0.2, steps=8),
    Anneal(value=0.5, start=2, steps=4),
    LogTime(value=0.5, t0=4),
    Delay(value=0.2, steps=3),
    Delay(value=Ramp(steps=10), steps=3),
    Product(left=Ramp(steps=4), right=Cosine(steps=8)),
]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(value=0.3), {0: 0.3, 1000: 0.3}),
        (Ramp(start=1.0, end=3.0, steps=4), {0: 1.0, 1: 1.5, 2: 2.0, 4: 3.0, 5: 3.0, 1000: 3.0}),
        (Ramp(start=3.0, end=1.0, steps=4), {0: 3.0, 3: 1.5, 4: 1.0, 9: 1.0}),
        (Cosine(start=2.0, end=0.0, steps=6), {0: 2.0, 2: 1.5, 3: 1.0, 4: 0.5, 6: 0.0, 7: 0.0}),
        (Anneal(value=2.0, start=3, steps=6), {0: 2.0, 3: 2.0, 5: 1.5, 6: 1.0, 7: 0.5, 9: 0.0, 99: 0.0}),
        (LogTime(value=1.0, t0=10), {0: 1.0, 10: 0.5, 30: 0.25}),
        (Delay(value=0.2, steps=3), {0: 0.0, 2: 0.0, 3: 0.2, 4: 0.2}),
        (Delay(value=Ramp(start=0.0, end=1.0, steps=4), steps=2), {1: 0.0, 2: 0.5, 3: 0.75, 4: 1.0}),
        (Ramp(start=0.0, end=1.0, steps=2) * 0.5, {0: 0.0, 1: 0.25, 2: 0.5}),
        (0.5 * Ramp(start=0.0, end=1.0, steps=2), {0: 0.0, 1: 0.25, 2: 0.5}),
        (Ramp(steps=2) * Ramp(start=1.0, end=3.0, steps=2), {0: 0.0, 1: 1.0, 2: 3.0}),
    ],
    ids=str,
)
def test_values_derived_by_hand(schedule: Schedule, values: dict[int, float]) -> None:
    assert {step: schedule(step) for step in values} == pytest.approx(values, abs=1e-12)


@given(schedules(), st.integers(0, 3000))
def test_values_lie_within_the_bounds(schedule: Schedule, step: int) -> None:
    low, high = schedule.bounds()
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    assert low - slack <= schedule(step) <= high + slack
    assert math.isfinite(schedule(step))


@given(schedules(st.floats(0, 10)), st.integers(0, 3000))
def test_what_may_not_be_negative_never_is(schedule: Schedule, step: int) -> None:
    """Not by a rounding error either: a penalty checks the bounds once and trusts them."""
    assert schedule.bounds()[0] >= 0
    assert schedule(step) >= 0


@given(schedules())
def test_dictionary_round_trip(schedule: Schedule) -> None:
    assert schedule_from_dict(schedule.to_dict()) == schedule


@given(schedules())
def test_pickle_hash_and_equality(schedule: Schedule) -> None:
    twin = pickle.loads(pickle.dumps(schedule))
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    assert schedule != Constant(value=123.0)


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=str)
def test_jax_evaluates_the_same_values_traced(schedule: Schedule) -> None:
    jax = pytest.importorskip("jax")
    traced = jax.jit(lambda step: schedule.evaluate(step, jax.numpy))
    for step in (0, 1, 2, 3, 4, 7, 50):
        assert float(traced(step)) == pytest.approx(schedule(step), rel=1e-6, abs=1e-6)


def test_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'steps'"):
        Ramp(steps=3).steps = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Constant(value=0.30), "0.3"),
        (Ramp(steps=6), "ramp(0 -> 1 over 6 steps)"),
        (Cosine(steps=8), "cosine(1 -> 0 over 8 steps)"),
        (LogTime(value=0.5, t0=4), "log-time(0.5, t0 4 steps)"),
        (Delay(value=0.2, steps=3), "0.2 from step 3"),
        (Ramp(steps=6) * 0.5, "ramp(0 -> 1 over 6 steps) x 0.5"),
    ],
)
def test_text(schedule: Schedule, text: str) -> None:
    assert str(schedule) == text


def test_warmups() -> None:
    ramp = Ramp(start=0.0, end=1.0, steps=4)
    for step in range(8):
        s = min(1.0, step / 4)
        values = {}
        for kind in ("zero", "strength", "radius"):
            strength, radius = warmup(kind, 0.4, 0.5, steps=4)
            values[kind] = [v(step) if isinstance(v, Schedule) else v for v in (strength, radius)]
        assert values["zero"] == [0.4 if step >= 4 else 0.0, 0.5]
        assert values["strength"] == pytest.approx([s * 0.4, 0.5])
        assert values["radius"] == pytest.approx([s * 0.4, s * 0.5])
    assert warmup("strength", 0.4, None, steps=4) == (Constant(value=0.4) * ramp, None)


class Mine(Schedule):
    """A schedule that a user derives without being a named one."""

    def evaluate(self, step, ops):
        return ops.minimum(1.0, step / 7)

    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0


def test_one_s_own_schedule_evaluates_but_has_no_name_in_a_dictionary() -> None:
    assert (Mine() * 2.0)(7) == 2.0
    with pytest.raises(TypeError, match=r"Mine has no name in a dictionary.*Compose it from gradreg.schedules"):
        Mine().to_dict()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Ramp(steps=0), ValueError, "steps must be >= 1; got 0. Leave the schedule out for a constant value"),
        (lambda: Ramp(steps=2.5), TypeError, "steps must be a whole number >= 1; got 2.5"),  # type: ignore[arg-type]
        (lambda: Ramp(steps=True), TypeError, r"steps must be a whole number >= 1; got True \(bool\)"),
        (lambda: Ramp(start=math.nan, steps=3), ValueError, "start must be a number and finite; got nan"),
        (lambda: Cosine(end=math.inf, steps=3), ValueError, "end must be a number and finite; got inf"),
        (lambda: Cosine(end="0", steps=3), TypeError, r"end must be a number; got '0' \(str\). Remove the quotes"),  # type: ignore[arg-type]
        (lambda: LogTime(value=1.0, t0=0), ValueError, "t0 must be >= 1; got 0"),
        (lambda: Delay(value=0.1, steps=-1), ValueError, "steps must be >= 1; got -1"),
        (lambda: Constant(value=None), TypeError, r"value must be a number; got None \(NoneType\)"),  # type: ignore[arg-type]
        (lambda: warmup("zeros", 0.1, 0.1, steps=3), ValueError, "unknown warm-up 'zeros'. Did you mean 'zero'"),
        (lambda: warmup("zero", 0.1, 0.1, steps=0), ValueError, r"steps must be >= 1; got 0. Leave .warmup\(\) out"),
        (lambda: warmup("radius", 0.1, None, steps=3), ValueError, "needs a finite-difference radius; got an exact penalty"),
        (lambda: schedule_from_dict([]), TypeError, r"a schedule must be a mapping with the key 'schedule', one of constant, .*; got \[\]"),  # type: ignore[arg-type]
        (lambda: schedule_from_dict({"schedule": "rmp"}), ValueError, "unknown schedule 'rmp'. Did you mean 'ramp'"),
        (lambda: schedule_from_dict({"steps": 3}), TypeError, "with the key 'schedule', one of .* ramp, .*; got {'steps': 3}"),
        (
            lambda: schedule_from_dict({"schedule": "ramp", "step": 3}),
            ValueError,
            "unknown key of schedule 'ramp': 'step'. Did you mean 'steps'",
        ),
        (lambda: schedule_from_dict({"schedule": "log-time", "t0": 3}), TypeError, "schedule 'log-time' needs value, t0; got only t0"),
    ],
)
def test_bad_input(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
