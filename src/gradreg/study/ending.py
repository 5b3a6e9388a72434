"""What the records of a run say at its end: the metric, its best epoch, whether it diverged, and what else was logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradreg.sharpness.measures import PREFIX
from gradreg.study.tasks import Metric, TaskError

_BOOKKEEPING = ("epoch", "step", "gradient_evaluations", "seconds")
"""What a record has beside what was logged."""

Records = Sequence[Mapping[str, Any]]


def ending(records: Records, metric: Metric) -> dict[str, Any]:
    """The part of a run's result that its records give.

    Raises:
        TaskError: the metric was never logged.
    """
    test, validation = metric.test, metric.validation
    judged = [record for record in records if test in record]
    if not judged:
        names = sorted({name for record in records for name in record} - set(_BOOKKEEPING))
        raise TaskError(
            f"the task must log its metric as {test}; got {', '.join(names) or 'no metrics at all'}. "
            f"Write run.log({test}=...) after each epoch."
        )
    last = judged[-1]
    losses = [record["loss"] for record in records if "loss" in record]
    diverged = not math.isfinite(last[test]) or any(not math.isfinite(loss) for loss in losses[-1:])
    return {
        test: None if diverged else last[test],
        validation: None if diverged else last.get(validation),
        "best": None if diverged else _best(judged, metric),
        **_last_sharpness(records),
        **_beside_the_metric(records, metric),
        "diverged": diverged,
    }


def _best(judged: Records, metric: Metric) -> dict[str, Any] | None:
    """The first epoch with the best metric on validation; None without validation."""
    test, validation = metric.test, metric.validation
    best = None
    for record in judged:
        if not (math.isfinite(record.get(validation, math.nan)) and math.isfinite(record[test])):
            continue
        if best is None or metric.is_better(record[validation], best[validation]):
            best = record
    return None if best is None else {"epoch": best["epoch"], "by": validation, validation: best[validation], test: best[test]}


def _last_sharpness(records: Records) -> dict[str, Any]:
    """The last sharpness that was logged, and when."""
    for record in reversed(records):
        found = {name: value if math.isfinite(value) else None for name, value in record.items() if name.startswith(PREFIX)}
        if found:
            return {f"{PREFIX}epoch": record["epoch"], **found}
    return {}


def _beside_the_metric(records: Records, metric: Metric) -> dict[str, Any]:
    """What else was logged, by name: the last value of each, None if it is not finite."""
    known = {*_BOOKKEEPING, "loss", metric.test, metric.validation}
    found = {name: value for record in records for name, value in record.items() if name not in known and not name.startswith(PREFIX)}
    return {"logged": {name: value if math.isfinite(value) else None for name, value in found.items()}} if found else {}
