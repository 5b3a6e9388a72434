"""The runs of a comparison: every variant and seed, and longer baselines, which spend as many gradient evaluations as a variant."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Protocol

from gradreg import checks
from gradreg.penalties import GradientPenalty
from gradreg.registry import CONSTRUCTORS
from gradreg.study.tasks import Metric, Task, Variant
from gradreg.train.strict_yaml import read_yaml

Budget = Literal["epochs", "gradients"]
Rival = Literal["epochs", "gradients", "early"]
RIVALS: tuple[Rival, ...] = ("epochs", "gradients", "early")
"""What a variant is compared with: plain training for as many epochs, for as many gradient evaluations, and stopped early by validation."""

BASELINE = "none"


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Args:
        name: the variant that is trained; for a longer baseline, the baseline.
        seed: the run's seed.
        budget: "epochs" trains as the task says, "gradients" trains the baseline with as many gradient evaluations as a variant spends.
        evaluations: gradient evaluations that the run will spend; None if only the run tells.
        variant: what is run.
        stretch: how many times as long as the task says it trains.
    """

    name: str
    seed: int
    budget: Budget
    evaluations: int | None
    variant: Variant
    stretch: Fraction = Fraction(1)

    @property
    def folder(self) -> str:
        """The run's folder within the comparison's."""
        matched = f"@{self.evaluations}-gradients" if self.budget == "gradients" else ""
        return f"{folder_name(self.name)}{matched}/seed-{self.seed}"


class Ended(Protocol):
    """What a plan reads of a run that has ended."""

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


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        task: the task's name.
        description: the task's.
        metric: what is judged by.
        baseline: name of the variant without a penalty to which the others are compared.
        variants: the variants by name, the baseline first.
        seeds: the seeds.
        rivals: what the variants are compared with.
    """

    task: str
    description: str
    metric: Metric
    baseline: str
    variants: dict[str, Variant]
    seeds: list[int]
    rivals: tuple[Rival, ...] = RIVALS
    _known: dict[Any, list[Job]] = field(default_factory=dict, compare=False, repr=False)

    def jobs(self, records: Mapping[str, Ended]) -> list[Job]:
        """The runs that are known to be needed, in the order of the seeds.

        How long a longer baseline trains is known at once for recipes. Of other tasks the first complete runs tell it.

        Args:
            records: the complete runs so far, by folder.
        """
        longer = {found.evaluations: found for found in self.longer(records).values()} if "gradients" in self.rivals else {}
        key = tuple(longer)
        if key not in self._known:
            plain = self.variants[self.baseline]
            jobs: list[Job] = []
            for seed in self.seeds:
                jobs += [Job(name, seed, "epochs", variant.evaluations, variant) for name, variant in self.variants.items()]
                jobs += [Job(self.baseline, seed, "gradients", n, plain, one.stretch) for n, one in longer.items()]
            self._known[key] = jobs
        return self._known[key]

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
                found[name] = Longer(needed, round(Fraction(evaluations) * needed / length), Fraction(needed, length))
        return found

    def cost(self, name: str, records: Mapping[str, Ended]) -> tuple[int, float] | None:
        """Length and gradient evaluations of a variant's runs; None while neither the variant nor a complete run tells."""
        variant = self.variants[name]
        if variant.epochs is not None and variant.evaluations is not None:
            return variant.epochs, variant.evaluations
        for seed in self.seeds:
            record = records.get(Job(name, seed, "epochs", None, variant).folder)
            if record is not None and record.length is not None and record.error is None and not record.diverged:
                return record.length, record.gradient_evaluations
        return None


def make_plan(
    task: Task,
    penalties: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    seeds: int = 5,
    rivals: Sequence[str] | None = None,
) -> Plan:
    """Plan a comparison.

    Args:
        task: what is trained.
        penalties: the variants. A mapping of names to penalties: ``GradientPenalty`` objects, None for plain training, texts such as
            "sam:rho=0.1", or mappings with "penalty" and changed options. Or a sequence of names of the task's own variants and
            of such texts. None takes all that the task names. The baseline is always included: what is given as plain training without
            changed options, else the task's first variant without a penalty, else plain training, which is added as "none".
        seeds: how many, from the task's first on, ≥ 1.
        rivals: some of ``RIVALS``; None takes all.

    Raises:
        TypeError, ValueError: no seeds, an unknown variant or penalty, names that collide, or nothing to compare.
    """
    checks.whole("seeds", seeds, minimum=1, remedy="A paired interval needs 2; 5 is the default.")
    picked = tuple(dict.fromkeys(RIVALS if rivals is None else rivals))
    for rival in picked:
        checks.choice("rivals", rival, RIVALS)
    named = task.variants
    given = _given(penalties, named)
    variants = {name: _variant(task, name, value, named) for name, value in given.items()}
    baseline = next((name for name, value in given.items() if _is_baseline(value, named)), None)
    baseline = baseline or next((name for name, variant in named.items() if variant.is_plain), None)
    if baseline is None:
        baseline = BASELINE
        if baseline in variants:
            raise ValueError(
                f"{baseline!r} must be plain training, to which the others are compared; got a variant of that name with "
                f"{variants[baseline].method}. Rename the variant."
            )
    plain = variants.get(baseline) or named.get(baseline) or task.variant(None, {})
    variants = {baseline: plain, **{name: variant for name, variant in variants.items() if name != baseline}}
    if len(variants) < 2:
        raise ValueError(
            f"a comparison needs at least one variant beside the baseline {baseline!r}; got none. Name some with --penalties, as in "
            "--penalties sam:rho=0.1, or add variants: to the recipe."
        )
    _check_folders(variants)
    return Plan(
        task=task.name,
        description=task.description,
        metric=task.metric,
        baseline=baseline,
        variants=variants,
        seeds=list(range(plain.seed, plain.seed + seeds)),
        rivals=picked,  # type: ignore[arg-type]  # checked above
    )


def parse_penalty(text: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """A penalty (None for "none") and changed options from their text on a command line.

    >>> parse_penalty("sam:rho=0.1,every=5@lr=0.05")
    ({'name': 'sam', 'rho': 0.1, 'every': 5}, {'lr': 0.05})

    Raises:
        ValueError: text of another form.
    """
    penalty, _, changes = text.partition("@")
    name, _, arguments = penalty.partition(":")
    found, changed = _arguments(text, arguments), _arguments(text, changes)
    if name == BASELINE and found:
        raise ValueError(
            f"penalty {text!r} must be {BASELINE!r} alone, which has no arguments. Write {BASELINE}@OPTION=VALUE to change options."
        )
    return None if name == BASELINE else {"name": name, **found}, changed


def folder_name(name: str) -> str:
    """``name`` as a folder can have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "variant"


def _given(penalties: Mapping[str, Any] | Sequence[str] | None, named: Mapping[str, Variant]) -> dict[str, Any]:
    """Name -> what describes the variant: a penalty, a text, a mapping, or the name of one of the task's own."""
    if penalties is None:
        return {name: name for name in named}
    if isinstance(penalties, str) or not isinstance(penalties, (Mapping, Sequence)):
        raise TypeError(
            f"penalties must map names to penalties, or list texts; got {checks.describe(penalties)}. "
            "Write {'sam': gradreg.sam(rho=0.05)}."
        )
    given = penalties.items() if isinstance(penalties, Mapping) else [(text, text) for text in penalties]
    return {str(name): value for name, value in given}


def _is_baseline(value: Any, named: Mapping[str, Variant]) -> bool:
    """Whether ``value`` stands for plain training with nothing else changed; a variant of the task's own does not."""
    return value is None or (value == BASELINE and value not in named) or (isinstance(value, Mapping) and dict(value) == {"penalty": None})


def _variant(task: Task, name: str, value: Any, named: Mapping[str, Variant]) -> Variant:
    changes: dict[str, Any] = {}
    if isinstance(value, Mapping):
        changes = {key: change for key, change in value.items() if key != "penalty"}
        value = value.get("penalty")
    if isinstance(value, str):
        if value in named and not changes:
            return named[value]
        text = value
        value, more = parse_penalty(text)
        changes |= more
        if value is not None and value["name"] not in CONSTRUCTORS:
            raise ValueError(checks.unknown("variant or penalty", value["name"], [*dict.fromkeys([*named, BASELINE, *CONSTRUCTORS])]))
        try:
            return task.variant(value, changes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{text}: {error}") from error
    if value is not None and not isinstance(value, (GradientPenalty, Mapping)):
        raise TypeError(
            f"penalty {name!r} must be a GradientPenalty, None, a text or a mapping; got {checks.describe(value)}. "
            "Use gradreg.sam(rho=0.05), say."
        )
    return task.variant(value, changes)


def _arguments(text: str, given: str) -> dict[str, Any]:
    """``rho=0.1,warmup={kind: zero, steps: 3}`` as a dictionary; values are YAML."""
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^{\[]*[}\]])", given) if given else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(
                f"penalty {text!r} must be written NAME:KEY=VALUE,KEY=VALUE@OPTION=VALUE; got {part!r} in it. Write sam:rho=0.1, say."
            )
        if key.strip() in found:
            raise ValueError(f"penalty {text!r} must give each key once; got {key.strip()!r} twice. Remove one.")
        found[key.strip()] = read_yaml(f"{key.strip()} of penalty {text!r}", value)
    return found


def _check_folders(variants: Mapping[str, Variant]) -> None:
    taken: dict[str, str] = {}
    for name in variants:
        other = taken.setdefault(folder_name(name).lower(), name)
        if other != name:
            raise ValueError(
                f"variants must have names that differ in letters or digits, since each has a folder; got {other!r} and {name!r}. "
                "Rename one."
            )
