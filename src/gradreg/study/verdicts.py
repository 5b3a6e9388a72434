"""Verdicts: does a variant help against the baseline, over the same seeds? Helps, does not, or cannot tell, each with its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from gradreg import checks
from gradreg.study import statistics

Mode = Literal["max", "min"]
Decision = Literal["helps", "harms", "diverged", "equivalent", "no gain", "no worse", "cannot tell"]


@dataclass(frozen=True)
class Verdict:
    """The answer for one variant. Differences are variant − baseline in the metric's unit; ``mode`` says which sign is better.

    Args:
        name: the variant.
        mode: "max" if higher is better, "min" if lower is.
        level: of the intervals; 1 − level is the chance of any false "helps" or "harms" in the study.
        seeds: seeds of the baseline.
        n: pairs of finite values among them.
        failed: seeds of the baseline at which the variant diverged or has no value.
        baseline_failed: seeds at which the baseline has no finite value; they are left out.
        difference: mean over the pairs; None without a pair.
        low: lower end of the interval (Student's t); None with fewer than two pairs, or if all differences are equal.
        high: upper end.
        sd: standard deviation of the differences (n − 1); None with fewer than two pairs.
        p: two-sided p of the paired t test; None with fewer than two pairs.
        p_holm: the same after Holm over the variants (in a race after the looks too): ≤ 1 − level where the verdict is "helps" or "harms".
        sign_flip_p: two-sided p of the exact sign-flip test, never below 2/2ⁿ; None with fewer than two pairs.
        bca: BCa bootstrap interval, from 8 pairs on.
        detectable: the smallest difference that n seeds would have shown with power .8, given ``sd`` and the level that Holm left.
        needed: about how many seeds would decide it; None if decided, if nothing is known of it, or if more than 1,000.
        margin: the difference that matters, > 0; None if none was given.
        no_worse_p: Holm-adjusted one-sided p of "worse by the margin or more"; shown at ≤ (1 − level)/2. None without a margin.
        no_gain_p: the same of "better by the margin or more".
        decision: "helps"; "harms"; "diverged" (at one seed or more, and not shown to harm); with a margin "equivalent" (neither gain nor
            loss as large), "no gain" (as large), "no worse" (by as much); else "cannot tell".
        sentence: the verdict in plain words.
    """

    name: str
    mode: Mode
    level: float
    seeds: int
    n: int
    failed: int
    baseline_failed: int
    difference: float | None
    low: float | None
    high: float | None
    sd: float | None
    p: float | None
    p_holm: float | None
    sign_flip_p: float | None
    bca: tuple[float, float] | None
    detectable: float | None
    needed: int | None
    margin: float | None
    no_worse_p: float | None
    no_gain_p: float | None
    decision: Decision
    sentence: str

    @property
    def gain(self) -> float | None:
        """The mean difference, positive if better."""
        return None if self.difference is None else self.difference if self.mode == "max" else -self.difference

    @property
    def decided(self) -> bool:
        """Whether more seeds are not asked for. "no worse" is not the end: the variant may yet help."""
        return self.decision not in ("no worse", "cannot tell")


def compare_paired(
    baseline: Mapping[int, float | None],
    variants: Mapping[str, Mapping[int, float | None]],
    *,
    mode: Mode,
    level: float = statistics.CONFIDENCE,
    margin: float | None = None,
    baselines: Mapping[str, Mapping[int, float | None]] | None = None,
    metric: str = "metric",
    unit: str = "",
    against: str = "the baseline",
) -> dict[str, Verdict]:
    """Judge every variant against the baseline over the seeds of the baseline.

    The verdict is the two-sided paired t test, corrected by Holm over the variants. The seeds are those of the baseline: one that a variant
    lacks counts as diverged, like NaN, None or an infinite value, and a variant with such a seed never "helps". Seeds of a variant
    that the baseline does not have are ignored.

    Which value stands for a run (the last epoch's, or that of the epoch with the best validation) is the caller's choice.

    Args:
        baseline: seed → value.
        variants: name → seed → value; at least one.
        mode: "max" if higher is better, "min" if lower is.
        level: of the intervals, in (0, 1); the chance of any false "helps" or "harms" is at most 1 − level.
        margin: the difference that matters, > 0; adds "no worse", "no gain" and "equivalent", by one-sided tests at (1 − level)/2 with
            Holm over the variants.
        baselines: name → the values that this variant is compared with in place of ``baseline``: its compute-matched baseline, say.
        metric: its name, for the sentences.
        unit: of its differences, appended to them in the sentences: " points", say.
        against: the baseline's name, for the sentences.

    Returns:
        name → verdict, in the order of ``variants``.
    """
    check_settings(mode, level=level, margin=margin)
    if not variants:
        raise ValueError("variants must name at least one variant; got none. The baseline alone has nothing to be compared with.")
    samples = {name: Sample.of((baselines or {}).get(name, baseline), values, mode=mode) for name, values in variants.items()}
    return judged(
        samples,
        settings=Settings(mode, level, margin, metric, against, len(samples), unit=unit),
        p=[sample.p_for_holm() for sample in samples.values()],
        no_worse=[sample.p_no_worse(margin) for sample in samples.values()],
        no_gain=[sample.p_no_gain(margin) for sample in samples.values()],
        intervals={name: sample.interval(level) for name, sample in samples.items()},
    )


def judged(
    samples: Mapping[str, Sample],
    *,
    settings: Settings,
    p: Sequence[float | None],
    no_worse: Sequence[float | None],
    no_gain: Sequence[float | None],
    intervals: Mapping[str, tuple[float, float] | None],
    tested_at: Callable[[str, int], float] | None = None,
) -> dict[str, Verdict]:
    """The verdicts on ``samples`` from p before Holm, two-sided and, with a margin, one-sided; in their order.

    ``tested_at`` gives the level of the t test of a variant if so many are not shown; None divides 1 − level by their number.
    """
    alpha = 1 - settings.level
    adjusted = [float(value) for value in statistics.holm([1.0 if value is None else value for value in p])]
    no_worse, no_gain = _holm_one_sided(no_worse), _holm_one_sided(no_gain)
    open_hypotheses = sum(value > alpha for value in adjusted)
    return {
        name: verdict(
            name,
            sample,
            settings=settings,
            interval=intervals[name],
            p_holm=adjusted[i],
            no_worse_p=no_worse[i],
            no_gain_p=no_gain[i],
            tested_at=alpha / max(1, open_hypotheses) if tested_at is None else tested_at(name, max(1, open_hypotheses)),
        )
        for i, (name, sample) in enumerate(samples.items())
    }


@dataclass(frozen=True)
class Settings:
    """What all verdicts of a study share: the arguments of ``compare_paired``, the number of variants, and by what p is corrected."""

    mode: Mode
    level: float
    margin: float | None
    metric: str
    against: str
    variants: int
    correction: str = "after Holm"
    unit: str = ""


def check_settings(mode: object, *, level: object, margin: object) -> None:
    """Raise ``ValueError`` or ``TypeError`` for a mode, level or margin out of its range."""
    checks.choice("mode", mode, get_args(Mode))
    if not 0 < checks.real("level", level) < 1:
        raise ValueError(f"level must be between 0 and 1; got {checks.describe(level)}. Write 95 % as 0.95.")
    if margin is not None:
        checks.positive("margin", margin, remedy="It is the difference that matters, in the metric's unit; None asks for none.")


@dataclass(frozen=True)
class Sample:
    """The differences of one variant, signed so that positive is better, with what is missing.

    Args:
        gains: over the pairs, in the order of the seeds.
        seeds: seeds of the baseline.
        failed: seeds of the baseline without a finite value of the variant.
        baseline_failed: seeds without a finite value of the baseline.
        sign: 1 for mode "max", −1 for "min".
        resolution: standard deviations up to this are rounding.
    """

    gains: tuple[float, ...]
    seeds: int
    failed: int
    baseline_failed: int
    sign: int
    resolution: float

    @classmethod
    def of(cls, baseline: Mapping[int, float | None], values: Mapping[int, float | None], *, mode: Mode) -> Sample:
        """Pair ``values`` with ``baseline`` over the seeds of the baseline."""
        sign = 1 if mode == "max" else -1
        there = [seed for seed in sorted(baseline) if _finite(baseline[seed])]
        pairs = [(_number(values[s]), _number(baseline[s])) for s in there if _finite(values.get(s))]
        largest = max((abs(value) for pair in pairs for value in pair), default=0.0)
        return cls(
            gains=tuple(sign * (value - reference) for value, reference in pairs),
            seeds=len(baseline),
            failed=sum(not _finite(values.get(seed)) for seed in baseline),
            baseline_failed=len(baseline) - len(there),
            sign=sign,
            resolution=statistics.ROUNDING * largest,
        )

    @cached_property
    def test(self) -> statistics.PairedT:
        """The paired t test of the gains."""
        return statistics.paired_t(self.gains, resolution=self.resolution)

    def p_for_holm(self) -> float:
        """The p that enters Holm: 1 for a gain of a variant that diverged somewhere, since its other seeds are the lucky ones."""
        test = self.test
        return 1.0 if self.failed and not test.mean < 0 else float(test.p)

    def p_no_worse(self, margin: float | None) -> float | None:
        """One-sided p of "worse by the margin or more"; 1 for a variant that diverged. None without a margin."""
        return None if margin is None else 1.0 if self.failed else float(self.test.p_above(-margin))

    def p_no_gain(self, margin: float | None) -> float | None:
        """One-sided p of "better by the margin or more". None without a margin."""
        return None if margin is None else 1.0 if self.failed else 1 - float(self.test.p_above(margin))

    def interval(self, level: float) -> tuple[float, float] | None:
        """Student's t interval of the mean difference (variant − baseline); None without a spread."""
        test = self.test
        if test.n < 2 or test.sd == 0:
            return None
        half = statistics.t_quantile((1 - level) / 2, int(test.n) - 1) * float(test.se)
        center = self.sign * float(test.mean)
        return center - half, center + half


def verdict(
    name: str,
    sample: Sample,
    *,
    settings: Settings,
    interval: tuple[float, float] | None,
    p_holm: float,
    no_worse_p: float | None,
    no_gain_p: float | None,
    tested_at: float,
) -> Verdict:
    """The verdict on one variant from its adjusted p; ``tested_at`` is the level at which it stands, for the power."""
    test = sample.test
    n, level = int(test.n), settings.level
    some = n >= 2
    sd = float(test.sd) if some else None
    gain = float(test.mean) if n else None
    significant = gain is not None and p_holm <= 1 - level
    no_worse = no_worse_p is not None and no_worse_p <= (1 - level) / 2
    no_gain = no_gain_p is not None and no_gain_p <= (1 - level) / 2
    decision: Decision
    if significant and gain is not None and gain < 0:
        decision = "harms"
    elif sample.failed:
        decision = "diverged"
    elif significant:
        decision = "helps"
    elif no_worse or no_gain:
        decision = "equivalent" if no_worse and no_gain else "no gain" if no_gain else "no worse"
    else:
        decision = "cannot tell"
    needed = None
    if decision in ("no worse", "cannot tell") and gain is not None and sd:
        sought = max(abs(gain), settings.margin or 0.0)
        needed = statistics.seeds_needed(sought, sd, alpha=tested_at)
        needed = None if needed is None else max(needed, n + 1)
    differences = [sample.sign * gain for gain in sample.gains]
    values: dict[str, Any] = {
        "name": name,
        "mode": settings.mode,
        "level": level,
        "seeds": sample.seeds,
        "n": n,
        "failed": sample.failed,
        "baseline_failed": sample.baseline_failed,
        "difference": None if gain is None else sample.sign * gain,
        "low": None if interval is None else interval[0],
        "high": None if interval is None else interval[1],
        "sd": sd,
        "p": float(test.p) if some else None,
        "p_holm": p_holm if some else None,
        "sign_flip_p": statistics.sign_flip_p(differences) if some else None,
        "bca": statistics.bca_interval(differences, level=level) if some and sd else None,
        "detectable": statistics.detectable_difference(n, sd, alpha=tested_at) if sd else None,
        "needed": needed,
        "margin": settings.margin,
        "no_worse_p": no_worse_p,
        "no_gain_p": no_gain_p,
        "decision": decision,
    }
    return Verdict(**values, sentence=sentence(values, settings))


def sentence(values: Mapping[str, Any], settings: Settings) -> str:
    """The verdict in plain words, from the fields of a ``Verdict``."""
    name, n, failed, baseline_failed = values["name"], values["n"], values["failed"], values["baseline_failed"]
    over = _seeds(n)
    margin = "" if settings.margin is None else f"{settings.margin:g}"
    found = interval_text(values["difference"], values["low"], values["high"]) if n else ""
    measured = f"{settings.metric} {found}{settings.unit} against {settings.against}" if n else "nothing to compare"
    among = f" over {settings.variants} variants" if settings.variants > 1 else ""
    tested = "" if values["p_holm"] is None else f", {_p(values['p_holm'])} {settings.correction}{among}"
    match values["decision"]:
        case "helps":
            text = f"{name} helps: {measured} over {over}{tested}."
        case "harms":
            text = f"{name} does not help, it harms: {measured} over {over}{tested}."
        case "diverged":
            rest = f"; over the other {over} {measured}" if n else ""
            text = f"{name} does not help: it diverged or failed at {failed} of {_seeds(values['seeds'])}{rest}."
        case "equivalent":
            text = f"{name} does not help: any gain or loss is smaller than {margin}; {measured} over {over}."
        case "no gain":
            text = f"{name} does not help: any gain is smaller than {margin}; {measured} over {over}."
        case "no worse":
            text = f"{name} is no worse: any loss is smaller than {margin}. Whether it helps, cannot tell with {over}: {measured}."
        case _:
            text = f"{name}: cannot tell with {over}: {measured}{tested}."
    if values["decision"] in ("no worse", "cannot tell"):
        text += _what_more_would_do(values, settings)
    if failed and values["decision"] == "harms":
        text += f" It diverged or failed at {_seeds(failed)} more."
    if baseline_failed:
        text += f" {_seeds(baseline_failed).capitalize()} left out at which {settings.against} diverged."
    return text


def _what_more_would_do(values: Mapping[str, Any], settings: Settings) -> str:
    """What these seeds would have shown, and how many would do."""
    n, sd, needed = values["n"], values["sd"], values["needed"]
    if n < 2:
        return " An interval needs 2; 5 are a start."
    if sd == 0:
        same = "The values are equal at every seed" if values["difference"] == 0 else "The difference is the same at every seed"
        return f" {same}, so there is no interval."
    low, high = values["low"], values["high"]
    alone = (
        " By itself it would be clear, but among several variants one looks clear by chance more often."
        if low is not None and low * high > 0
        else ""
    )
    shown = f"{alone} These seeds would have shown {values['detectable']:.2g}{settings.unit}"
    sought = "one as large as the margin" if settings.margin and settings.margin >= abs(values["difference"]) else "one as large as seen"
    return f"{shown}; for {sought} need {'more than 1,000' if needed is None else f'about {needed}'}."


def interval_text(difference: float, low: float | None, high: float | None) -> str:
    """``+2.08 [+1.20, +2.96]``: a difference and its interval, for sentences and tables."""
    places = decimals(difference if low is None or high is None else (high - low) / 2)
    text = f"{difference:+.{places}f}"
    return text if low is None else f"{text} [{low:+.{places}f}, {high:+.{places}f}]"


def decimals(spread: float | None) -> int:
    """Decimals of numbers that vary by ``spread``: two, or as many as show two digits of what is uncertain."""
    return 2 if not spread or not math.isfinite(spread) else min(12, max(2, 1 - math.floor(math.log10(abs(spread)))))


def _p(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.3g}"  # three digits, or 0.0502 would look like the 0.05 that it is above


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def _holm_one_sided(p: Sequence[float | None]) -> list[float | None]:
    """Holm over the p that there are: all or none, since a margin is the study's."""
    values = [value for value in p if value is not None]
    return list(p) if len(values) < len(p) else [float(value) for value in statistics.holm(values)]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> float:
    assert value is not None
    return float(value)
