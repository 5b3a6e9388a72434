"""The runs of a comparison: every variant and seed, and longer baselines, which spend as many gradients, or seconds, as a variant."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, Protocol

from gradreg import checks
from gradreg.study.racing import Race, Standing
from gradreg.study.seconds import EqualSeconds
from gradreg.study.tasks import Metric, Task, Variant
from gradreg.study.variants import BASELINE, given_variants, is_baseline, variant_of

Budget = Literal["epochs", "gradients", "seconds"]
Rival = Literal["epochs", "gradients", "seconds", "early"]
RIVALS: tuple[Rival, ...] = ("epochs", "gradients", "seconds", "early")
"""What a variant is compared with: plain training for as many epochs, for as many gradient evaluations, for as many seconds (on request),
and stopped early by validation."""
USUAL_RIVALS: tuple[Rival, ...] = ("epochs", "gradients", "early")

MOST_IN_FOLDER = 1000
"""Seeds, or variants, that share a folder; more are spread over several."""

UNTIL = ("decided",)
"""What seeds can be added until."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Args:
        name: the variant that is trained; for a longer baseline, the baseline.
        seed: the run's seed.
        budget: "epochs" trains as the task says, "gradients" trains the baseline with as many gradient evaluations as a variant spends,
            "seconds" as many seconds as a variant takes.
        evaluations: gradient evaluations that the run will spend; None if only the run tells.
        variant: what is run.
        stretch: how many times as long as the task says it trains.
        within: the folder around that of the variant, where there are thousands of variants; ends with /.
    """

    name: str
    seed: int
    budget: Budget
    evaluations: int | None
    variant: Variant
    stretch: Fraction = Fraction(1)
    within: str = ""

    @property
    def folder(self) -> str:
        """The run's folder within the comparison's. No folder has more than about ``MOST_IN_FOLDER`` entries, however many runs."""
        thousand = (self.seed - self.variant.seed) // MOST_IN_FOLDER
        return f"{self.within}{self._variant_folder}/{'' if thousand == 0 else f'seeds-{thousand}000/'}seed-{self.seed}"

    @property
    def other_folders(self) -> list[str]:
        """Where the run lies in a study that was begun with fewer variants, or by an earlier version."""
        places = [f"{within}{self._variant_folder}/seed-{self.seed}" for within in ("", spread(self.name))]
        return [place for place in places if place != self.folder]

    @property
    def _variant_folder(self) -> str:
        matched = {"epochs": "", "gradients": f"@{self.evaluations}-gradients", "seconds": f"@{self.evaluations}-gradients-by-seconds"}
        return f"{folder_name(self.name)}{matched[self.budget]}"


class Ended(Protocol):
    """What a plan reads of a run that has ended."""

    @property
    def test(self) -> float | None: ...
    @property
    def best_test(self) -> float | None: ...
    @property
    def length(self) -> int | None: ...
    @property
    def gradient_evaluations(self) -> float: ...
    @property
    def diverged(self) -> bool: ...
    @property
    def error(self) -> str | None: ...


@dataclass(frozen=True)
class Longer:
    """A baseline that trains longer, to spend as much as a variant.

    Args:
        length: epochs, or else steps.
        evaluations: gradient evaluations that it spends.
        stretch: its length over the baseline's.
    """

    length: int
    evaluations: int
    stretch: Fraction

    @classmethod
    def of(cls, length: int, own: int, evaluations: float) -> Longer:
        """That of ``length``, of a baseline that spends ``evaluations`` in ``own``."""
        return cls(length, round(Fraction(evaluations) * length / own), Fraction(length, own))


Values = dict[int, float | None]
"""Metric values by seed, in the table's unit; None where a run diverged or failed."""


@dataclass(frozen=True)
class Question:
    """What is asked of the variants with respect to one rival.

    Args:
        against: the rival's name, for sentences.
        variants: name → the values of the variant.
        baselines: name → those that it is compared with.
    """

    against: str
    variants: dict[str, Values]
    baselines: dict[str, Values]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        task: the task's name.
        description: the task's.
        metric: what is judged by.
        baseline: name of the variant without a penalty to which the others are compared.
        variants: the variants by name, the baseline first.
        seeds: the seeds; of a race all up to its bound.
        rivals: what the variants are compared with, in the order of ``RIVALS``.
        margin: the difference that matters, in the table's unit; None if none was given.
        race: how seeds are added until it is decided; None runs all of them.
        seconds: what has been measured for the rival at equal seconds, by variant.
    """

    task: str
    description: str
    metric: Metric
    baseline: str
    variants: dict[str, Variant]
    seeds: list[int]
    rivals: tuple[Rival, ...] = USUAL_RIVALS
    margin: float | None = None
    race: Race | None = None
    seconds: Mapping[str, EqualSeconds] = field(default_factory=dict)
    _known: dict[Any, list[Job]] = field(default_factory=dict, compare=False, repr=False)

    def jobs(self, records: Mapping[str, Ended]) -> list[Job]:
        """The runs that are known to be needed, in the order of the seeds.

        How long a longer baseline trains is known at once for recipes. Of other tasks the first complete runs tell it. A race wants the
        seeds of its first look at first, and those of the next one for the variants that are undecided as soon as all results of a look
        are there; a longer baseline gets the seeds of its variants.

        Args:
            records: the complete runs so far, by folder.
        """
        given = self.given(records)
        longer = self.longer_baselines(records)
        most = [max(given[name] for name in names) for _, _, names in longer]
        key = (*((budget, one.evaluations) for budget, one, _ in longer), *most, *given.values())
        if key not in self._known:
            jobs: list[Job] = []
            for i, seed in enumerate(self.seeds):
                jobs += [
                    self._job(name, seed, evaluations=variant.evaluations) for name, variant in self.variants.items() if i < given[name]
                ]
                jobs += [
                    self._job(self.baseline, seed, budget, one.evaluations, one.stretch)
                    for (budget, one, _), n in zip(longer, most, strict=True)
                    if i < n
                ]
            self._known[key] = jobs
        return self._known[key]

    def _job(self, name: str, seed: int, budget: Budget = "epochs", evaluations: int | None = None, stretch: Fraction = Fraction(1)) -> Job:
        within = spread(name) if len(self.variants) > MOST_IN_FOLDER else ""
        return Job(name, seed, budget, evaluations, self.variants[name], stretch, within)

    def longer_baselines(self, records: Mapping[str, Ended]) -> list[tuple[Budget, Longer, list[str]]]:
        """The baselines that train longer, as far as known, each with the variants that are compared with it."""
        budgets: dict[Budget, dict[str, Longer]] = {
            "gradients": self.longer(records) if "gradients" in self.rivals else {},
            "seconds": self.longer_by_seconds(records),
        }
        found: dict[tuple[Budget, int], tuple[Budget, Longer, list[str]]] = {}
        for budget, matched in budgets.items():
            for name, one in matched.items():
                found.setdefault((budget, one.evaluations), (budget, one, []))[2].append(name)
        return list(found.values())

    def given(self, records: Mapping[str, Ended]) -> dict[str, int]:
        """How many seeds each variant gets, as far as known; the baseline as many as the most of them."""
        standing = self.standing(records)
        if standing is None:
            return dict.fromkeys(self.variants, len(self.seeds))
        return {self.baseline: max(standing.given.values()), **standing.given}

    def standing(self, records: Mapping[str, Ended]) -> Standing | None:
        """Where the race stands, which the first of the rivals decides; None without a race."""
        if self.race is None:
            return None
        question, metric = self.question(self.rivals[0], records), self.metric
        return self.race.judge(
            {},
            question.variants,
            baselines=question.baselines,
            mode=metric.mode,
            margin=self.margin,
            metric=metric.title,
            unit=metric.difference_unit,
            against=question.against,
        )

    def question(self, rival: Rival, records: Mapping[str, Ended]) -> Question:
        """What is asked with respect to ``rival``: the values of both sides, of the runs that are there.

        A variant that costs no more than the baseline is compared with the baseline itself.
        """
        best = rival == "early"
        plain = self.values(self.baseline, records, best=best)
        others = [name for name in self.variants if name != self.baseline]
        baselines = dict.fromkeys(others, plain)
        if rival == "gradients" or rival == "seconds":
            matched = self.longer(records) if rival == "gradients" else self.longer_by_seconds(records)
            baselines |= {name: self.values(self.baseline, records, longer=one, budget=rival) for name, one in matched.items()}
            # Which run a variant is compared with is not known before its cost; where all its runs failed or diverged, it never is.
            unknown = [name for name in others if self.cost(name, records) is None and not self._all_there(name, records)]
            baselines |= {name: {} for name in (*unknown, *(self.unmeasured(records) if rival == "seconds" else ()))}
        against = {"epochs": "", "gradients": " at equal gradients", "seconds": " at equal seconds", "early": " stopped early"}[rival]
        return Question(self.baseline + against, {name: self.values(name, records, best=best) for name in others}, baselines)

    def _all_there(self, name: str, records: Mapping[str, Ended]) -> bool:
        """Whether the runs of a variant that are wanted in any case have ended, and the baseline's."""
        wanted = self.seeds if self.race is None else self.seeds[: self.race.first]
        return all(self._job(one, seed).folder in records for one in (name, self.baseline) for seed in wanted)

    def values(
        self, name: str, records: Mapping[str, Ended], *, longer: Longer | None = None, budget: Budget = "epochs", best: bool = False
    ) -> Values:
        """The metric of the runs of a variant, or of a longer baseline; ``best``: at the best epoch by validation."""
        found: Values = {}
        for seed in self.seeds:
            record = records.get(self._job(name, seed, budget, None if longer is None else longer.evaluations).folder)
            if record is not None:
                value = record.best_test if best else record.test
                found[seed] = None if value is None else self.metric.shown(value)
        return found

    def longer(self, records: Mapping[str, Ended]) -> dict[str, Longer]:
        """Variant -> the baseline that spends as many gradient evaluations, as far as known; a variant that costs no more has none.

        Its length is rounded up to whole epochs, or steps.
        """
        own = self.cost(self.baseline, records)
        if own is None:
            return {}
        length, evaluations = own
        found: dict[str, Longer] = {}
        for name in self.variants:
            cost = self.cost(name, records)
            if cost is None:
                continue
            needed = math.ceil(length * Fraction(cost[1]) / Fraction(evaluations))
            if needed > length:
                found[name] = Longer.of(needed, length, evaluations)
        return found

    def longer_by_seconds(self, records: Mapping[str, Ended]) -> dict[str, Longer]:
        """Variant -> the baseline that takes as many seconds, of those that have been measured; one that is no slower has none."""
        own = self.cost(self.baseline, records)
        if own is None:
            return {}
        return {name: Longer.of(one.length, *own) for name, one in self.seconds.items() if name in self.variants and one.length > own[0]}

    def unmeasured(self, records: Mapping[str, Ended]) -> list[str]:
        """The variants whose seconds are asked for and not measured yet, though their cost is known."""
        if "seconds" not in self.rivals or self.cost(self.baseline, records) is None:
            return []
        others = [name for name in self.variants if name != self.baseline and name not in self.seconds]
        return [name for name in others if self.cost(name, records) is not None]

    def cost(self, name: str, records: Mapping[str, Ended]) -> tuple[int, float] | None:
        """Length and gradient evaluations of a variant's runs; None while neither the variant nor a complete run tells."""
        variant = self.variants[name]
        if variant.epochs is not None and variant.evaluations is not None:
            return variant.epochs, variant.evaluations
        for seed in self.seeds:
            record = records.get(self._job(name, seed).folder)
            if record is None:
                return None  # a later seed must not tell, or the answer would hang on which run ends first
            if record.length is not None and record.error is None and not record.diverged:
                return record.length, record.gradient_evaluations
        return None


def make_plan(
    task: Task,
    penalties: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    seeds: int = 5,
    rivals: Sequence[str] | None = None,
    margin: float | None = None,
    until: str | None = None,
    max_seeds: int | None = None,
) -> Plan:
    """Plan a comparison.

    Args:
        task: what is trained.
        penalties: the variants. A mapping of names to penalties: ``GradientPenalty`` objects, None for plain training, texts such as
            "sam:rho=0.1", or mappings with "penalty" and changed options. Or a sequence of names of the task's own variants and
            of such texts. None takes all that the task names. The baseline is always included: what is given as plain training without
            changed options, else the task's first variant without a penalty, else plain training, which is added as "none".
        seeds: how many, from the task's first on, ≥ 1.
        rivals: some of ``RIVALS``; None takes all but "seconds".
        margin: the difference that matters, in the table's unit.
        until: "decided" adds seeds to the variants that are undecided; ``seeds`` are then those before the first look.
        max_seeds: the bound of that; None takes four times ``seeds``.

    Raises:
        TypeError, ValueError: no seeds, an unknown variant or penalty, names that collide, or nothing to compare.
    """
    checks.whole("seeds", seeds, minimum=1, remedy="A paired interval needs 2; 5 is the default.")
    for rival in rivals or ():
        checks.choice("rivals", rival, RIVALS)
    picked: tuple[Rival, ...] = tuple(rival for rival in RIVALS if rival in (USUAL_RIVALS if rivals is None else rivals))
    if margin is not None:
        checks.positive("margin", margin, remedy="It is the difference that matters, in the table's unit.")
    bound = _bound(seeds, until, max_seeds, picked)
    named = task.variants
    given = given_variants(penalties, named)
    variants = {name: variant_of(task, name, value, named) for name, value in given.items()}
    baseline = next((name for name, value in given.items() if is_baseline(value, named)), None)
    baseline = baseline or next((name for name, variant in named.items() if variant.is_plain), None)
    if baseline is None:
        baseline = BASELINE
        if baseline in variants:
            raise ValueError(
                f"{baseline!r} must be plain training, to which the others are compared; got a variant of that name with "
                f"{variants[baseline].method}. Rename the variant; if its penalty comes from --penalty, give that as --penalties."
            )
    plain = variants.get(baseline) or named.get(baseline) or task.variant(None, {})
    variants = {baseline: plain, **{name: variant for name, variant in variants.items() if name != baseline}}
    if len(variants) < 2:
        raise ValueError(
            f"a comparison needs at least one variant beside the baseline {baseline!r}; got none. Name some with --penalties, as in "
            "--penalties sam:rho=0.1, or add variants: to the recipe."
        )
    _check_folders(variants)
    numbers = list(range(plain.seed, plain.seed + bound))
    return Plan(
        task=task.name,
        description=task.description,
        metric=task.metric,
        baseline=baseline,
        variants=variants,
        seeds=numbers,
        rivals=picked,
        margin=margin,
        race=None if until is None else Race(numbers, first=seeds),
    )


def _bound(seeds: int, until: str | None, max_seeds: int | None, rivals: Sequence[str]) -> int:
    """How many seeds may be run."""
    if until is None:
        if max_seeds is not None:
            raise ValueError(
                f"max_seeds must be left out without until; got {checks.describe(max_seeds)}. Add until='decided' (--until decided), or "
                f"give seeds={checks.describe(max_seeds)} to run so many."
            )
        return seeds
    checks.choice("until", until, UNTIL)
    if seeds < 2:
        raise ValueError(f"seeds must be >= 2 with until='decided'; got {seeds}. They are the seeds before the first look, which needs 2.")
    if not rivals:
        raise ValueError(f"rivals must name one with until='decided'; got none. Name some of {', '.join(RIVALS)}, or leave them out.")
    if max_seeds is None:
        return 4 * seeds
    checks.whole("max_seeds", max_seeds, minimum=1)
    if max_seeds < seeds:
        raise ValueError(f"max_seeds must be >= seeds, the first look's; got {max_seeds} with seeds = {seeds}. Raise it, or lower seeds.")
    return max_seeds


@lru_cache(maxsize=4096)
def spread(name: str) -> str:
    """One of 256 folders, by the name of what lies in it."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:2]}/"


@lru_cache(maxsize=4096)
def folder_name(name: str) -> str:
    """``name`` as a folder can have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "variant"


def _check_folders(variants: Mapping[str, Variant]) -> None:
    taken: dict[str, str] = {}
    for name in variants:
        other = taken.setdefault(folder_name(name).lower(), name)
        if other != name:
            raise ValueError(
                f"variants must have names that differ in letters or digits, since each has a folder; got {other!r} and {name!r}. "
                "Rename one."
            )
