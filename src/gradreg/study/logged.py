"""What runs logged beside the metric, at the end of training: means over seeds, and differences to plain training, paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradreg.study.results import Record, by_row
from gradreg.study.statistics import deviation, mean, paired_difference
from gradreg.study.table import Row
from gradreg.study.verdicts import decimals, interval_text

NOT_JUDGED = (
    "These numbers are not judged and not corrected for how many there are: no verdict rests on them, and of many intervals some exclude 0 "
    "by chance."
)


def measured(rows: Sequence[Row], records: Sequence[Record], baseline: str) -> dict[str, Any] | None:
    """The block ``logged`` of ``results.json``; None if no run logged anything else.

    Args:
        rows: the table.
        records: the runs; those that diverged or failed are left out.
        baseline: the name of the variant that the others are compared with.
    """
    runs = [run for run in records if run.logged and run.test is not None and not run.diverged]
    names = list(dict.fromkeys(name for run in runs for name in run.logged))
    if not names:
        return None
    runs_of = by_row(rows, runs)
    plain = next((runs_of[row.label] for row in rows if row.variant == baseline and row.budget == "epochs"), [])
    table: list[dict[str, Any]] = []
    for row in rows:
        own = runs_of[row.label]
        if own:
            is_plain = row.variant == baseline and row.budget == "epochs"
            cells = {name: _cell(_values(own, name), {} if is_plain else _values(plain, name)) for name in names}
            table.append({"label": row.label, "variant": row.variant, "budget": row.budget, "runs": len(own), **cells})
    return {"names": names, "table": table}


def _values(runs: Sequence[Record], name: str) -> dict[int, float]:
    return {run.seed: value for run in runs if (value := run.logged.get(name)) is not None}


def _cell(values: Mapping[int, float], plain: Mapping[int, float]) -> dict[str, Any]:
    found = paired_difference(values, plain)
    return {
        "mean": mean(list(values.values())),
        "sd": deviation(list(values.values())),
        "runs": len(values),
        "difference": None if found is None else found.mean,
        "low": None if found is None else found.low,
        "high": None if found is None else found.high,
    }


def heading(name: str) -> str:
    """``loss in 4 bits`` of ``loss_in_4_bits``."""
    return name.replace("_", " ")


def cell(found: Mapping[str, Any]) -> tuple[str, str]:
    """``0.42 ± 0.03`` and ``-0.10 [-0.15, -0.05]`` of a line's number; empty where no run has it."""
    if found["mean"] is None:
        return "", ""
    places = decimals(found["sd"])
    value = f"{found['mean']:.{places}f}" + ("" if found["sd"] is None else f" ± {found['sd']:.{places}f}")
    return value, "" if found["difference"] is None else interval_text(found["difference"], found["low"], found["high"])


def sentences(block: Mapping[str, Any]) -> list[str]:
    """What a terminal shows of the block: a line for each number."""
    lines: list[str] = []
    for name in block["names"]:
        told: list[str] = []
        for line in block["table"]:
            value, difference = cell(line[name])
            if value:
                told.append(f"{line['label']} {value}" + (f" ({difference} over plain)" if difference else ""))
        lines.append(f"{heading(name)}, mean ± sd: {'; '.join(told)}")
    return [*lines, NOT_JUDGED] if lines else []
