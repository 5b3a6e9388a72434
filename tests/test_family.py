"""The parts in which relatives differ: what the constructors build, what it costs, what composes, and forms as text and dictionary."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import gradreg
from gradreg import (
    Adaptive,
    Chance,
    Direction,
    EmaDirection,
    Every,
    FanScaled,
    Flooding,
    Friendly,
    Gradient,
    GradientMixing,
    GradientPenalty,
    IndividualFlooding,
    LossEquated,
    Mask,
    OnlyNorms,
    Plain,
    Ramp,
    Random,
    Reuse,
    Sparse,
    SurrogateGap,
    Unified,
    Unit,
    flooding_from_dict,
    sam,
)
from gradreg.hashing import hashed

from .strategies import plain_penalties


class Untold:
    """A step that is traced: what is computed from it is not known either."""

    def __mod__(self, other: int) -> object:
        raise AssertionError("k = 1 must not ask for the step")


def test_constructors_build_points_of_the_space() -> None:
    assert gradreg.asam(rho=0.5, eta=0.02) == GradientPenalty(power=1, strength=0.5, radius=0.5, direction=Adaptive(eta=0.02))
    assert gradreg.layerwise_sam(rho=0.5).direction == Adaptive(scale="tensor")
    le_sam = gradreg.le_sam(sigma=0.2, rho_max=0.5)
    assert le_sam == GradientPenalty(power=2, strength=0.2, radius=0.2, direction=LossEquated(rho_max=0.5))
    assert gradreg.unified_sam(rho=0.2, lam=0.5) == GradientPenalty(power=2, strength=0.2, radius=0.2, direction=Unified(lam=0.5))
    assert gradreg.mup2_sam(rho=0.2) == GradientPenalty(power=1, strength=0.2, radius=0.2, direction=FanScaled())
    assert gradreg.friendly_sam(rho=0.1, sigma=0.5, beta=0.6).direction == Friendly(sigma=0.5, beta=0.6)
    assert gradreg.random_sam(rho=0.1, seed=3) == GradientPenalty(power=1, strength=0.1, radius=0.1, direction=Random(seed=3))
    remembered = gradreg.remembered(epsilon=0.2, decay=0.25)
    assert remembered == GradientPenalty(power=2, strength=0.2, radius=0.2, direction=EmaDirection(decay=0.25))
    msam = gradreg.msam(rho=0.2, decay=0.25)
    assert msam == GradientPenalty(power=1, strength=0.2, radius=0.2, direction=EmaDirection(decay=0.25, ahead=True))
    assert gradreg.gsam(rho=0.1, a=0.4).mixing == SurrogateGap(a=0.4)
    assert gradreg.looksam(rho=0.1, k=3, a=0.5).reuse == Reuse(k=3, a=0.5)
    assert sam(rho=0.1, steps=4).ascent_steps == 4
    assert gradreg.fgr(gamma=0.1, epsilon=0.2, steps=4).ascent_steps == 4
    assert sam(rho=0.1).only_norms().mask == OnlyNorms()
    assert sam(rho=0.1).sparse(0.5, choice="random", every=7).mask == Sparse(sparsity=0.5, choice="random", every=7)


def test_weighted_sam_is_gnp() -> None:
    assert gradreg.wsam(rho=0.1, gamma=0.8) == gradreg.gnp(r=0.1, alpha=0.8 / (1 - 0.8))
    assert gradreg.wsam(rho=0.1, gamma=0.5) == sam(rho=0.1)
    assert gradreg.wsam(rho=0.1, gamma=0.0).evaluations_at(0) == 1
    decoupled = gradreg.wsam(rho=0.1, gamma=0.8, decoupled=True)
    assert decoupled.decoupled
    assert decoupled.coefficient_at(0) == pytest.approx(4)


@pytest.mark.parametrize(
    ("penalty", "whole", "with_a_quarter"),
    [
        (sam(), 2, 1.25),
        (sam(steps=3), 4, 1.75),
        (gradreg.gnp(r=0.1, alpha=0.8), 2, 2.25),
        (gradreg.fgr(gamma=0.1, epsilon=0.2, steps=3), 4, 2.75),
        (gradreg.bgr(gamma=0.1, epsilon=0.1), 2, 2.25),
        (gradreg.cgr(gamma=0.1, epsilon=0.1), 3, 3.25),
        (gradreg.asam(rho=0.5), 2, 1.25),
        (gradreg.friendly_sam(rho=0.5), 2, 1.25),
        (sam().only_norms(), 2, 1.25),
        (sam().sparse(0.5), 2, 1.25),
        (gradreg.remembered(epsilon=0.2), 1, None),
        (gradreg.msam(rho=0.2), 1, None),
        (gradreg.random_sam(rho=0.2), 1, None),
        (GradientPenalty(power=2, strength=0.1, radius=0.2, direction=EmaDirection()), 2, None),
        (GradientPenalty(power=2, strength=0.2, radius=0.2, direction=EmaDirection(), mixing=SurrogateGap(a=0.1)), 2, None),
        (gradreg.gsam(rho=0.1, a=0.3), 2, None),
        (gradreg.wsam(rho=0.1, gamma=0.8, decoupled=True), 2, None),
        (gradreg.exact(gamma=0.1), 3, None),
    ],
    ids=str,
)
def test_cost(penalty: GradientPenalty, whole: int, with_a_quarter: float | None) -> None:
    assert penalty.evaluations_at(0) == whole
    if with_a_quarter is None:
        with pytest.raises(ValueError, match=r"^ascent must be None .*got closures"):
            penalty.check_ascent("closures")
    else:
        penalty.check_ascent("closures")
        assert penalty.evaluations_at(0, ascent_share=0.25) == with_a_quarter


def test_cost_of_reuse() -> None:
    looksam = gradreg.looksam(rho=0.1, k=3)
    assert [looksam.evaluations_at(step) for step in range(7)] == [2, 1, 1, 2, 1, 1, 2]
    every = gradreg.looksam(rho=0.1, k=1)
    assert every.at(Untold()).fresh is True  # known although the step is not, so that JAX compiles no condition
    assert not every.depends_on_step


@given(plain_penalties, st.integers(1, 9), st.integers(0, 100))
def test_every(penalty: GradientPenalty, k: int, step: int) -> None:
    assume(penalty.radius_at(step) != 0)
    seldom, compensated = penalty.every(k), penalty.every(k, compensate=True)
    acts = step % k == 0
    assert seldom.strength_at(step) == (penalty.strength_at(step) if acts else 0)
    assert compensated.strength_at(step) == pytest.approx(k * penalty.strength_at(step) if acts else 0)
    assert seldom.radius == penalty.radius
    assert seldom.evaluations_at(step) == (penalty.evaluations_at(step) if acts else 1)


def test_every_step_and_probability_one_are_the_penalty() -> None:
    for penalty in (sam(), gradreg.exact(gamma=0.1), gradreg.gnp(r=0.1, alpha=0.0)):
        assert penalty.every(1) == penalty.with_probability(1) == penalty
    assert gradreg.gnp(r=0.1, alpha=0.0).every(3) == gradreg.gnp(r=0.1, alpha=0.0)


@pytest.mark.parametrize(
    "penalty",
    [
        sam(rho=0.1),
        sam(rho=0.3).every(3),
        sam(rho=0.7).with_probability(0.3),
        sam(rho=Ramp(start=0.1, end=0.3, steps=9)).warmup("zero", steps=4).every(2).with_probability(0.9),
        sam(rho=0.3).warmup("radius", steps=4).every(3),
        gradreg.asam(rho=0.3).every(3),
    ],
    ids=str,
)
def test_coefficient_is_exactly_one_where_the_penalty_acts(penalty: GradientPenalty) -> None:
    assert penalty.coefficient_is_one
    assert {penalty.coefficient_at(step) for step in range(100)} <= {0.0, 1.0}
    assert any(penalty.coefficient_at(step) == 1.0 for step in range(100))


@pytest.mark.parametrize(
    "penalty",
    [
        gradreg.gnp(r=0.1, alpha=0.8),
        sam().every(3, compensate=True),
        sam().warmup("strength", steps=3),
        gradreg.exact(gamma=0.1),
    ],
    ids=str,
)
def test_otherwise_it_is_not_known_to_be_one(penalty: GradientPenalty) -> None:
    assert not penalty.coefficient_is_one


def test_probability_is_kept_and_depends_on_the_seed_and_the_step_alone() -> None:
    penalty = sam(rho=0.1).with_probability(0.3, seed=5)
    acts = [penalty.strength_at(step) > 0 for step in range(20_000)]
    assert sum(acts) / len(acts) == pytest.approx(0.3, abs=0.012)  # 3.7 standard deviations
    pairs = sum(a and b for a, b in itertools.pairwise(acts)) / len(acts)
    assert pairs == pytest.approx(0.09, abs=0.01)
    assert [penalty.strength_at(step) > 0 for step in reversed(range(50))] == acts[:50][::-1]
    other = sam(rho=0.1).with_probability(0.3, seed=6)
    assert [other.strength_at(step) > 0 for step in range(50)] != acts[:50]
    strong = sam(rho=0.1).with_probability(0.25, compensate=True)
    assert {strong.strength_at(step) for step in range(50)} == {0.0, 0.4}


def test_hash_is_32_bits_that_change_by_half_with_any_bit() -> None:
    changes = [bin(hashed(3, n) ^ hashed(3, n ^ (1 << bit))).count("1") for n in range(200) for bit in range(32)]
    assert sum(changes) / len(changes) == pytest.approx(16, abs=0.3)
    assert min(changes) >= 2
    assert all(0 <= hashed(seed, 7) < 2**32 for seed in (0, 1, 2**32 - 1))


PARTS = [
    (Direction.from_dict, Gradient()),
    (Direction.from_dict, Adaptive(eta=0.1, scale="tensor", one_dimensional=True)),
    (Direction.from_dict, Friendly(sigma=0.5, beta=0.6)),
    (Direction.from_dict, EmaDirection(decay=0.3, ahead=True)),
    (Direction.from_dict, Random(seed=4)),
    (Mask.from_dict, OnlyNorms()),
    (Mask.from_dict, Sparse(sparsity=0.5, choice="random", every=5, seed=1)),
    (GradientMixing.from_dict, SurrogateGap(a=0.2)),
    (GradientMixing.from_dict, Plain()),
    (GradientMixing.from_dict, Unit()),
    (flooding_from_dict, Flooding(level=0.1)),
    (flooding_from_dict, IndividualFlooding(level=0.1)),
]


@pytest.mark.parametrize(("build", "part"), PARTS, ids=[str(part) for _, part in PARTS])
def test_parts_are_plain_dictionaries(build, part) -> None:
    assert build(json.loads(json.dumps(part.to_dict()))) == part
    assert str(part) == str(build(part.to_dict()))


@pytest.mark.parametrize(
    ("data", "penalty"),
    [
        ({"name": "asam", "rho": 0.5, "eta": 0.1}, gradreg.asam(rho=0.5, eta=0.1)),
        ({"name": "looksam", "rho": 0.5, "k": 3, "a": 0.1}, gradreg.looksam(rho=0.5, k=3, a=0.1)),
        ({"name": "sam", "every": 3}, sam().every(3)),
        ({"name": "sam", "every": 3, "compensate": True}, sam().every(3, compensate=True)),
        ({"name": "sam", "probability": 0.5}, sam().with_probability(0.5)),
        ({"name": "sam", "probability": {"p": 0.5, "seed": 3}, "compensate": True}, sam().with_probability(0.5, seed=3, compensate=True)),
        ({"name": "sam", "warmup": {"kind": "zero", "steps": 4}, "every": 2}, sam().warmup("zero", steps=4).every(2)),
        ({"name": "sam", "rho": 0.1, "mask": {"mask": "norms"}}, sam(rho=0.1).only_norms()),
        ({"name": "sam", "rho": 0.1, "mask": "norms"}, sam(rho=0.1).only_norms()),
        ({"name": "wsam", "rho": 0.1, "gamma": 0.9, "decoupled": True}, gradreg.wsam(rho=0.1, gamma=0.9, decoupled=True)),
        (
            {
                "power": 1,
                "strength": 0.1,
                "radius": 0.2,
                "direction": {"direction": "friendly"},
                "reuse": {"k": 2, "a": 1},
            },
            GradientPenalty(power=1, strength=0.1, radius=0.2, direction=Friendly(), reuse=Reuse(k=2, a=1.0)),
        ),
    ],
    ids=str,
)
def test_from_dict(data: dict[str, object], penalty: GradientPenalty) -> None:
    assert GradientPenalty.from_dict(data) == penalty
    assert GradientPenalty.from_dict(json.loads(json.dumps(penalty.to_dict()))) == penalty


def test_text() -> None:
    for penalty, text in (
        (gradreg.asam(rho=0.5), "SAM(rho 0.5), direction adaptive by element(eta 0.01)"),
        (gradreg.gsam(rho=0.5, a=0.2), "SAM(rho 0.5), surrogate gap(a 0.2)"),
        (gradreg.looksam(rho=0.5, k=3), "SAM(rho 0.5), reuse(every 3 steps, a 0.7)"),
        (gradreg.remembered(epsilon=0.2), "F-GR(gamma 0.2, epsilon 0.2), direction average of results(decay 0.5)"),
        (sam(rho=0.5, steps=3).sparse(0.9), "SAM(rho 0.5), 90% sparse, by fisher, every 100 steps, 3 ascent steps"),
        (sam(rho=0.5).every(3), "SAM(rho [0.5 x 1 every 3 steps])"),
        (Every(k=3), "1 every 3 steps"),
        (Chance(p=0.5), "1 with probability 0.5 (seed 0)"),
    ):
        assert str(penalty) == text


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: gradreg.asam(rho=0), ValueError, "^rho must be finite and > 0; got 0"),
        (lambda: gradreg.asam(rho=0.1, eta=-1), ValueError, "^eta must be finite and >= 0; got -1"),
        (lambda: gradreg.asam(rho=0.1, one_dimensional=1), TypeError, "^one_dimensional must be True or False; got 1"),
        (lambda: Adaptive(scale="layer"), ValueError, "^unknown scale 'layer'.*Known: element, tensor"),
        (lambda: gradreg.friendly_sam(rho=0.1, beta=1.0), ValueError, r"^beta must be in \[0, 1\); got 1.0"),
        (lambda: gradreg.remembered(epsilon=0.1, decay=1), ValueError, r"^decay must be in \[0, 1\); got 1"),
        (lambda: EmaDirection(ahead=1), TypeError, "^ahead must be True or False; got 1"),
        (lambda: gradreg.remembered(epsilon=-1), ValueError, "^epsilon must be finite and > 0; got -1"),
        (lambda: gradreg.random_sam(rho=0.1, seed=2**32), ValueError, r"^seed must be < 2\*\*32; got 4294967296"),
        (lambda: gradreg.gsam(rho=0.1, a=-1), ValueError, "^a must be finite and >= 0; got -1"),
        (lambda: gradreg.gsam(rho=0.1), TypeError, "^gsam needs a; got only rho=0.1"),
        (lambda: gradreg.wsam(rho=0.1, gamma=1.0), ValueError, r"^gamma must be in \[0, 1\); got 1.0"),
        (lambda: gradreg.wsam(rho=0.1, gamma=0.5, decoupled="yes"), TypeError, "^decoupled must be True or False; got 'yes'"),
        (lambda: gradreg.looksam(rho=0.1, k=0), ValueError, "^k must be >= 1; got 0"),
        (lambda: sam(steps=0), ValueError, "^ascent_steps must be >= 1; got 0"),
        (lambda: sam(steps=1.5), TypeError, "^ascent_steps must be a whole number >= 1; got 1.5"),
        (lambda: sam().sparse(1.0), ValueError, r"^sparsity must be in \[0, 1\); got 1.0"),
        (lambda: sam().sparse(0.5, choice="fischer"), ValueError, "^unknown choice 'fischer'. Did you mean 'fisher'"),
        (lambda: sam().every(0), ValueError, "^k must be >= 1; got 0. Leave .every"),
        (lambda: sam().with_probability(0), ValueError, r"^p must be in \(0, 1\]; got 0"),
        (lambda: sam().every(2, compensate=1), TypeError, "^compensate must be True or False; got 1"),
        (
            lambda: GradientPenalty(power=1, strength=0.1, radius=0.1, direction="adaptive"),
            TypeError,
            "^direction must be a Direction; got",
        ),
        (lambda: GradientPenalty(power=1, strength=0.1, radius=0.1, mask="norms"), TypeError, "^mask must be a Mask; got 'norms'"),
        (
            lambda: GradientPenalty(power=1, strength=0.1, radius=0.2, mixing="unit", direction=Friendly()),
            ValueError,
            "^mixing='unit' must go with power 1, the forward difference and the gradient itself as direction; got .*friendly",
        ),
        (
            lambda: GradientPenalty(power=2, strength=0.1, radius=None, difference="exact", direction=Friendly()),
            ValueError,
            "^difference='exact' must go with the gradient itself as direction",
        ),
        (lambda: gradreg.exact(gamma=0.1).sparse(0.5), ValueError, "^difference='exact' must go with .* no Sparse mask"),
        (
            lambda: GradientPenalty(power=2, strength=0.1, radius=0.1, difference="central", ascent_steps=2),
            ValueError,
            "^ascent_steps must be 1 unless the difference is forward .* got 2 with difference 'central'",
        ),
        (
            lambda: GradientPenalty(power=2, strength=0.1, radius=0.1, direction=Random()),
            ValueError,
            r"^direction=random\(seed 0\) must go with power 1.*got power 2. Use random_sam",
        ),
        (
            lambda: GradientPenalty(power=2, strength=0.1, radius=0.1, direction=EmaDirection(), reuse=Reuse(k=2, a=1)),
            ValueError,
            r"^reuse\(every 2 steps, a 1\) must go with a direction that needs a gradient",
        ),
        (lambda: gradreg.random_sam(rho=0.1).sparse(0.5), ValueError, "^mask=50% sparse.* must go with a direction that needs a gradient"),
        (
            lambda: GradientPenalty.from_dict({"name": "sam", "compensate": True}),
            ValueError,
            "^compensate must go with every or probability",
        ),
        (lambda: GradientPenalty.from_dict({"name": "sam", "probability": {"q": 1}}), ValueError, "^unknown key of probability: 'q'"),
        (
            lambda: GradientPenalty.from_dict({"name": "sam", "mask": {"mask": "norm"}}),
            ValueError,
            "^unknown mask 'norm'. Did you mean 'norms'",
        ),
        (
            lambda: GradientPenalty.from_dict({"name": "sam", "mask": "sparse"}),
            TypeError,
            "^mask 'sparse' needs sparsity, choice, every, seed; got only nothing",
        ),
        (
            lambda: Mask.from_dict({"sparsity": 0.5}),
            TypeError,
            "^a mask must be a mapping with the key 'mask', one of norms, sparse; got {'sp",
        ),
        (lambda: Direction.from_dict({"direction": "friendly", "sgma": 1}), ValueError, "^unknown key of direction 'friendly': 'sgma'"),
        (
            lambda: GradientPenalty.from_dict({"power": 1, "strength": 0.1, "radius": 0.1, "reuse": {"k": 1}}),
            TypeError,
            "^reuse needs a; got only k=1. Write k=..., a=...",
        ),
        (lambda: GradientMixing.from_dict({"mixing": "surrogate-gap"}), TypeError, "^mixing 'surrogate-gap' needs a; got only nothing"),
        (lambda: GradientMixing.from_dict("reuse"), ValueError, "^unknown mixing 'reuse'.*Known: plain, unit, surrogate-gap"),
        (lambda: replace(sam(), reuse=5), TypeError, r"^reuse must be a Reuse or None; got 5. Use gradreg.Reuse\(k=5, a=0.7\)"),
        (lambda: replace(sam(), decoupled=1), TypeError, "^decoupled must be True or False; got 1"),
        (
            lambda: replace(gradreg.looksam(rho=0.1), decoupled=True),
            ValueError,
            r"^decoupled must be False with reuse\(every 5 steps, a 0.7\), which adds to the plain gradient; got True",
        ),
        (
            lambda: replace(gradreg.gsam(rho=0.1, a=0.3), decoupled=True),
            ValueError,
            r"^mixing='surrogate gap\(a 0.3\)' must stand alone; got it with decoupled",
        ),
        (
            lambda: replace(gradreg.gnp(r=0.1, alpha=0.8, mixing="unit"), reuse=Reuse(k=2, a=1)),
            ValueError,
            r"^mixing='unit' must stand alone; got it with reuse\(every 2 steps, a 1\)",
        ),
        (
            lambda: replace(gradreg.exact(gamma=0.1), decoupled=True),
            ValueError,
            "^difference='exact' must go with .*got direction gradient, decoupled",
        ),
        (lambda: Flooding(level=-1), ValueError, "^level must be finite and >= 0; got -1"),
        (
            lambda: IndividualFlooding(level=0.1)(0.5),
            ValueError,
            r"^losses must be an array of one loss for each sample; got 0.5. Leave.*Flooding\(level=0.1\)",
        ),
        (lambda: IndividualFlooding(level=0.1)([0.5, 0.2]), ValueError, r"^losses must be an array .*; got \[0.5, 0.2\] \(list\)"),
    ],
)
def test_what_is_wrong_or_means_nothing_is_refused(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_name_belongs_to_one_part() -> None:
    with pytest.raises(
        ValueError, match=r"name must be one that no other direction has; got 'friendly', which is gradreg.directions.Friendly"
    ):

        class Other(gradreg.Direction, name="friendly"): ...

    assert gradreg.Direction.kinds["friendly"] is Friendly
