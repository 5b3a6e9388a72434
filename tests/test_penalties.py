"""The specification: what the constructors build, its values over steps, and its forms as text, dictionary and pickle."""

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import gradreg
from gradreg import Constant, Cosine, GradientPenalty, Ramp, bgr, cgr, exact, fgr, gnp, sam

from .strategies import penalties, plain_penalties, steps


@pytest.mark.parametrize(
    ("penalty", "power", "strength", "radius", "difference"),
    [
        (sam(rho=0.2), 1, 0.2, 0.2, "forward"),
        (sam(), 1, 0.05, 0.05, "forward"),
        (gnp(r=0.5, alpha=0.8), 1, 0.4, 0.5, "forward"),
        (gnp(r=0.5, alpha=1), 1, 0.5, 0.5, "forward"),
        (fgr(gamma=0.1, epsilon=0.5), 2, 0.1, 0.5, "forward"),
        (bgr(gamma=0.1, epsilon=0.5), 2, 0.1, 0.5, "backward"),
        (cgr(gamma=0.1, epsilon=0.5), 2, 0.1, 0.5, "central"),
        (exact(gamma=0.1), 2, 0.1, None, "exact"),
        (exact(gamma=0.1, power=1), 1, 0.1, None, "exact"),
    ],
    ids=str,
)
def test_constructors(penalty: GradientPenalty, power: int, strength: float, radius: float | None, difference: str) -> None:
    assert (penalty.power, penalty.strength, penalty.radius, penalty.difference) == (power, strength, radius, difference)
    assert penalty.mixing == gradreg.Plain()
    assert (penalty.reuse, penalty.decoupled) == (None, False)


def test_reductions_are_equalities() -> None:
    assert gnp(r=0.3, alpha=1.0) == sam(rho=0.3)
    assert gnp(r=Ramp(steps=5), alpha=1.0) == sam(rho=Ramp(steps=5))
    assert gnp(r=0.3, alpha=1.0, mixing="unit") != sam(rho=0.3)
    assert fgr(gamma=0.3, epsilon=0.3) != sam(rho=0.3)
    assert fgr(gamma=1, epsilon=1) == fgr(gamma=1.0, epsilon=1.0)


@given(penalties, st.integers(0, 3000))
def test_values_at_a_step(penalty: GradientPenalty, step: int) -> None:
    strength, radius = penalty.strength_at(step), penalty.radius_at(step)
    assume(radius != 0 or strength == 0)  # refused: see test_bad_penalties
    c = penalty.coefficient_at(step)
    assert strength >= 0
    if penalty.difference == "exact":
        assert radius is None
        assert c is None
    else:
        assert radius is not None
        assert c is not None
        assert c * radius == pytest.approx(strength)
    assert penalty.evaluations_at(step) == (1 if strength == 0 else {"forward": 2, "backward": 2}.get(penalty.difference, 3))


@given(plain_penalties, steps, st.integers(0, 3000))
def test_warmups_scale_the_penalty_and_end_in_it(penalty: GradientPenalty, n: int, step: int) -> None:
    s = min(1.0, step / n)
    strength, radius = penalty.strength_at(step), penalty.radius_at(step)
    late = penalty.warmup("zero", steps=n)
    assert (late.strength_at(step), late.radius_at(step)) == (strength if step >= n else 0.0, radius)
    ramped = penalty.warmup("strength", steps=n)
    assert ramped.strength_at(step) == pytest.approx(s * strength)
    assert ramped.radius_at(step) == radius
    if radius is not None:
        both = penalty.warmup("radius", steps=n)
        assert both.strength_at(step) == pytest.approx(s * strength)
        assert both.radius_at(step) == pytest.approx(radius if penalty.strength == 0 else s * radius)


def test_warmup_makes_a_new_object() -> None:
    penalty = sam(rho=0.1)
    assert penalty.warmup("zero", steps=3) != penalty
    assert penalty == sam(rho=0.1)
    assert penalty.warmup("zero", steps=3) == penalty.warmup("zero", steps=3)
    assert penalty.warmup("radius", steps=3).coefficient_at(1) == 1.0


@given(penalties)
def test_dictionary_pickle_hash_and_equality(penalty: GradientPenalty) -> None:
    for twin in (GradientPenalty.from_dict(penalty.to_dict()), pickle.loads(pickle.dumps(penalty)), replace(penalty)):
        assert twin == penalty
        assert hash(twin) == hash(penalty)
        assert str(twin) == str(penalty)
    assert penalty != exact(gamma=123.0)
    assert len({penalty, replace(penalty)}) == 1


@given(penalties)
def test_dictionary_is_plain(penalty: GradientPenalty) -> None:
    """Numbers, strings and nested dictionaries: what YAML and JSON hold."""
    import json

    plain = penalty.to_dict()
    assert GradientPenalty.from_dict(json.loads(json.dumps(plain))) == penalty


@pytest.mark.parametrize(
    ("data", "penalty"),
    [
        ({"name": "sam", "rho": 0.1}, sam(rho=0.1)),
        ({"name": "sam"}, sam()),
        ({"name": "gnp", "r": 0.1, "alpha": 0.8, "mixing": "unit"}, gnp(r=0.1, alpha=0.8, mixing="unit")),
        ({"name": "fgr", "gamma": 1, "epsilon": 0.5}, fgr(gamma=1.0, epsilon=0.5)),
        ({"name": "exact", "gamma": 0.1, "power": 1}, exact(gamma=0.1, power=1)),
        ({"name": "sam", "rho": 0.1, "warmup": {"kind": "zero", "steps": 9}}, sam(rho=0.1).warmup("zero", steps=9)),
        ({"name": "sam", "rho": {"schedule": "ramp", "end": 0.3, "steps": 9}}, sam(rho=Ramp(end=0.3, steps=9))),
        ({"power": 2, "strength": 0.1, "radius": 0.2, "difference": "central"}, cgr(gamma=0.1, epsilon=0.2)),
        ({"power": 1, "strength": 0.2, "radius": 0.2, "warmup": {"kind": "radius", "steps": 2}}, sam(rho=0.2).warmup("radius", steps=2)),
    ],
)
def test_from_dict(data: dict[str, object], penalty: GradientPenalty) -> None:
    before = dict(data)
    assert GradientPenalty.from_dict(data) == penalty
    assert data == before


@pytest.mark.parametrize(
    ("penalty", "text"),
    [
        (sam(rho=0.05), "SAM(rho 0.05)"),
        (gnp(r=0.1, alpha=0.8), "GNP(r 0.1, alpha 0.8)"),
        (gnp(r=0.1, alpha=0.8, mixing="unit"), "GNP(r 0.1, alpha 0.8, unit mixing)"),
        (fgr(gamma=0.5, epsilon=0.25), "F-GR(gamma 0.5, epsilon 0.25)"),
        (bgr(gamma=0.5, epsilon=0.25), "B-GR(gamma 0.5, epsilon 0.25)"),
        (cgr(gamma=0.5, epsilon=0.25), "C-GR(gamma 0.5, epsilon 0.25)"),
        (exact(gamma=0.5), "exact(power 2, gamma 0.5)"),
        (exact(gamma=0.5, power=1), "exact(power 1, lambda 0.5)"),
        (sam(rho=Cosine(start=0.2, steps=9)), "SAM(rho [cosine(0.2 -> 0 over 9 steps)])"),
        (sam(rho=0.1).warmup("zero", steps=9), "SAM(rho [0.1 from step 9])"),
        (
            GradientPenalty(power=1, strength=0.1, radius=0.2, difference="central"),
            "gradient norm, central difference(lambda 0.1, r 0.2)",
        ),
    ],
)
def test_text(penalty: GradientPenalty, text: str) -> None:
    assert str(penalty) == text


def test_nothing_to_warm_up_without_a_strength() -> None:
    """So that a study over strengths may begin at 0."""
    for kind in ("zero", "radius", "strength"):
        assert gnp(r=0.1, alpha=0.0).warmup(kind, steps=5) == gnp(r=0.1, alpha=0.0)


def test_is_immutable_and_takes_constants_as_schedules() -> None:
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'strength'"):
        sam().strength = 0.1  # type: ignore[misc]
    assert sam(rho=Constant(value=0.1)).strength_at(5) == 0.1
    assert gradreg.GradientPenalty is GradientPenalty
