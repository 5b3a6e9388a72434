"""The report of an experiment and its files, which are written atomically and are byte for byte the same for the same seed."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | bool


@dataclass(frozen=True)
class Table:
    """Rows of numbers and text.

    Attributes:
        columns: header cells.
        rows: as many cells each.
        title: a line above the table on the terminal; None keeps the table out of the terminal (it is only written).
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str | None = None

    def to_csv(self) -> str:
        """Comma-separated, numbers to nine significant digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_csv_cell(cell) for cell in row] for row in self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class LabReport:
    """Everything one experiment found.

    Attributes:
        tables: by file name without suffix.
        figures: by file name without suffix.
        remarks: sentences for the reader, printed below the tables.
    """

    tables: Mapping[str, Table]
    figures: Mapping[str, Figure]
    remarks: Sequence[str] = field(default_factory=tuple)


def prepare(folder: Path) -> None:
    """Create ``folder`` and check that files can be written there, before the experiment takes minutes.

    Raises:
        OSError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--out must be a folder that can be made and written to; got {str(folder)!r} ({error.strerror}). Name another."
        ) from None


def write(report: LabReport, folder: Path) -> list[Path]:
    """Write every table as CSV and every figure as PNG and SVG; returns the paths."""
    import matplotlib

    paths = [_write(folder / f"{name}.csv", table.to_csv().encode()) for name, table in report.tables.items()]
    with matplotlib.rc_context({"svg.hashsalt": "gradreg", "svg.fonttype": "path"}):
        for name, figure in report.figures.items():
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                content = io.BytesIO()
                figure.savefig(content, format=suffix, dpi=130, metadata=metadata)
                paths.append(_write(folder / f"{name}.{suffix}", content.getvalue()))
    return paths


def _write(path: Path, content: bytes) -> Path:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _csv_cell(cell: Cell) -> str:
    return f"{cell:.9g}" if isinstance(cell, float) else str(cell)
