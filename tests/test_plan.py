"""A step's numbers and its plan of passes, for every kind of penalty: what is evaluated, where, in which order, with what weight."""

from dataclasses import dataclass
from typing import Any

import pytest

import gradreg
from gradreg import Constant, GradientPenalty, Schedule
from gradreg.plan import PLAIN, Pass, Plan, stencil

from .penalties import PENALTIES, every_penalty


@pytest.mark.parametrize("difference", ["forward", "backward", "central"])
@pytest.mark.parametrize("c", [0.25, 1.0, 1.5])
def test_weights_sum_to_one_and_first_moments_to_c(difference, c: float) -> None:
    """A constant gradient comes back unchanged, and the slope along d enters c times."""
    plain, perturbed = stencil(difference, c)
    assert plain + sum(weight for _, weight in perturbed) == pytest.approx(1.0)
    assert sum(offset * weight for offset, weight in perturbed) == pytest.approx(c)


def test_central_has_no_second_moment() -> None:
    assert sum(offset**2 * weight for offset, weight in stencil("central", 0.8)[1]) == 0.0


def test_exact_is_no_finite_difference() -> None:
    with pytest.raises(ValueError, match=r"difference must be 'forward', 'backward' or 'central'; got 'exact'"):
        stencil("exact", 1.0)


def plan_at(penalty: GradientPenalty, step: int, *, separate_ascent: bool = False) -> Plan:
    return penalty.plan(penalty.at(step), separate_ascent=separate_ascent)


DIRECTION_ALONE = Pass(gives_direction=True, keeps="nothing")
APART, APART_ALONE = Pass(gives_direction=True, keeps="apart"), Pass(keeps="apart")
HALFWAY = Pass(offset=1 / 2, gives_direction=True, keeps="nothing")


def plain(weight: float) -> Pass:
    return Pass(weight=weight, gives_direction=True)


def at(offset: float, weight: float) -> Pass:
    return Pass(offset=offset, weight=weight)


PLANS: dict[str, tuple[tuple[Pass, ...], float]] = {
    "sam": ((DIRECTION_ALONE, at(1, 1.0)), 0.0),
    "gnp": ((plain(0.2), at(1, 0.8)), 0.0),
    "gnp-extrapolating": ((plain(-0.5), at(1, 1.5)), 0.0),
    "gnp-unit": ((plain(1.0), at(1, 0.8)), 0.2),
    "bgr": ((plain(1.75), at(-1, -0.75)), 0.0),
    "cgr": ((plain(1.0), at(1, 0.375), at(-1, -0.375)), 0.0),
    "friendly-mixing": ((plain(1.4), at(-1, -0.4)), 0.0),
    "remembered": ((at(1, 1.0),), 0.0),
    "remembered-mixing": ((Pass(weight=1 / 3), at(1, 2 / 3)), 0.0),
    "sam-3-steps": (
        (
            DIRECTION_ALONE,
            Pass(offset=1 / 3, gives_direction=True, keeps="nothing"),
            Pass(offset=2 / 3, gives_direction=True, keeps="nothing"),
            at(1, 1.0),
        ),
        0.0,
    ),
    "fgr-2-steps": ((plain(0.6), HALFWAY, at(1, 0.4)), 0.0),
    "gsam": ((APART, at(1, 1.0)), 0.0),
    "gap-central": ((APART, at(1, 0.375), at(-1, -0.375)), 1.0),
    "gap-remembered": ((APART_ALONE, at(1, 1.0)), 0.0),
    "wsam-decoupled": ((APART, at(1, 1.5)), -0.5),
    "looksam": ((APART, at(1, 1.0)), 0.0),
}
"""By name, the passes of a step that acts and the weight of the plain gradient that is kept apart: one penalty of each form of plan."""

SAME = {
    "sam": ["fgr", "sam-zero-warm-up", "asam", "layerwise", "friendly", "sparse-fisher", "adaptive-sparse-fisher", "sam-every-2"],
    "remembered": ["msam", "random"],
}
"""What has the plan of another."""

ASCENTS: dict[str, tuple[Pass, ...]] = {
    "sam": (Pass(of="ascent", gives_direction=True, keeps="nothing"), at(1, 1.0)),
    "gnp": (Pass(weight=0.2), Pass(of="ascent", gives_direction=True, keeps="nothing"), at(1, 0.8)),
    "bgr": (Pass(weight=1.75), Pass(of="ascent", gives_direction=True, keeps="nothing"), at(-1, -0.75)),
    "fgr-2-steps": (
        Pass(weight=0.6),
        Pass(of="ascent", gives_direction=True, keeps="nothing"),
        Pass(offset=1 / 2, of="ascent", gives_direction=True, keeps="nothing"),
        at(1, 0.4),
    ),
}
"""With an ascent function of its own."""


def assert_same_passes(passes: tuple[Pass, ...], expected: tuple[Pass, ...]) -> None:
    """Equal, but for rounding in offsets and weights."""
    assert len(passes) == len(expected)
    for ours, theirs in zip(passes, expected, strict=True):
        assert (ours.of, ours.gives_direction, ours.keeps) == (theirs.of, theirs.gives_direction, theirs.keeps)
        assert (ours.offset, ours.weight) == pytest.approx((theirs.offset, theirs.weight))


@pytest.mark.parametrize("name", [*PLANS, *(other for others in SAME.values() for other in others)])
def test_the_plan_of_a_step_that_acts(name: str) -> None:
    passes, plain_weight = PLANS[next((one for one, others in SAME.items() if name in others), name)]
    plan = plan_at(PENALTIES[name], 50)
    assert_same_passes(plan.passes, passes)
    assert plan.plain_weight == pytest.approx(plain_weight)
    assert not plan.exact
    assert not plan.reuses


@pytest.mark.parametrize("name", ASCENTS)
def test_the_plan_with_an_ascent_function(name: str) -> None:
    assert_same_passes(plan_at(PENALTIES[name], 0, separate_ascent=True).passes, ASCENTS[name])


def test_the_plan_where_nothing_is_perturbed() -> None:
    assert plan_at(PENALTIES["exact"], 0) == Plan(exact=True)
    assert plan_at(PENALTIES["sam-zero-warm-up"], 2) is PLAIN
    assert plan_at(PENALTIES["sam-zero-warm-up"], 2, separate_ascent=True) is PLAIN
    assert plan_at(PENALTIES["looksam"], 1) == Plan(reuses=True)
    assert Plan() == PLAIN == Plan(passes=(Pass(),))


@every_penalty
def test_values_of_a_step(penalty: GradientPenalty) -> None:
    """``at`` is what ``strength_at`` and its like give, and says whether the penalty acts and finds its part anew."""
    for step in range(10):
        values = penalty.at(step)
        strength, radius = penalty.strength_at(step), penalty.radius_at(step)
        assert (values.step, values.strength, values.radius) == (step, strength, radius)
        assert values.coefficient == penalty.coefficient_at(step)
        if radius is not None:
            assert values.coefficient == pytest.approx(strength / radius if strength else 0.0)
        assert values.acts is (strength != 0.0)
        assert values.fresh is (values.acts and (penalty.reuse is None or step % penalty.reuse.k == 0))


@every_penalty
def test_what_every_plan_keeps(penalty: GradientPenalty) -> None:
    for step in range(10):
        plan, values = plan_at(penalty, step), penalty.at(step)
        assert plan.evaluations() == (3 if plan.exact else len(plan.passes)) == penalty.evaluations_at(step)
        assert penalty.starts_unperturbed_at(step) == (plan.passes[0].offset == 0)
        assert sum(weights(plan, penalty)) == pytest.approx(1.0)
        if not values.fresh or plan.exact:
            assert plan.passes == (Pass(),)
            continue
        assert sum(this.weight * this.offset for this in plan.passes if this.keeps == "sum") == pytest.approx(values.coefficient)
        assert_direction_comes_first(plan, penalty)
        last = plan.passes[-1]
        assert (last.keeps, abs(last.offset), last.gives_direction, last.of) == ("sum", 1, False, "loss")


def weights(plan: Plan, penalty: GradientPenalty) -> list[float]:
    """The factors with which gradients enter the result, where the mixing leaves them as they are."""
    normalized = penalty.mixing.plain_gradient == "normalized"
    of_plain = [plan.plain_weight] if normalized or any(this.keeps == "apart" for this in plan.passes) else []
    return of_plain + [this.weight for this in plan.passes if this.keeps == "sum" and not (normalized and this.offset == 0)]


def assert_direction_comes_first(plan: Plan, penalty: GradientPenalty) -> None:
    """A perturbed pass follows one that gives the direction, if that needs a gradient; each ascent step begins where the last one ended."""
    giving = [this.offset for this in plan.passes if this.gives_direction]
    assert bool(giving) == penalty.direction.needs_gradient
    if giving:
        assert giving == pytest.approx([i / penalty.ascent_steps for i in range(penalty.ascent_steps)])
        assert next(i for i, this in enumerate(plan.passes) if this.offset) > next(
            i for i, this in enumerate(plan.passes) if this.gives_direction
        )


@dataclass(frozen=True, eq=False)
class Counting(Schedule):
    """A value, and how often it was asked for."""

    value: float
    calls: list[Any]

    def evaluate(self, step: Any, ops: Any) -> Any:
        self.calls.append(step)
        return self.value

    def bounds(self) -> tuple[float, float]:
        return self.value, self.value


def test_schedules_are_evaluated_once_a_step() -> None:
    strength, radius = Counting(0.2, []), Counting(0.5, [])
    penalty = gradreg.fgr(gamma=strength, epsilon=radius)
    values = penalty.at(7)
    penalty.plan(values)
    assert strength.calls == radius.calls == [7]
    assert (values.strength, values.radius, values.coefficient) == (0.2, 0.5, 0.4)


def test_a_schedule_that_is_strength_and_radius_is_evaluated_once_for_both() -> None:
    rho = Counting(0.2, [])
    values = gradreg.sam(rho=rho).at(7)
    assert rho.calls == [7]
    assert (values.strength, values.radius, values.coefficient) == (0.2, 0.2, 1.0)
    assert gradreg.sam(rho=Constant(value=0.2)).at(0).radius == 0.2
