"""What a run leaves behind of its way: a record for each epoch, in a file of JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradreg import files

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
"""Where the runs of recipes keep their times, so that ``metrics.jsonl`` is the same on every machine."""


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The records of the run in ``folder``: one for each epoch, or for each call of ``log`` outside of epochs."""
    records: list[dict[str, Any]] = []
    for values in _records(folder / METRICS):
        if records and values.get("epoch") is not None and records[-1].get("epoch") == values["epoch"]:
            records[-1].update(values)
        else:
            records.append(values)
    by_epoch = {record.get("epoch"): record for record in records}
    for values in _records(folder / TIMINGS):
        by_epoch.get(values.get("epoch"), {}).update(values)
    return records


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The records in a file of JSON lines; an unfinished line is left out."""
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.is_file() else [], 1):
        if not line.endswith(b"\n"):
            return
        try:
            found = {name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in files.parse_json(line).items()}
            wrong = [name for name, value in found.items() if value is not None and not isinstance(value, (int, float))]
            if wrong:
                raise ValueError(f"{', '.join(wrong)} must be a number")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"line {number} of {str(file)!r} must be the record of an epoch; it is damaged: {error}. Remove the folder "
                f"{str(file.parent)!r}, so that the run is repeated."
            ) from error
        yield found
