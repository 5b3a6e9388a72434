"""``HeldOut`` as a rule: against statistics computed at once, and how often it errs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from gradreg import HeldOut
from gradreg.auto_radius import NUMBERS
from gradreg.held_out import HelpState


def after(rule: HeldOut, products: list[float]) -> list[HelpState]:
    states = [rule.initial]
    for product in products:
        states.append(rule.update(states[-1], product, NUMBERS))
    return states[1:]


def weighted(products: list[float], memory: int) -> tuple[float, float, float]:
    """The weighted mean in units of the scale, its standard error and the effective number, from all products at once."""
    units, grown, scale = list[float](), list[float](), abs(products[0])
    for product in products:
        units.append(max(scale, abs(product) / 5))
        grown.append(units[-1] / scale)
        scale = units[-1] + min(1.0, 4 / memory) * (abs(product) - units[-1])
    ages = range(len(products) - 1, -1, -1)
    scaled = [product / unit / math.prod(grown[i + 1 :]) for i, (product, unit) in enumerate(zip(products, units, strict=True))]
    weights = [(1 - 1 / memory) ** age for age in ages]
    total = sum(weights)
    mean = sum(w * c for w, c in zip(weights, scaled, strict=True)) / total
    number = total**2 / sum(w * w for w in weights)
    spread = sum(w * (c - mean) ** 2 for w, c in zip(weights, scaled, strict=True)) / total
    return mean, math.sqrt(spread / (number - 1)) if number > 1 else 0.0, number


def test_the_switch_is_that_of_the_weighted_mean_and_its_standard_error() -> None:
    draw, rule = random.Random(3), HeldOut(memory=6, off=1.5, on=0.5)
    products = [draw.gauss(-0.2 if 20 <= i < 60 else 0.2, 0.4) * (1e-3 if i < 5 else 1) for i in range(100)]
    helps, seen = 1.0, set[float]()
    for i, state in enumerate(after(rule, products)):
        mean, error, number = weighted(products[: i + 1], 6)
        if number > 4:
            helps = 0.0 if mean < -1.5 * error else 1.0 if mean > 0.5 * error else helps
        assert state.helps == helps
        assert state.mean / state.weight == pytest.approx(mean)
        seen.add(helps)
    assert seen == {0.0, 1.0}


def test_what_the_first_epochs_measured_does_not_hide_the_rest() -> None:
    """Products as on a network that underfits: large and positive at first, then a hundredth of it and negative."""
    draw = random.Random(0)
    products = [draw.gauss(0.3, 0.2) for _ in range(30)] + [draw.gauss(-0.005, 0.01) for _ in range(90)]
    states = after(HeldOut(), products)
    assert all(state.helps for state in states[:30])
    assert not any(state.helps for state in states[75:])


def test_the_size_of_a_product_does_not_weigh_it() -> None:
    """Nine of ten are -0.5 and one is 10: in the mean it helps, and it is off no more often than chance makes it."""
    draw, on = random.Random(9), 0.0
    for _ in range(30):
        states = after(HeldOut(), [10.0 if draw.random() < 0.1 else -0.5 for _ in range(300)])
        on += sum(state.helps for state in states[60:]) / 240 / 30
    assert on > 0.7


def test_a_constant_factor_changes_nothing() -> None:
    draw = random.Random(2)
    products = [draw.gauss(-0.1, 0.4) for _ in range(100)]
    one, other = ([state.helps for state in after(HeldOut(), [factor * p for p in products])] for factor in (1.0, 2.0**-20))
    assert one == other
    assert set(one) == {0.0, 1.0}


def test_equal_products_decide_at_the_fifth() -> None:
    for memory in (4, 20, 1000):
        assert [state.helps for state in after(HeldOut(memory=memory), [-0.1] * 6)] == [1, 1, 1, 1, 0, 0]


def test_what_is_not_finite_changes_nothing() -> None:
    rule = HeldOut()
    (*_, state) = after(rule, [0.1, -0.2, 0.3])
    assert rule.update(state, math.nan, NUMBERS) == rule.update(state, math.inf, NUMBERS) == state
    assert rule.update(rule.initial, math.nan, NUMBERS) == rule.initial


@pytest.mark.parametrize(("mean", "least", "most"), [(-0.3, 0.0, 0.05), (0.0, 0.3, 0.9), (0.3, 0.97, 1.0)])
def test_how_much_of_a_long_run_it_is_on(mean: float, least: float, most: float) -> None:
    """Products with standard deviation .4, of which one is mostly noise, in 30 runs of 200 measurements."""
    draw, on = random.Random(7), 0.0
    for _ in range(30):
        states = after(HeldOut(), [max(-1.0, min(1.0, draw.gauss(mean, 0.4))) for _ in range(200)])
        on += sum(state.helps for state in states[30:]) / 170 / 30
    assert least <= on <= most


def test_it_comes_back() -> None:
    draw = random.Random(1)
    products = [draw.gauss(-0.3 if i < 50 else 0.3, 0.3) for i in range(120)]
    states = after(HeldOut(), products)
    assert (states[0].helps, states[49].helps, states[119].helps) == (1.0, 0.0, 1.0)
    back = next(i for i in range(50, 120) if states[i].helps)
    assert 55 < back < 80  # the memory of 20 measurements


@pytest.mark.parametrize(("samples", "met"), [(100, True), (10_000, False)])
def test_the_second_condition_compares_the_mean_gradient_with_its_sampling_noise(samples: int, met: bool) -> None:
    """Gradients of single samples are N(m, C) with tr(C) = 16 and ‖m‖² = 1, in batches of 20: r is .16 and .0016, above and below .05."""
    draw, size, dimensions = random.Random(11), 20, 4
    rule = HeldOut(steps_per_epoch=samples // size)
    state = rule.waiting
    assert state is not None
    helps: list[float] = []
    for _ in range(400):
        g, h = ([draw.gauss(0.5, 2.0 / math.sqrt(size)) for _ in range(dimensions)] for _ in range(2))
        excess = rule.excess(sum(a * a for a in g), sum(a * b for a, b in zip(g, h, strict=True)))
        state = rule.wait(state, excess, 0, NUMBERS)
        helps.append(state.helps)
    assert helps[:10] == [0.0] * 10
    assert sum(helps[50:]) / 350 == pytest.approx(float(met), abs=0.1)


def test_the_second_condition_is_that_r_exceeds_the_noise() -> None:
    rule = HeldOut(steps_per_epoch=8, noise=0.1)
    for square, product in ((1.0, 0.5), (1.0, 0.6), (3.0, 2.0), (1.0, -0.2)):
        r = math.inf if product <= 0 else (square - product) / (8 * product)
        assert (rule.excess(square, product) > 0) == (r > 0.1)
    assert HeldOut().waiting is None
    assert rule.waiting == rule.initial._replace(helps=0.0)


def waiting_after(rule: HeldOut, excesses: list[float], every: int = 10) -> list[float]:
    """Whether the second condition holds after each measurement, one in ``every`` penalized steps."""
    state = rule.waiting
    assert state is not None
    helps: list[float] = []
    for i, excess in enumerate(excesses):
        state = rule.wait(state, excess, every * i, NUMBERS)
        helps.append(state.helps)
    return helps


@pytest.mark.parametrize(("memory", "first"), [(4, 4), (8, 4), (20, 10), (40, 20)])
def test_the_second_condition_is_judged_once_half_of_the_memory_has_been_measured(memory: int, first: int) -> None:
    """Their worth is a little less than their number, since the older weigh less."""
    rule = HeldOut(memory=memory, steps_per_epoch=5)
    helps = waiting_after(rule, [0.1] * 40)
    assert helps == [0.0] * first + [1.0] * (40 - first)
    assert rule.earliest == 10 * first
    assert waiting_after(HeldOut(memory=memory, steps_per_epoch=5, latest=10 * first + 1), [0.1] * 40) == helps


def test_what_has_not_begun_by_the_latest_step_does_not_begin_any_more() -> None:
    late = [-0.1] * 15 + [0.3] * 45
    begun = [i for i, helps in enumerate(waiting_after(HeldOut(steps_per_epoch=5), late)) if helps]
    assert begun == list(range(begun[0], 60))
    measured_at = 10 * begun[0]
    for latest, begins in ((measured_at + 1, True), (measured_at, False), (measured_at - 1, False)):
        rule = HeldOut(steps_per_epoch=5, latest=latest)
        assert waiting_after(rule, late) == [float(begins and i >= begun[0]) for i in range(60)]


def test_what_has_begun_goes_on_after_the_latest_step_and_can_only_end() -> None:
    excesses = [0.1] * 25 + [-0.3] * 35 + [0.3] * 60
    free = waiting_after(HeldOut(steps_per_epoch=5), excesses)
    end = free.index(0.0, 12)
    assert 25 < end < 60
    assert free[-1] == 1.0
    assert waiting_after(HeldOut(steps_per_epoch=5, latest=150), excesses) == [*free[:end], *[0.0] * (120 - end)]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: HeldOut(every=0), ValueError, "^every must be >= 1; got 0"),
        (lambda: HeldOut(memory=3), ValueError, "^memory must be >= 4; got 3"),
        (lambda: HeldOut(off=0.0), ValueError, "^off must be .*> 0; got 0"),
        (lambda: HeldOut(on=-1.0), ValueError, "^on must be .*>= 0; got -1"),
        (lambda: HeldOut(steps_per_epoch=0), ValueError, "^steps_per_epoch must be >= 1; got 0"),
        (lambda: HeldOut(steps_per_epoch=5, noise=0.0), ValueError, "^noise must be .*> 0; got 0.*Leave steps_per_epoch out"),
        (lambda: HeldOut(steps_per_epoch=5, latest=-1), ValueError, "^latest must be >= 0; got -1"),
        (
            lambda: HeldOut(steps_per_epoch=5, latest=100),
            ValueError,
            "^latest must be > 100, the penalized steps before .*; got 100. Pass a",
        ),
        (lambda: HeldOut(latest=7), ValueError, "^latest must be None without steps_per_epoch, .*; got 7.*as steps_per_epoch"),
        (lambda: HeldOut().excess(1.0, 1.0), ValueError, "^steps_per_epoch must be given for the second condition; got None"),
    ],
)
def test_what_it_refuses(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
