"""The results of a comparison: its runs, the rows of its table, and ``results.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradreg.study.plan import Budget, Job, Plan
from gradreg.study.statistics import deviation, mean, paired_difference
from gradreg.study.table import Row, json_row


@dataclass(frozen=True)
class Run:
    """One finished run, as in ``results.json``.

    Args:
        variant: the variant that was trained; for a compute-matched baseline, the baseline.
        seed: the run's seed.
        budget: "epochs", or "gradients" for a compute-matched baseline.
        test_accuracy: share of the test set classified correctly after the last epoch, 0 to 1; None if the run diverged.
        gradient_evaluations: gradient evaluations spent.
        seconds: seconds spent training, without evaluation.
        diverged: whether the loss stopped being finite, or ended at more than twice what the untrained model had.
        epochs: epochs trained.
        planned_evaluations: gradient evaluations that the run was to spend; fewer were, if it diverged.
        folder: the run's folder within the comparison's.
    """

    variant: str
    seed: int
    budget: Budget
    test_accuracy: float | None
    gradient_evaluations: int
    seconds: float
    diverged: bool
    epochs: int
    planned_evaluations: int
    folder: str

    @classmethod
    def of(cls, job: Job, result: dict[str, Any]) -> Run:
        """The run of ``job`` that ended with ``result``."""
        return cls(
            variant=job.variant,
            seed=job.seed,
            budget=job.budget,
            test_accuracy=result["test_accuracy"],
            gradient_evaluations=result["gradient_evaluations"],
            seconds=result["seconds"],
            diverged=result["diverged"],
            epochs=result["epochs"],
            planned_evaluations=job.evaluations,
            folder=f"runs/{job.folder}",
        )


def rows(plan: Plan, runs: Sequence[Run]) -> list[Row]:
    """The table of ``runs``: a row for each variant, and for each compute-matched baseline."""
    by_epochs = {name: [r for r in runs if r.variant == name and r.budget == "epochs"] for name in plan.variants}
    longer = sorted({r.planned_evaluations for r in runs if r.budget == "gradients"})
    by_gradients = {n: [r for r in runs if r.budget == "gradients" and r.planned_evaluations == n] for n in longer}
    baseline = _accuracies(by_epochs[plan.baseline])
    unit = next(job.evaluations for job in plan.jobs if job.variant == plan.baseline and job.budget == "epochs")
    methods = {job.variant: str(job.config.resolved_penalty()) for job in plan.jobs}
    table: list[Row] = []
    for name in plan.variants:
        plain = name == plan.baseline
        # A variant that costs no more than the baseline is compared with the baseline itself.
        matched = by_gradients.get(plan.matched[name], []) if name in plan.matched else by_epochs[plan.baseline]
        table.append(
            _row(
                by_epochs[name],
                label=name,
                method=methods[name],
                unit=unit,
                baseline=None if plain else baseline,
                matched=None if plain else _accuracies(matched),
            )
        )
        if plain:
            for evaluations, group in by_gradients.items():
                label = f"{name}, {evaluations / unit:.3g} x epochs"
                table.append(_row(group, label=label, method=methods[name], unit=unit, baseline=baseline, matched=None))
    return table


def results(plan: Plan, runs: Sequence[Run], environment: dict[str, Any]) -> dict[str, Any]:
    """The content of ``results.json``."""
    return {
        "recipe": plan.recipe,
        "baseline": plan.baseline,
        "seeds": plan.seeds,
        "runs": [asdict(run) for run in runs],
        "table": [json_row(row) for row in rows(plan, runs)],
        "configuration": plan.settings,
        "environment": environment,
    }


def _row(
    runs: Sequence[Run],
    *,
    label: str,
    method: str,
    unit: int,
    baseline: dict[int, float] | None,
    matched: dict[int, float] | None,
) -> Row:
    accuracies = _accuracies(runs)
    planned = runs[0].planned_evaluations
    return Row(
        label=label,
        variant=runs[0].variant,
        budget=runs[0].budget,
        method=method,
        runs=len(runs),
        diverged=sum(run.diverged for run in runs),
        accuracy=mean(list(accuracies.values())),
        deviation=deviation(list(accuracies.values())),
        difference=None if baseline is None else paired_difference(accuracies, baseline),
        matched_difference=None if matched is None else paired_difference(accuracies, matched),
        gradient_evaluations=planned,
        seconds=mean([run.seconds for run in runs]) or 0.0,
        cost=planned / unit,
    )


def _accuracies(runs: Sequence[Run]) -> dict[int, float]:
    return {run.seed: 100 * run.test_accuracy for run in runs if run.test_accuracy is not None}
