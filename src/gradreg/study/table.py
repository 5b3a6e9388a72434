"""The table of a comparison: its rows, and one record for each column, for the terminal, the page and ``results.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from gradreg.study.plan import Budget
from gradreg.study.statistics import Difference

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 110
"""Characters of a terminal from which on no cell needs a second line."""


@dataclass(frozen=True)
class Row:
    """One line of the table: the runs of one variant at one budget. Accuracies and differences are in percent (points), 0 to 100.

    Args:
        label: its name in the table.
        variant: the variant's name; for a compute-matched baseline, the baseline's.
        budget: "epochs", or "gradients" for a compute-matched baseline.
        method: a description of the penalty.
        runs: how many runs.
        diverged: how many of them diverged; they are in no mean.
        accuracy: mean test accuracy.
        deviation: standard deviation over the seeds.
        difference: to the baseline at equal epochs, paired by seed.
        matched_difference: to the compute-matched baseline, the plain optimizer with as many gradient evaluations, paired by seed.
        gradient_evaluations: planned for a run.
        seconds: mean seconds of training of a run.
        cost: gradient evaluations in units of the baseline's.
    """

    label: str
    variant: str
    budget: Budget
    method: str
    runs: int
    diverged: int
    accuracy: float | None
    deviation: float | None
    difference: Difference | None
    matched_difference: Difference | None
    gradient_evaluations: int
    seconds: float
    cost: float

    def verdict(self) -> str:
        """The answer to "does it help here, by how much, at what cost?" in a sentence."""
        if self.accuracy is None:
            return f"{self.label}, {self.method}: diverged in every run. Lower its strength and radius."
        parts: list[str] = []
        for difference, against in (
            (self.difference, "plain training"),
            (self.matched_difference, "plain training with as many gradient evaluations"),
        ):
            if difference is None:
                continue
            if difference.low is None:
                parts.append(f"{difference.mean:+.2f} points against {against} (one seed, so no interval)")
            elif not difference.excludes_zero:
                parts.append(f"no clear difference from {against} {difference}")
            else:
                word = "better" if difference.mean > 0 else "worse"
                parts.append(f"{word} than {against} by {abs(difference.mean):.2f} points {difference}")
        failed = f" {self.diverged} of {self.runs} runs diverged." if self.diverged else ""
        return f"{self.label}, {self.method}: {'; '.join(parts)}. Cost: {self.cost:.3g} x the gradient evaluations.{failed}"


@dataclass(frozen=True, kw_only=True)
class Column:
    """The record of one column.

    Args:
        header: on the page and in the documentation.
        narrow_header: in a terminal of 80 characters, with its line breaks.
        meaning: a sentence for the page and docs/comparing.md.
        text: a row's cell, on one line.
        fields: the fields of ``Row`` that the column shows, which are its keys in ``results.json``.
        difference: for a column of differences, a row's. Its cell is colored where the interval excludes 0.
        note: a second, smaller line of the cell on the page.
        align: of header and cells.
        breaks: (text, the same with a line break), where a narrow terminal breaks a cell.
    """

    header: str
    narrow_header: str
    meaning: str
    text: Callable[[Row], str]
    fields: tuple[str, ...]
    difference: Callable[[Row], Difference | None] = lambda row: None
    note: Callable[[Row], str] = lambda row: ""
    align: Literal["left", "right"] = "right"
    breaks: tuple[tuple[str, str], ...] = ((" [", "\n["), (" (", "\n("))

    def narrow_text(self, row: Row) -> str:
        """A row's cell with the line breaks of a narrow terminal."""
        text = self.text(row)
        for whole, broken in self.breaks:
            text = text.replace(whole, broken)
        return text

    def sign(self, row: Row) -> Literal[-1, 0, 1]:
        """1 or -1 if the cell is a difference whose interval excludes 0, else 0."""
        value = self.difference(row)
        return 0 if value is None or not value.excludes_zero else 1 if value.mean > 0 else -1


def _accuracy(row: Row) -> str:
    """``95.61 ± 0.78``, and how many runs diverged."""
    if row.accuracy is None:
        return f"diverged ({row.diverged} of {row.runs})"
    text = f"{row.accuracy:.2f}" + ("" if row.deviation is None else f" ± {row.deviation:.2f}")
    return text if not row.diverged else f"{text} ({row.diverged} of {row.runs} diverged)"


def _difference(value: Difference | None) -> str:
    """``+2.08 [+1.20, +2.96]``: points, with the 95 % interval."""
    return "" if value is None else f"{value.mean:+.2f} {value}".rstrip()


COLUMNS = (
    Column(
        header="variant",
        narrow_header="variant",
        meaning='the variant of the recipe, and its penalty; "2 x epochs" marks a compute-matched baseline',
        text=lambda row: row.label,
        fields=("label", "variant", "budget", "method"),
        note=lambda row: row.method,
        align="left",
        breaks=((", ", ",\n"),),
    ),
    Column(
        header="test accuracy, %",
        narrow_header="test\naccuracy %",
        meaning="mean ± standard deviation (n − 1) over the seeds, after the last epoch; no epoch is picked by its test accuracy",
        text=_accuracy,
        fields=("runs", "diverged", "accuracy", "deviation"),
    ),
    Column(
        header="over plain, equal epochs",
        narrow_header="over plain,\nequal epochs",
        meaning="mean difference to the baseline in points, paired by seed, with the 95 % interval of the paired t test",
        text=lambda row: _difference(row.difference),
        fields=("difference",),
        difference=lambda row: row.difference,
    ),
    Column(
        header="over plain, equal gradients",
        narrow_header="over plain,\nequal gradients",
        meaning="the same to the compute-matched baseline",
        text=lambda row: _difference(row.matched_difference),
        fields=("matched_difference",),
        difference=lambda row: row.matched_difference,
    ),
    Column(
        header="gradient evaluations",
        narrow_header="gradient\nevals",
        meaning="planned for a run, and in units of the baseline's",
        text=lambda row: f"{row.gradient_evaluations} ({row.cost:.3g} x)",
        fields=("gradient_evaluations", "cost"),
    ),
    Column(
        header="seconds",
        narrow_header="seconds",
        meaning="mean time spent training, without evaluation; workers share the machine, so read it as a ratio",
        text=lambda row: f"{row.seconds:.2f}",
        fields=("seconds",),
    ),
)


def json_row(row: Row) -> dict[str, Any]:
    """A row as ``results.json`` holds it: the fields of every column, and the verdict on a row that has one."""
    values = asdict(row)
    shown = {field: values[field] for column in COLUMNS for field in column.fields}
    return {**shown, "verdict": row.verdict() if row.difference else None}


def terminal_table(rows: Sequence[Row], *, title: str, width: int) -> Table:
    """The table for a terminal of ``width`` characters; if it is narrow, intervals are on separate lines."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = "mean ± sd over seeds; differences in points, paired by seed, with 95 % intervals"
    wide = width >= WIDE
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0) if wide else 0)
    for column in COLUMNS:
        table.add_column(column.narrow_header, justify=column.align, no_wrap=True)
    styles = {1: "green", -1: "red", 0: ""}
    for row in rows:
        texts = [column.text(row) if wide else column.narrow_text(row) for column in COLUMNS]
        table.add_row(*(Text(text, style=styles[column.sign(row)]) for column, text in zip(COLUMNS, texts, strict=True)))
    return table
