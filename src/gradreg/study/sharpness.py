"""What a study's runs measured of sharpness, beside its metric: means over seeds, and the correlation over the runs at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gradreg.sharpness.measures import CAUTION, MEASURES
from gradreg.study.results import Record, by_row
from gradreg.study.statistics import Correlation, deviation, mean, rank_correlation
from gradreg.study.table import Row
from gradreg.study.tasks import Metric

NOT_INDEPENDENT = (
    "Runs of one variant are more alike than others, so that the intervals over all runs are too narrow; within variants, where the mean "
    "of each is taken off, a correlation is not one of penalties. Neither says that flatness is why."
)


def measured(rows: Sequence[Row], records: Sequence[Record], metric: Metric) -> dict[str, Any] | None:
    """The block ``sharpness`` of ``results.json``; None if no run measured it.

    Args:
        rows: the table.
        records: the runs; those that diverged or failed are left out.
        metric: what the study judges by.
    """
    runs = [run for run in records if run.sharpness and run.test is not None and not run.diverged]
    names = [name for name in MEASURES if any(run.sharpness.get(name) is not None for run in runs)]
    if not names:
        return None
    runs_of = by_row(rows, runs)
    table = [_line(row, runs_of[row.label], names, metric) for row in rows]
    return {
        "caution": CAUTION,
        "measures": names,
        "table": [line for line in table if line["runs"]],
        "correlations": [
            {"measure": name, "over": over, **asdict(found)} for name in names for over, found in _correlations(name, runs, metric).items()
        ],
    }


def _line(row: Row, runs: Sequence[Record], names: Sequence[str], metric: Metric) -> dict[str, Any]:
    """Means over the seeds with their standard errors; of a single run the error of its own measurement."""
    line: dict[str, Any] = {
        "label": row.label,
        "variant": row.variant,
        "budget": row.budget,
        "runs": len(runs),
        metric.test: mean([run.test for run in runs if run.test is not None]),
        f"{metric.test}_sd": deviation([run.test for run in runs if run.test is not None]),
    }
    for name in names:
        there = [run for run in runs if run.sharpness.get(name) is not None]
        values = [value for run in there if (value := run.sharpness[name]) is not None]
        spread = deviation(values)
        own = there[0].sharpness.get(f"{name}_error") if len(there) == 1 else None
        error = own if spread is None else spread / len(values) ** 0.5
        line[name] = {"mean": mean(values), "standard_error": error, "runs": len(values)}
    return line


def _correlations(name: str, runs: Sequence[Record], metric: Metric) -> dict[str, Correlation]:
    """Of a measure with the test metric: over all runs, and within variants where there are several."""
    there = [run for run in runs if run.sharpness.get(name) is not None]
    x = [value for run in there if (value := run.sharpness[name]) is not None]
    y = [metric.shown(run.test) for run in there if run.test is not None]
    groups = [(run.variant, run.budget, run.planned_evaluations if run.budget != "epochs" else None) for run in there]
    found = {"over all runs": rank_correlation(x, y)}
    if len(set(groups)) > 1:
        found["within variants"] = rank_correlation(x, y, groups)
    return {over: one for over, one in found.items() if one is not None}


def cell(value: Mapping[str, Any]) -> str:
    """``12.3 ± 0.4`` of a line's number; empty where no run has it."""
    if value["mean"] is None:
        return ""
    return f"{value['mean']:.4g}" if value["standard_error"] is None else f"{value['mean']:.4g} ± {value['standard_error']:.1g}"


def correlation_text(found: Mapping[str, Any]) -> str:
    """``+0.42 [+0.05, +0.69], n = 30`` of an entry of ``correlations``."""
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}], n = {found['n']}"


def sentences(block: Mapping[str, Any], metric: Metric) -> list[str]:
    """What a terminal shows of the block: the means, the correlations, and how not to read them."""
    lines = [
        f"{MEASURES[name]}: " + ", ".join(f"{line['label']} {text}" for line in block["table"] if (text := cell(line[name])))
        for name in block["measures"]
    ]
    lines = [f"sharpness at the end, mean ± standard error over seeds; {line}" if i == 0 else line for i, line in enumerate(lines)]
    for over in ("over all runs", "within variants"):
        told = [f"{MEASURES[one['measure']]} {correlation_text(one)}" for one in block["correlations"] if one["over"] == over]
        if told:
            lines.append(f"rank correlation with test {metric.title} {over}, with 95 % intervals: {'; '.join(told)}")
    return [*lines, block["caution"], *([NOT_INDEPENDENT] if block["correlations"] else [])]
