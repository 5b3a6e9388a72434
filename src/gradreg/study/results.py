"""The results of a comparison: its runs, the rows of its table, and ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gradreg.sharpness.measures import PREFIX
from gradreg.study.plan import Budget, Job, Longer, Plan, Question
from gradreg.study.statistics import deviation, mean
from gradreg.study.table import Row, json_row
from gradreg.study.tasks import Metric
from gradreg.study.verdicts import Verdict, compare_paired

SCHEMA = 1
"""The version of ``results.json``; docs/comparing.md describes it."""


@dataclass(frozen=True)
class Record:
    """One finished run.

    Args:
        variant: the variant that was trained; for a longer baseline, the baseline.
        seed: the run's seed.
        budget: "epochs"; "gradients" or "seconds" for a longer baseline.
        test: the test metric after the last epoch; None if the run diverged or failed.
        validation: the same on validation data; None without any.
        best_epoch: the epoch with the best validation metric; None without validation.
        best_test: the test metric there.
        gradient_evaluations: gradient evaluations spent.
        seconds: seconds spent training.
        diverged: whether the loss or the metric stopped being finite, or the loss ended at more than twice that of the untrained model.
        epochs: epochs trained; None for a task that counts steps alone.
        length: epochs, or else steps, that it was to train; None if it failed.
        planned_evaluations: gradient evaluations that the run was to spend; fewer were, if it diverged.
        folder: the run's folder within the comparison's.
        error: the last line of the error that ended it; None if none did.
        warnings: what the run itself was warned of.
        sharpness: what it measured last, by name, with errors under ``NAME_error`` and the epoch under ``epoch``; None where it could not.
        logged: the last value of whatever else it logged, by name; None where that was not finite.
    """

    variant: str
    seed: int
    budget: Budget
    test: float | None
    validation: float | None
    best_epoch: int | None
    best_test: float | None
    gradient_evaluations: float
    seconds: float
    diverged: bool
    epochs: int | None
    length: int | None
    planned_evaluations: int | None
    folder: str
    error: str | None = None
    warnings: tuple[str, ...] = ()
    sharpness: Mapping[str, float | None] = field(default_factory=dict)
    logged: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, result: Mapping[str, Any], metric: Metric) -> Record:
        """The run of ``job`` that ended with ``result``.

        Raises:
            ValueError: a result, read from a file, that is not one of such a run.
        """
        _check(job, result, metric)
        best = result.get("best")
        best = best if best is not None and best.get("by") == metric.validation else None
        return cls(
            variant=job.name,
            seed=job.seed,
            budget=job.budget,
            test=result.get(metric.test),
            validation=result.get(metric.validation),
            best_epoch=None if best is None else best["epoch"],
            best_test=None if best is None else best[metric.test],
            gradient_evaluations=result.get("gradient_evaluations", 0),
            seconds=result.get("seconds", 0.0),
            diverged=result.get("diverged", False),
            epochs=result.get("epochs"),
            length=result.get("length", result.get("epochs")),
            planned_evaluations=job.evaluations,
            folder=f"runs/{job.folder}",
            error=result.get("error"),
            warnings=tuple(result.get("warnings", ())),
            sharpness={key.removeprefix(PREFIX): value for key, value in result.items() if key.startswith(PREFIX)},
            logged=dict(result.get("logged", {})),
        )

    def to_dict(self, metric: Metric) -> dict[str, Any]:
        """As in ``results.json``: the metric's values under the names that it was logged by."""
        validated = {metric.validation: self.validation, "best_epoch": self.best_epoch, f"best_{metric.test}": self.best_test}
        return {
            "variant": self.variant,
            "seed": self.seed,
            "budget": self.budget,
            metric.test: self.test,
            **({} if self.validation is None else validated),
            "gradient_evaluations": self.gradient_evaluations,
            "seconds": self.seconds,
            "diverged": self.diverged,
            "epochs": self.epochs,
            "planned_evaluations": self.planned_evaluations,
            "folder": self.folder,
            **({} if self.error is None else {"error": self.error}),
            **({} if not self.warnings else {"warnings": list(self.warnings)}),
            **{f"{PREFIX}{name}": value for name, value in self.sharpness.items()},
            **({} if not self.logged else {"logged": dict(self.logged)}),
        }


def _check(job: Job, result: Mapping[str, Any], metric: Metric) -> None:
    """Raise ValueError unless ``result`` has what a ``Record`` takes from it."""
    best = result.get("best")
    best_numbers = (best.get("epoch"), best.get(metric.test)) if isinstance(best, Mapping) else ()
    optional = (metric.validation, "epochs", "length", *(key for key in result if key.startswith(PREFIX)))
    needed = () if "error" in result else ("gradient_evaluations", "seconds", *(() if result.get("diverged") is True else (metric.test,)))
    wrong = [key for key in optional if not (result.get(key) is None or _is_number(result[key]))]
    wrong += [key for key in needed if not _is_number(result.get(key))]
    wrong += [] if "error" in result or isinstance(result.get("diverged"), bool) else ["diverged"]
    wrong += [] if (best is None or best_numbers) and all(n is None or _is_number(n) for n in best_numbers) else ["best"]
    wrong += [] if isinstance(result.get("warnings", []), (list, tuple)) else ["warnings"]
    logged = result.get("logged", {})
    wrong += [] if isinstance(logged, Mapping) and all(n is None or _is_number(n) for n in logged.values()) else ["logged"]
    if wrong:
        raise ValueError(
            f"result.json of the run {job.folder} must have the numbers of its result; it is damaged: {', '.join(wrong)}. Remove the run's "
            "folder, so that it is repeated."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def rows(plan: Plan, records: Sequence[Record]) -> list[Row]:
    """The table of ``records``: a row for each variant, and for each longer baseline.

    Args:
        plan: what was compared.
        records: the finished runs.
    """
    by_folder = {record.folder.removeprefix("runs/"): record for record in records}
    by_epochs = {name: [r for r in records if r.variant == name and r.budget == "epochs"] for name in plan.variants}
    plain = by_epochs[plan.baseline]
    own = plan.cost(plan.baseline, by_folder)
    standing = plan.standing(by_folder)
    looks = {} if standing is None else standing.taken

    def judged(question: Question, looks: Mapping[str, int] = looks) -> dict[str, Verdict]:
        """Verdicts on the variants of ``question`` that are compared with something."""
        variants = {name: values for name, values in question.variants.items() if question.baselines[name]}
        if not plain or not variants:
            return {}
        settings: dict[str, Any] = {
            "baselines": question.baselines,
            "mode": plan.metric.mode,
            "margin": plan.margin,
            "metric": plan.metric.title,
            "unit": plan.metric.difference_unit,
            "against": question.against,
        }
        if plan.race is None:
            return compare_paired({}, variants, **settings)
        return plan.race.judge_beside({}, variants, taken=looks, **settings)

    found_by: dict[str, dict[str, Verdict]] = {
        rival: judged(plan.question(rival, by_folder))
        for rival in plan.rivals
        if rival != "early" or any(r.best_test is not None for r in plain)
    }
    if standing is not None and plan.rivals[0] in found_by:  # which decides the race
        found_by[plan.rivals[0]] = standing.verdicts
    unit = "epochs" if any(r.epochs is not None for r in plain) else "steps"
    groups = {
        _label(plan, budget, one, names, own, unit): (budget, one.evaluations, names)
        for budget, one, names in plan.longer_baselines(by_folder)
    }
    groups = dict(sorted(groups.items(), key=lambda item: item[1][:2]))
    runs_of = {label: [r for r in records if (r.budget, r.planned_evaluations) == (budget, n)] for label, (budget, n, _) in groups.items()}
    most = {} if standing is None else {label: max(looks[name] for name in names) for label, (_, _, names) in groups.items()}
    longer_ones: dict[str, Verdict] = {}
    if "epochs" in plan.rivals and groups:
        values = {label: {r.seed: None if r.test is None else plan.metric.shown(r.test) for r in runs} for label, runs in runs_of.items()}
        against = plan.values(plan.baseline, by_folder)
        longer_ones = judged(Question(plan.baseline, values, dict.fromkeys(values, against)), most)
    found: list[Row] = []
    for name, variant in plan.variants.items():
        cost = plan.cost(name, by_folder)
        found.append(
            _row(
                plan,
                by_epochs[name],
                label=name,
                variant=name,
                method=variant.method,
                evaluations=None if cost is None else cost[1],
                unit=None if own is None else own[1],
                verdicts={rival: verdicts.get(name) for rival, verdicts in found_by.items()},
                looks=None if standing is None else looks.get(name, standing.looks),
            )
        )
        if name == plan.baseline:
            found += [
                _row(
                    plan,
                    runs_of[label],
                    label=label,
                    variant=name,
                    method=variant.method,
                    evaluations=n,
                    unit=None if own is None else own[1],
                    verdicts={"epochs": longer_ones.get(label)},
                    looks=most.get(label),
                )
                for label, (_, n, _) in groups.items()
            ]
    return found


def by_row(rows: Sequence[Row], records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of every row of the table, by its label."""
    found: dict[tuple[str, str, float | None], list[Record]] = {}
    for run in records:
        found.setdefault((run.variant, run.budget, None if run.budget == "epochs" else run.planned_evaluations), []).append(run)
    return {
        row.label: found.get((row.variant, row.budget, None if row.budget == "epochs" else row.gradient_evaluations), []) for row in rows
    }


def results(
    plan: Plan,
    records: Sequence[Record],
    environment: Mapping[str, Any],
    table: Sequence[Row],
    race: Mapping[str, Any] | None = None,
    sharpness: Mapping[str, Any] | None = None,
    logged: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``results.json``; ``race``: its rule and its looks; ``sharpness``, ``logged``: what runs measured besides."""
    return {
        "schema": SCHEMA,
        "task": plan.task,
        "metric": {"name": plan.metric.name, "mode": plan.metric.mode, "percent": plan.metric.percent},
        "baseline": plan.baseline,
        "seeds": seeds_run(plan, records),
        **({} if race is None else {"race": dict(race)}),
        **({} if not plan.seconds else {"seconds": {name: asdict(one) for name, one in plan.seconds.items()}}),
        "runs": [record.to_dict(plan.metric) for record in records],
        "table": [json_row(row) for row in table],
        **({} if sharpness is None else {"sharpness": dict(sharpness)}),
        **({} if logged is None else {"logged": dict(logged)}),
        "configuration": {name: dict(variant.settings) for name, variant in plan.variants.items()},
        "environment": dict(environment),
    }


def seeds_run(plan: Plan, records: Sequence[Record]) -> list[int]:
    """The seeds of the study: all of the plan, or those that a race has used."""
    used = {record.seed for record in records}
    return plan.seeds if plan.race is None else [seed for seed in plan.seeds if seed in used]


def over_seeds(plan: Plan, records: Sequence[Record]) -> str:
    """``5 seeds``; of a race ``5 to 12 seeds``."""
    most = len(seeds_run(plan, records))
    counts = [sum(r.variant == name and r.budget == "epochs" for r in records) for name in plan.variants]
    least = most if plan.race is None else min(counts)
    return f"{most} seed{'' if most == 1 else 's'}" if least == most else f"{least} to {most} seeds"


def race_said(plan: Plan, looks: Sequence[Mapping[str, Any]]) -> str:
    """What a reader must know of a race: that seeds were added, in how many looks, and which error was spent."""
    race = plan.race
    assert race is not None
    last = looks[-1]
    alpha = 1 - race.level
    return (
        f"Seeds were added until decided: {race.first} at first, then one at a time to the undecided variants, up to {len(race.seeds)}. "
        f"{len(looks)} of at most {len(race.looks)} looks were taken, which spent {last['spent']:.2g} of the {alpha:.2g} that any false "
        f"verdict may have ({race.spending}); the verdicts are those of the race."
    )


def warnings(plan: Plan, records: Sequence[Record], race: Mapping[str, Any] | None = None) -> list[str]:
    """What a reader of the table must know beside it: failed runs, runs that ended early, seeds that change nothing."""
    found: list[str] = []
    if race is not None and race["judged_before"]:
        found.append(
            f"the first {race['judged_before']} seeds were judged without a race before it began. Its error holds if it would have been "
            "run whatever they showed."
        )
    for name, one in plan.seconds.items():
        if not one.agrees:
            low, high = one.quartiles
            found.append(
                f"{name}: its seconds could not be told well, {low:.3g} to {high:.3g} times those of {plan.baseline} (quartiles of "
                f"{len(one.rounds)} rounds). Do not rely on the rival at equal seconds; measure again, with --fresh, where nothing else "
                "runs, or train longer."
            )
    for name, variant in plan.variants.items():
        own = [r for r in records if r.variant == name and r.budget == "epochs"]
        failed = [r for r in own if r.error is not None]
        if failed:
            found.append(
                f"{name}: {len(failed)} of {len(own)} runs failed, the first with {failed[0].error} ({failed[0].folder}/error.txt)"
            )
        for text in dict.fromkeys(text for r in own for text in r.warnings):
            found.append(f"{name}: {sum(text in r.warnings for r in own)} of {len(own)} runs {text}")
        ended = [(r.test, r.validation) for r in own if r.test is not None]
        if len(ended) > 1 and len(set(ended)) == 1 and name == plan.baseline:
            place = f" ({variant.place})" if variant.place else ""
            found.append(f"{name}: every seed gave the same result{place}. The task must use run.seed for whatever it draws.")
    return found


def _label(plan: Plan, budget: Budget, one: Longer, names: Sequence[str], own: tuple[int, float] | None, unit: str) -> str:
    """The name of a longer baseline's row."""
    if budget == "seconds":
        ratios = " and ".join(dict.fromkeys(f"{plan.seconds[name].ratio:.3g}" for name in names))
        return f"{plan.baseline}, equal seconds of {' and '.join(names)}: {one.length} {unit}, ratio {ratios} measured"
    return f"{plan.baseline}, " + ("longer" if own is None else f"{one.evaluations / own[1]:.3g} x epochs")


def _row(
    plan: Plan,
    group: Sequence[Record],
    *,
    label: str,
    variant: str,
    method: str,
    evaluations: float | None,
    unit: float | None,
    verdicts: Mapping[str, Verdict | None],
    looks: int | None,
) -> Row:
    ended = [plan.metric.shown(r.test) for r in group if r.test is not None]
    best = [plan.metric.shown(r.best_test) for r in group if r.best_test is not None]
    return Row(
        label=label,
        variant=variant,
        budget=group[0].budget if group else "epochs",
        method=method,
        runs=len(group),
        diverged=sum(r.diverged for r in group),
        failed=sum(r.error is not None for r in group),
        mean=mean(ended),
        deviation=deviation(ended),
        best_mean=mean(best),
        difference=verdicts.get("epochs"),
        matched_difference=verdicts.get("gradients"),
        seconds_difference=verdicts.get("seconds"),
        early_difference=verdicts.get("early"),
        gradient_evaluations=evaluations,
        seconds=mean([r.seconds for r in group if r.error is None]) or 0.0,
        cost=None if evaluations is None or not unit else evaluations / unit,
        looks=looks,
    )
