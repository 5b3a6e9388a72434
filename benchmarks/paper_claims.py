"""Claims of the field's papers: what was published, how it is judged here, and from which stored result.

Every claim is about one number, and says between which bounds that number lies if the claim is right. We measure the number with its 95 %
interval. The verdict follows from the two and from nothing else:

- ``reproduced``: the whole interval lies within the bounds;
- ``not reproduced``: no part of it does;
- ``within noise``: a part of it does, so that these seeds do not decide;
- ``not run``: nothing is stored.

A difference of accuracies is paired by seed, and its interval is Student's t; no correction is made for the number of claims. With two or
three seeds such an interval is wide, and most small gains are then within noise.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradreg.study.statistics import CONFIDENCE, deviation, paired_difference

ROOT = Path(__file__).parents[1]
STORED = "benchmarks/results/papers"
"""Where the results of ``benchmarks/papers.py`` are; others are where their own benchmarks put them."""

POSITIVE = (0.0, math.inf)
FEWEST_ROUNDS = 6
"""Below, the smallest and the largest of the rounds do not hold their median with a chance of 95 %."""


@dataclass(frozen=True)
class Measured:
    """A number with its interval.

    Args:
        text: how a reader sees it, with mean and deviation.
        low: lower end of the 95 % interval, or of the quartiles where the claim says so; NaN if there is none.
        high: upper end.
        seeds: what the interval is over, "5 seeds", say.
    """

    text: str
    low: float
    high: float
    seeds: str


@dataclass(frozen=True)
class Claim:
    """A published claim.

    Args:
        source: the paper, with its table or figure where that is known.
        says: the claim, in words.
        published: the published number; "" where there is only an order.
        setting: of the paper.
        bounds: where the number lies if the claim is right.
        meaning: the number and the bounds, in words.
        result: the stored result, under the repository; None if nothing runs it here.
        measure: the number, from the content of ``result``.
        ours: our setting, and how it was shortened.
        lacking: what running it as published needs.
        command: the command that made ``result``, if that does not hold it.
        hours: what that took, if ``result`` does not hold it.
    """

    source: str
    says: str
    published: str
    setting: str
    bounds: tuple[float, float] = POSITIVE
    meaning: str = ""
    result: str | None = None
    measure: Callable[[Any], Measured] | None = None
    ours: str = ""
    lacking: str = ""
    command: str = ""
    hours: str = ""

    def found(self) -> Measured | None:
        """The number, if its result is stored."""
        content = self.stored()
        return None if content is None or self.measure is None else self.measure(content)

    def stored(self) -> Any:
        """The content of the stored result; None if there is none."""
        if self.result is None or not (path := ROOT / self.result).is_file():
            return None
        text = path.read_text(encoding="utf-8")
        return list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else json.loads(text)


def verdict(measured: Measured | None, bounds: tuple[float, float]) -> str:
    """What an interval says of a claim.

    >>> verdict(Measured("", 0.1, 0.5, ""), (0.0, math.inf)), verdict(Measured("", -0.1, 0.5, ""), (0.0, math.inf))
    ('reproduced', 'within noise')
    >>> verdict(Measured("", -0.5, -0.1, ""), (0.0, math.inf)), verdict(None, (0.0, math.inf))
    ('not reproduced', 'not run')
    """
    if measured is None:
        return "not run"
    low, high = bounds
    if math.isnan(measured.low):
        return "within noise"
    if low < measured.low and measured.high < high:
        return "reproduced"
    return "within noise" if measured.high > low and measured.low < high else "not reproduced"


# Numbers from the results of studies


def values(result: Mapping[str, Any], variant: str, *, key: str = "test_accuracy", budget: str = "epochs") -> dict[int, float]:
    """Seed -> the variant's value, accuracies in %; a run that diverged counts as one of chance."""
    scale = 100 if key.endswith("accuracy") else 1
    found: dict[int, float] = {}
    for run in result["runs"]:
        if run["variant"] == variant and run.get("budget", "epochs") == budget:
            found[run["seed"]] = scale * (1 / result.get("classes", 10) if run.get("diverged") else run[key])
    return found


def described(name: str, of: Mapping[int, float]) -> str:
    """``F-GR 54.31 ± 0.40``"""
    spread = deviation(list(of.values()))
    return f"{name} {np.mean(list(of.values())):.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def difference(one: tuple[str, Mapping[int, float]], other: tuple[str, Mapping[int, float]], *, unit: str = "points") -> Measured:
    """Of the first over the second, paired by seed."""
    found = paired_difference(one[1], other[1])
    assert found is not None
    low, high = (math.nan if end is None else end for end in (found.low, found.high))
    interval = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    said = f"{described(*one)}, {described(*other)}: {found.mean:+.2f}{interval} {unit}"
    return Measured(said.rstrip(), low, high, "1 seed" if found.pairs == 1 else f"{found.pairs} seeds")


def over(one: str, other: str, *, names: tuple[str, str], key: str = "test_accuracy") -> Callable[[Any], Measured]:
    """The difference of two variants of a study."""

    def measure(result: Any) -> Measured:
        return difference((names[0], values(result, one, key=key)), (names[1], values(result, other, key=key)))

    return measure


def picked(result: Any, variants: Sequence[str]) -> str:
    """The variant with the best mean validation accuracy."""
    return max(variants, key=lambda name: float(np.mean(list(values(result, name, key="validation_accuracy").values()))))


def over_picked(ours: Sequence[str], others: Sequence[str], names: tuple[str, str]) -> Callable[[Any], Measured]:
    """The difference of the best of two groups of variants, each chosen by validation and compared on test."""

    def measure(result: Any) -> Measured:
        sides = [picked(result, group) for group in (ours, others)]
        labels: list[str] = []
        for name, side, group in zip(names, sides, (ours, others), strict=True):
            setting = side.partition(":")[2] or (side if len(group) > 1 else "")
            labels.append(f"{name} ({setting})" if setting else name)
        return difference(*((label, values(result, side)) for label, side in zip(labels, sides, strict=True)))

    return measure


def mean_interval(numbers: Iterable[float]) -> tuple[float, float, float]:
    """Mean and Student's t interval."""
    from scipy import stats

    of = np.array(list(numbers), dtype=float)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(of) - 1) * stats.sem(of)) if len(of) > 1 else math.nan
    return float(of.mean()), float(of.mean()) - half, float(of.mean()) + half


# Numbers from the results of other benchmarks


def slope(name: str) -> Callable[[Any], Measured]:
    """The log-log slope of a time to the best accuracy, of benchmarks/weight_decay_law.py."""

    def measure(result: Any) -> Measured:
        found = result[name]
        middle, low, high = found["slope"]
        return Measured(f"slope {middle:.2f} [{low:.2f}, {high:.2f}]", low, high, f"{found['runs']} runs, 3 seeds")

    return measure


def budgeted(variant: str, against: str | None, names: tuple[str, str]) -> Callable[[Any], Measured]:
    """A difference at the end of the budget, of benchmarks/weight_decay_budget.py; None is the best constant of the grid."""

    def measure(result: Any) -> Measured:
        last: dict[str, dict[int, float]] = {}
        for run in result["runs"]:
            last.setdefault(run["variant"], {})[run["seed"]] = 100 * run["test"][-1]
        constants = [name for name in last if name.startswith("l2-") and name != "l2-0"]
        other = against or max(constants, key=lambda name: float(np.mean(list(last[name].values()))))
        label = names[1] if against else f"{names[1]}, {other.removeprefix('l2-')},"
        return difference((names[0], last[variant]), (label, last[other]))

    return measure


def improves_with_time(result: Any) -> Measured:
    """Test accuracy at ηλt = 4 of the smallest λ whose run is that long, over twice that λ."""
    clock, steps = 4.0, result["steps"]
    at: dict[float, dict[int, float]] = {}
    for run in result["runs"]:
        share = run["lr"] * run["l2"]
        if share * steps[-1] >= clock:
            last = max(i for i, step in enumerate(steps) if share * step <= 1.02 * clock)
            at.setdefault(run["l2"], {})[run["seed"]] = 100 * run["accuracies"][last]
    small, twice = sorted(at)[:2]
    return difference((f"λ = {small:g}", at[small]), (f"λ = {twice:g}", at[twice]))


def edge_of_stability(method: str) -> Callable[[Any], Measured]:
    """Curvature over the edge after it was first reached: the extreme quartiles over the settings of ``gradreg lab edge``."""

    def measure(result: Any) -> Measured:
        rows = [row for row in result if row["method"] == method]
        low, high = min(float(row["1st quartile"]) for row in rows), max(float(row["3rd"]) for row in rows)
        medians = [float(row["curvature/edge"]) for row in rows]
        return Measured(
            f"median {min(medians):.2f} to {max(medians):.2f}, quartiles {low:.2f} to {high:.2f}", low, high, f"{len(rows)} runs"
        )

    return measure


def below_two_over_eta(result: Any) -> Measured:
    """The largest ratio over SAM's settings of the curvature at the end to 2/η."""
    ratios = [float(row["curvature"]) / float(row["2/eta"]) for row in result if row["method"] == "SAM"]
    return Measured(f"curvature at the end {min(ratios):.2f} to {max(ratios):.2f} of 2/η", min(ratios), max(ratios), f"{len(ratios)} runs")


def last_layer(method: str, *, width: int, over_width: int) -> Callable[[Any], Measured]:
    """The growth of the last layer's share of the perturbation with the width, at the radius that is best at the smaller one."""

    def measure(result: Any) -> Measured:
        radii = sorted({run["radius"] for run in result["runs"] if run["method"] == method})

        def of(key: str, width: int, radius: float) -> dict[int, float]:
            return {r["seed"]: r[key] for r in result["runs"] if (r["method"], r["width"], r["radius"]) == (method, width, radius)}

        best = min(radii, key=lambda radius: float(np.mean(list(of("loss", over_width, radius).values()))))
        shares = [{seed: 100 * share for seed, share in of("last_layer", one, best).items()} for one in (width, over_width)]
        return difference((f"width {width}", shares[0]), (f"width {over_width}", shares[1]))

    return measure


def radius_transfers(method: str) -> Callable[[Any], Measured]:
    """Test loss at the largest width with the radius that is best at the smallest, over that with the largest width's own best."""

    def measure(result: Any) -> Measured:
        widths = sorted({run["width"] for run in result["runs"]})
        losses: dict[tuple[int, float], dict[int, float]] = {}
        for run in result["runs"]:
            if run["method"] == method:
                losses.setdefault((run["width"], run["radius"]), {})[run["seed"]] = run["loss"]

        def best(width: int) -> float:
            return min((r for w, r in losses if w == width), key=lambda r: float(np.mean(list(losses[width, r].values()))))

        first, last = best(widths[0]), best(widths[-1])
        sides = (f"loss at radius {first:g}", losses[widths[-1], first]), (f"at {last:g}", losses[widths[-1], last])
        return difference(*sides, unit="")

    return measure


def sharper(variant: str, name: str) -> Callable[[Any], Measured]:
    """The ratio of a penalty's largest eigenvalue at the end to plain training's, in logarithms, paired by seed."""

    def measure(result: Any) -> Measured:
        found: dict[str, dict[int, float]] = {}
        for run in result["runs"]:
            if run.get("budget", "epochs") == "epochs":
                found.setdefault(run["variant"], {})[run["seed"]] = math.log10(run["sharpness_largest_eigenvalue"])
        of = paired_difference(found[variant], found[result["baseline"]])
        assert of is not None
        assert of.low is not None
        assert of.high is not None
        told = f"λ_max of {name} is {10**of.mean:.2f} [{10**of.low:.2f}, {10**of.high:.2f}] times plain's"
        return Measured(told, of.low, of.high, f"{of.pairs} seeds")

    return measure


def cost_study(one: str, other: str, names: tuple[str, str]) -> Callable[[Any], Measured]:
    """The difference of two variants of benchmarks/choosing_cost.py."""

    def measure(result: Any) -> Measured:
        def of(variant: str) -> dict[int, float]:
            accuracies = result["variants"][variant]["test_accuracies"]
            return {seed: 10.0 if one is None else 100 * one for seed, one in zip(result["seeds"], accuracies, strict=True)}

        return difference((names[0], of(one)), (names[1], of(other)))

    return measure


def ratio(one: str, other: str) -> Callable[[Any], Measured]:
    """The ratio of two steps' processor time, round by round: median and the 95 % interval of the median by order statistics."""

    def measure(result: Any) -> Measured:
        rounds = np.sort(np.divide(result["seconds"][one], result["seconds"][other]))
        told = f"{one} takes {np.median(rounds):.2f} times the time of {other}"
        if len(rounds) < FEWEST_ROUNDS:
            return Measured(told, math.nan, math.nan, f"{len(rounds)} rounds")
        low, high = (float(rounds[place]) for place in median_interval(len(rounds)))
        return Measured(f"{told} [{low:.2f}, {high:.2f}]", low, high, f"{len(rounds)} rounds")

    return measure


def median_interval(count: int) -> tuple[int, int]:
    """The places, among ``count`` sorted numbers, of the ends of the 95 % interval of their median.

    >>> median_interval(20)
    (5, 14)
    """
    from scipy import stats

    low = max(0, int(stats.binom.ppf((1 - CONFIDENCE) / 2, count, 0.5)) - 1)
    return low, count - 1 - low


def per_seed(one: str, other: str | None = None, *, names: tuple[str, str] = ("", ""), unit: str = "") -> Callable[[Any], Measured]:
    """A number of each seed, or its difference from another one."""

    def measure(result: Any) -> Measured:
        first = {seed["seed"]: seed[one] for seed in result["seeds"]}
        if other is not None:
            return difference((names[0], first), (names[1], {seed["seed"]: seed[other] for seed in result["seeds"]}), unit=unit)
        middle, low, high = mean_interval(first.values())
        return Measured(f"{names[0]} {middle:.3g} [{low:.3g}, {high:.3g}] {unit}".rstrip(), low, high, f"{len(first)} seeds")

    return measure


def largest(key: str, name: str) -> Callable[[Any], Measured]:
    """The largest of a number over the seeds, which must be below a bound."""

    def measure(result: Any) -> Measured:
        found = [seed[key] for seed in result["seeds"]]
        return Measured(f"{name} {max(found):.1e}", min(found), max(found), f"{len(found)} seeds")

    return measure


def law_slope(result: Any) -> Measured:
    """The log-log slope of the step of the best accuracy over λ; without those λ whose best is in the last tenth of a run: no peak."""
    from scipy import stats

    steps = np.array(result["steps"])
    best = {(run["l2"], run["seed"]): int(steps[int(np.argmax(run["accuracies"]))]) for run in result["runs"]}
    late = {l2 for (l2, _), step in best.items() if step > 0.9 * steps[-1]}
    kept = {key: step for key, step in best.items() if key[0] not in late}
    fit: Any = stats.linregress(np.log([l2 for l2, _ in kept]), np.log(list(kept.values())))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(kept) - 2) * fit.stderr)
    low, high = float(fit.slope) - half, float(fit.slope) + half
    seeds = len({seed for _, seed in kept})
    return Measured(f"slope {fit.slope:.2f} [{low:.2f}, {high:.2f}]", low, high, f"{len(kept)} runs, {seeds} seeds")


def near(published: Mapping[str, float], *, errors: bool = True) -> Callable[[Any], Measured]:
    """The deviations of variants' means from the published numbers: test errors, or accuracies."""

    def measure(result: Any) -> Measured:
        found = {name: list(values(result, name).values()) for name in published}
        means = {name: 100 - float(np.mean(own)) if errors else float(np.mean(own)) for name, own in found.items()}
        away = [means[name] - published[name] for name in published]
        told = ", ".join(f"{name} {means[name]:.2f} ({published[name]:.2f})" for name in published)
        return Measured(f"{told} %", min(away), max(away), f"{len(next(iter(found.values())))} seeds")

    return measure
