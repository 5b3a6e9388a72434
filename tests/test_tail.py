"""``penalty.tail``: which steps it leaves, what it costs, and that a run without any regularized step is an error."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

import gradreg
from gradreg import AutoRadius, Constant, Delay, GradientPenalty, Product, Ramp, Tail, fgr, gnp, sam
from gradreg.gates import over

from .strategies import penalties


def acting(penalty: GradientPenalty, total_steps: int) -> list[int]:
    return [step for step in range(total_steps) if penalty.nominal_at(step).acts]


@pytest.mark.parametrize(
    ("share", "total_steps", "first"),
    [(0.3, 10, 7), (0.25, 10, 8), (0.35, 10, 6), (0.3, 1000, 700), (0.06, 10, 9), (0.99, 10, 0), (1.0, 10, 0)],
)
def test_the_last_share_of_the_steps(share: float, total_steps: int, first: int) -> None:
    """0.25 of 10 is 2 and 0.35 of 10 is 4: halves are rounded to the even number."""
    late = fgr(gamma=0.2, epsilon=0.4).tail(share, total_steps=total_steps)
    assert acting(late, total_steps) == list(range(first, total_steps))
    assert late == fgr(gamma=0.2, epsilon=0.4).tail(share).over(total_steps)
    assert sum(late.evaluations_at(step) for step in range(total_steps)) == 2 * total_steps - first
    assert late.strength_at(total_steps - 1) == 0.2
    assert late.radius_at(0) == 0.4


@given(penalties, st.floats(0.01, 1.0), st.integers(1, 60))
def test_where_it_acts_the_penalty_is_unchanged(penalty: GradientPenalty, share: float, total_steps: int) -> None:
    try:
        known = [penalty.at(step) for step in range(total_steps)]
    except ValueError:  # a radius of 0 beside a strength
        reject()
    try:
        late = penalty.tail(share, total_steps=total_steps)
    except ValueError as error:
        assert "must act at a step of the run" in str(error)  # noqa: PT017
        start = total_steps - round(share * total_steps)
        assert not any(values.acts for values in known[start:])
        return
    start = total_steps - round(share * total_steps)
    for step in range(total_steps):
        assert late.at(step) == known[step] if step >= start else not late.at(step).acts
    assert late.coefficient_is_one == penalty.coefficient_is_one
    assert GradientPenalty.from_dict(late.to_dict()) == late
    assert not late.depends_on_length


def test_a_tail_costs_what_the_same_share_spread_evenly_costs() -> None:
    for penalty in (sam(rho=0.1), fgr(gamma=0.2, epsilon=0.4), gradreg.cgr(gamma=0.1, epsilon=0.1)):
        late, spread = penalty.tail(1 / 8, total_steps=80), penalty.every(8)
        costs = [sum(each.evaluations_at(step) for step in range(80)) for each in (late, spread)]
        assert costs[0] == costs[1] == 70 + 10 * penalty.evaluations_at(0)


def test_it_goes_with_everything_else() -> None:
    both = sam(rho=0.1).warmup("strength", steps=4).tail(0.5, total_steps=8).every(2)
    assert [round(both.strength_at(step), 12) for step in range(8)] == [0, 0, 0, 0, 0.1, 0, 0.1, 0]
    auto = sam(rho=AutoRadius()).tail(0.5, total_steps=4)
    assert [auto.at(step, radius=0.2).strength for step in range(4)] == [0.0, 0.0, 0.2, 0.2]
    assert auto.coefficient_is_one
    inner = over(Product(left=Tail(value=Ramp(start=1.0, end=3.0, steps=4), share=0.5), right=0.5), total_steps=4)
    assert inner == Product(left=Delay(value=Ramp(start=1.0, end=3.0, steps=4), steps=2), right=Constant(value=0.5))
    assert gnp(r=0.1, alpha=0.0).tail(0.1, total_steps=3) == gnp(r=0.1, alpha=0.0)
    assert str(sam(rho=0.1).tail(0.3)) == "SAM(rho [0.1 in the last 30 % of the steps])"
    assert str(sam(rho=0.1).tail(0.3, total_steps=10)) == "SAM(rho [0.1 from step 7])"


def test_in_dictionaries() -> None:
    assert GradientPenalty.from_dict({"name": "sam", "tail": 0.3}) == sam().tail(0.3)
    assert GradientPenalty.from_dict({"name": "sam", "tail": {"share": 0.3, "total_steps": 10}}) == sam().tail(0.3, total_steps=10)
    late = sam().tail(0.3)
    assert late.depends_on_length
    assert GradientPenalty.from_dict(json.loads(json.dumps(late.to_dict()))) == late
    given_all = {"name": "sam", "warmup": {"kind": "zero", "steps": 2}, "tail": 0.5, "every": 2}
    assert GradientPenalty.from_dict(given_all) == sam().warmup("zero", steps=2).tail(0.5).every(2)


NOTHING = "a penalty must act at a step of the run, of which there are 10; got .*strength is 0 at all. Warm up over fewer steps"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: sam().tail(0.0, total_steps=10), ValueError, r"^share must be in \(0, 1\]; got 0"),
        (lambda: sam().tail(1.5, total_steps=10), ValueError, r"^share must be in \(0, 1\]; got 1.5"),
        (lambda: sam().tail(0.3, total_steps=0), ValueError, "^total_steps must be >= 1; got 0"),
        (lambda: sam().tail(0.3, total_steps=2.5), TypeError, "^total_steps must be a whole number"),  # type: ignore[arg-type]
        (lambda: sam().tail(0.01, total_steps=10), ValueError, NOTHING),
        (lambda: sam().warmup("zero", steps=10).over(10), ValueError, NOTHING),
        (lambda: sam().warmup("zero", steps=12).tail(0.5, total_steps=10), ValueError, NOTHING),
        (lambda: sam().every(4).tail(0.1, total_steps=10), ValueError, NOTHING),
        (lambda: sam().tail(0.3).at(9), ValueError, r"^total_steps must be known .* Write penalty.over\(total_steps=...\)"),
        (lambda: sam().tail(0.3).evaluations_at(0), ValueError, "^total_steps must be known where a penalty acts in the tail"),
        (lambda: GradientPenalty.from_dict({"name": "sam", "tail": {"steps": 3}}), ValueError, "^unknown key of tail: 'steps'"),
        (lambda: GradientPenalty.from_dict({"name": "sam", "tail": "0.3"}), TypeError, "^share must be a number.*Remove the quotes"),
    ],
)
def test_what_it_refuses(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_warm_ups_that_end_within_the_run_are_none_of_its_business() -> None:
    for penalty in (sam(), sam().warmup("zero", steps=9), sam().warmup("radius", steps=100), gradreg.auto(), gradreg.msam(rho=0.1)):
        assert penalty.over(10) == penalty
