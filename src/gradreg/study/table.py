"""The table of a comparison: its columns in words, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from gradreg.study.results import Row
from gradreg.study.statistics import Difference

COLUMNS = (
    "variant",
    "test accuracy, %",
    "against plain, equal epochs",
    "against plain, equal gradients",
    "gradient evaluations",
    "seconds",
)

_HEADINGS = ("variant", "test\naccuracy %", "over plain,\nequal epochs", "over plain,\nequal gradients", "gradient\nevals", "seconds")
"""The columns as they fit 80 characters."""


def cells(row: Row) -> tuple[str, ...]:
    """The texts of a row, in the order of ``COLUMNS``."""
    return (
        row.label,
        accuracy(row),
        difference(row.difference),
        difference(row.rival_difference),
        f"{row.gradient_evaluations} ({row.cost:.3g} x)",
        f"{row.seconds:.2f}",
    )


def signs(row: Row) -> tuple[int, ...]:
    """For each cell: 1 or -1 where it is a difference whose interval excludes 0, else 0."""
    return (0, 0, _sign(row.difference), _sign(row.rival_difference), 0, 0)


def accuracy(row: Row) -> str:
    """``95.61 ± 0.78``, and how many runs diverged."""
    if row.accuracy is None:
        return f"diverged ({row.diverged} of {row.runs})"
    text = f"{row.accuracy:.2f}" + ("" if row.deviation is None else f" ± {row.deviation:.2f}")
    return text if not row.diverged else f"{text} ({row.diverged} of {row.runs} diverged)"


def difference(value: Difference | None) -> str:
    """``+2.08 [+1.20, +2.96]``: points, with the 95 % interval."""
    return "" if value is None else f"{value.mean:+.2f} {value}".rstrip()


def terminal_table(rows: Sequence[Row], *, title: str, width: int) -> Table:
    """The table for a terminal of ``width`` characters, intervals on lines of their own if it is narrow; those without 0 are coloured."""
    caption = "mean ± sd over seeds; differences in points, paired by seed, with 95 % intervals"
    wide = width >= 110
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0) if wide else 0)
    for i, column in enumerate(_HEADINGS):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        texts: list[Text] = []
        for i, (text, sign) in enumerate(zip(cells(row), signs(row), strict=True)):
            shown = text
            if not wide:
                shown = text.replace(", ", ",\n") if i == 0 else text.replace(" [", "\n[").replace(" (", "\n(")
            texts.append(Text(shown, style={1: "green", -1: "red", 0: ""}[sign]))
        table.add_row(*texts)
    return table


def _sign(value: Difference | None) -> int:
    return 0 if value is None or not value.excludes_zero else 1 if value.mean > 0 else -1
