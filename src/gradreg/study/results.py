"""The results of a comparison: its runs, the rows of its table, and ``results.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradreg.study.plan import Budget, Job, Plan
from gradreg.study.statistics import deviation, mean
from gradreg.study.table import Row, json_row
from gradreg.study.tasks import Metric
from gradreg.study.verdicts import Verdict, compare_paired

Values = Callable[[Sequence["Record"]], dict[int, float | None]]
"""The values of some runs by their seeds."""

SCHEMA = 1
"""The version of ``results.json``; docs/comparing.md describes it."""


@dataclass(frozen=True)
class Record:
    """One finished run.

    Args:
        variant: the variant that was trained; for a longer baseline, the baseline.
        seed: the run's seed.
        budget: "epochs", or "gradients" for a longer baseline.
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
        }


def _check(job: Job, result: Mapping[str, Any], metric: Metric) -> None:
    """Raise ValueError unless ``result`` has what a ``Record`` takes from it."""
    best = result.get("best")
    best_numbers = (best.get("epoch"), best.get(metric.test)) if isinstance(best, Mapping) else ()
    optional = (metric.validation, "epochs", "length")
    needed = () if "error" in result else ("gradient_evaluations", "seconds", *(() if result.get("diverged") is True else (metric.test,)))
    wrong = [key for key in optional if not (result.get(key) is None or _is_number(result[key]))]
    wrong += [key for key in needed if not _is_number(result.get(key))]
    wrong += [] if "error" in result or isinstance(result.get("diverged"), bool) else ["diverged"]
    wrong += [] if (best is None or best_numbers) and all(n is None or _is_number(n) for n in best_numbers) else ["best"]
    wrong += [] if isinstance(result.get("warnings", []), (list, tuple)) else ["warnings"]
    if wrong:
        raise ValueError(
            f"result.json of the run {job.folder} must have the numbers of its result; it is damaged: {', '.join(wrong)}. Remove the run's "
            "folder, so that it is repeated."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def rows(plan: Plan, records: Sequence[Record], *, margin: float | None = None) -> list[Row]:
    """The table of ``records``: a row for each variant, and for each longer baseline.

    Args:
        plan: what was compared.
        records: the finished runs.
        margin: the difference that matters, in the table's unit; None if none was given.
    """
    by_folder = {record.folder.removeprefix("runs/"): record for record in records}
    by_epochs = {name: [r for r in records if r.variant == name and r.budget == "epochs"] for name in plan.variants}
    longer = {r.planned_evaluations for r in records if r.budget == "gradients"}
    by_gradients = {
        n: [r for r in records if r.budget == "gradients" and r.planned_evaluations == n] for n in sorted(longer, key=lambda n: n or 0)
    }
    matched = {name: one.evaluations for name, one in plan.longer(by_folder).items()}
    plain = by_epochs[plan.baseline]
    own = plan.cost(plan.baseline, by_folder)

    def values(group: Sequence[Record]) -> dict[int, float | None]:
        return {r.seed: None if r.test is None else plan.metric.shown(r.test) for r in group}

    def best(group: Sequence[Record]) -> dict[int, float | None]:
        return {r.seed: None if r.best_test is None else plan.metric.shown(r.best_test) for r in group}

    def judged(
        against: str, groups: Mapping[str, Sequence[Record]], take: Values = values, rivals: Mapping[str, Sequence[Record]] | None = None
    ) -> dict[str, Verdict]:
        """Verdicts on ``groups`` against the baseline, or each against its own of ``rivals``."""
        if not plain or not groups:
            return {}
        return compare_paired(
            take(plain),
            {name: take(group) for name, group in groups.items()},
            baselines={name: take(group) for name, group in (rivals or {}).items()},
            mode=plan.metric.mode,
            margin=margin,
            metric=plan.metric.title,
            unit=" points" if plan.metric.percent else "",
            against=against,
        )

    variants = {name: group for name, group in by_epochs.items() if name != plan.baseline}
    equal = judged(plan.baseline, variants) if "epochs" in plan.rivals else {}
    spent: dict[str, Verdict] = {}
    if "gradients" in plan.rivals:
        # A variant that costs no more than the baseline is compared with the baseline itself.
        rivals = {name: by_gradients.get(matched[name], []) if name in matched else plain for name in variants}
        rivals = {name: group for name, group in rivals.items() if group}
        spent = judged(f"{plan.baseline} at equal gradients", {name: variants[name] for name in rivals}, rivals=rivals)
    early: dict[str, Verdict] = {}
    if "early" in plan.rivals and any(r.best_test is not None for r in plain):
        early = judged(f"{plan.baseline} stopped early", variants, best)
    labels = {n: f"{plan.baseline}, " + ("longer" if own is None or n is None else f"{n / own[1]:.3g} x epochs") for n in by_gradients}
    longer_ones = judged(plan.baseline, {labels[n]: group for n, group in by_gradients.items()}) if "epochs" in plan.rivals else {}
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
                verdicts=(equal.get(name), spent.get(name), early.get(name)),
            )
        )
        if name == plan.baseline:
            found += [
                _row(
                    plan,
                    group,
                    label=labels[n],
                    variant=name,
                    method=variant.method,
                    evaluations=n,
                    unit=None if own is None else own[1],
                    verdicts=(longer_ones.get(labels[n]), None, None),
                )
                for n, group in by_gradients.items()
            ]
    return found


def results(plan: Plan, records: Sequence[Record], environment: Mapping[str, Any], table: Sequence[Row]) -> dict[str, Any]:
    """The content of ``results.json``."""
    return {
        "schema": SCHEMA,
        "task": plan.task,
        "metric": {"name": plan.metric.name, "mode": plan.metric.mode, "percent": plan.metric.percent},
        "baseline": plan.baseline,
        "seeds": plan.seeds,
        "runs": [record.to_dict(plan.metric) for record in records],
        "table": [json_row(row) for row in table],
        "configuration": {name: dict(variant.settings) for name, variant in plan.variants.items()},
        "environment": dict(environment),
    }


def warnings(plan: Plan, records: Sequence[Record]) -> list[str]:
    """What a reader of the table must know beside it: failed runs, runs that ended early, seeds that change nothing."""
    found: list[str] = []
    for name in plan.variants:
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
            found.append(f"{name}: every seed gave the same result. The task must use run.seed for whatever it draws.")
    return found


def _row(
    plan: Plan,
    group: Sequence[Record],
    *,
    label: str,
    variant: str,
    method: str,
    evaluations: float | None,
    unit: float | None,
    verdicts: tuple[Verdict | None, Verdict | None, Verdict | None],
) -> Row:
    ended = [plan.metric.shown(r.test) for r in group if r.test is not None]
    best = [plan.metric.shown(r.best_test) for r in group if r.best_test is not None]
    equal, matched, early = verdicts
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
        difference=equal,
        matched_difference=matched,
        early_difference=early,
        gradient_evaluations=evaluations,
        seconds=mean([r.seconds for r in group if r.error is None]) or 0.0,
        cost=None if evaluations is None or not unit else evaluations / unit,
    )
