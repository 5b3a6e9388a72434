"""The table of a comparison: its rows, and one record for each column, for the terminal, the page, exports and ``results.json``."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from gradreg.study.plan import Budget
from gradreg.study.tasks import Metric
from gradreg.study.verdicts import Verdict, decimals, interval_text

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 150
"""Characters of a terminal from which on no cell needs a second line, with the columns of validation."""


@dataclass(frozen=True)
class Row:
    """One line of the table: the runs of one variant at one budget. A metric in percent, and differences of it, are 0 to 100 (points).

    Args:
        label: its name in the table.
        variant: the variant's name; for a longer baseline, the baseline's.
        budget: "epochs"; "gradients" or "seconds" for a longer baseline.
        method: a description of the penalty.
        runs: how many runs.
        diverged: how many of them diverged; they are in no mean.
        failed: how many ended with an error; they are in no mean either.
        mean: mean test metric after the last epoch.
        deviation: standard deviation over the seeds.
        best_mean: mean test metric of the epochs with the best validation metric; None without validation.
        difference: verdict against the baseline at equal epochs.
        matched_difference: against the baseline with as many gradient evaluations.
        seconds_difference: against the baseline that takes as many seconds; None if that is not asked for.
        early_difference: against the baseline stopped early, both at their best epoch by validation; None without validation.
        gradient_evaluations: of a run; None while unknown.
        seconds: mean seconds of a run.
        cost: gradient evaluations in units of the baseline's.
        looks: how many looks of the race it had; None without a race.
    """

    label: str
    variant: str
    budget: Budget
    method: str
    runs: int
    diverged: int
    failed: int
    mean: float | None
    deviation: float | None
    best_mean: float | None
    difference: Verdict | None
    matched_difference: Verdict | None
    seconds_difference: Verdict | None
    early_difference: Verdict | None
    gradient_evaluations: float | None
    seconds: float
    cost: float | None
    looks: int | None = None

    def verdict(self) -> str:
        """The answer to "does it help here, by how much, at what cost?" in a few sentences."""
        if self.mean is None:
            why = f"diverged in {self.diverged} and failed in {self.failed}" if self.failed else "diverged in every one"
            return f"{self.label}, {self.method}: no result, of {self.runs} runs it {why}. Lower its strength and radius."
        first = next(
            (v for v in (self.difference, self.matched_difference, self.seconds_difference, self.early_difference) if v is not None), None
        )
        if first is None:
            return f"{self.label}, {self.method}: nothing to compare with."
        parts = [first.sentence]
        for rival, verdict in (
            ("plain training with as many gradient evaluations", self.matched_difference),
            ("plain training that takes as many seconds", self.seconds_difference),
            ("plain training stopped early by validation", self.early_difference),
        ):
            if verdict is not None and verdict is not first:
                parts.append(_beside(first, rival, verdict))
        if self.cost is not None:
            parts.append(f"Cost: {self.cost:.3g} x the gradient evaluations.")
        return " ".join(parts)


_TIGHT = ((", +", ",\n+"), (", -", ",\n-"), (" ± ", "\n± "))


@dataclass(frozen=True, kw_only=True)
class Column:
    """The record of one column.

    Args:
        header: on the page and in the documentation; {metric} stands for the metric.
        narrow_header: in a terminal of 80 characters, with its line breaks.
        meaning: a sentence for the page and docs/comparing.md.
        text: a row's cell, on one line.
        fields: the fields of ``Row`` that the column shows, which are its keys in ``results.json``.
        difference: for a column of differences, a row's. Its cell is colored where the verdict is "helps" or "harms".
        note: a second, smaller line of the cell on the page.
        align: of header and cells.
        breaks: (text, the same with a line break), where a narrow terminal breaks a cell.
        order: what the page sorts by.
    """

    header: str
    narrow_header: str
    meaning: str
    text: Callable[[Row], str]
    fields: tuple[str, ...]
    difference: Callable[[Row], Verdict | None] = lambda row: None
    note: Callable[[Row], str] = lambda row: ""
    align: Literal["left", "right"] = "right"
    breaks: tuple[tuple[str, str], ...] = ((" [", "\n["), (" (", "\n("))
    order: Callable[[Row], float | str | None] = lambda row: None

    def title(self, metric: Metric, *, narrow: bool = False) -> str:
        """The header for a metric."""
        unit = metric.unit if not narrow else metric.unit.replace(",", "")
        return (self.narrow_header if narrow else self.header).replace("{metric}", f"{metric.title}{unit}")

    def narrow_text(self, row: Row, *, tight: bool = False) -> str:
        """A row's cell with the line breaks of a narrow terminal; ``tight``: also within intervals."""
        text = self.text(row)
        for whole, broken in (*self.breaks, *(_TIGHT if tight else ())):
            text = text.replace(whole, broken)
        return text

    def sign(self, row: Row) -> Literal[-1, 0, 1]:
        """1 or -1 if the cell is a difference whose verdict is "helps" or "harms", else 0."""
        value = self.difference(row)
        return 0 if value is None else 1 if value.decision == "helps" else -1 if value.decision == "harms" else 0


def _value(row: Row) -> str:
    """``95.61 ± 0.78``, and how many runs diverged or failed."""
    lost = [f"{n} of {row.runs} {what}" for n, what in ((row.diverged, "diverged"), (row.failed, "failed")) if n]
    if row.mean is None:
        return f"diverged ({row.diverged} of {row.runs})" if not row.failed else f"no result ({', '.join(lost)})"
    places = decimals(row.deviation)
    text = f"{row.mean:.{places}f}" + ("" if row.deviation is None else f" ± {row.deviation:.{places}f}")
    return text if not lost else f"{text} ({', '.join(lost)})"


def _difference(value: Verdict | None) -> str:
    """``+2.08 [+1.20, +2.96]``: the mean difference with the 95 % interval."""
    return "" if value is None or value.difference is None else interval_text(value.difference, value.low, value.high)


def _in_short(verdict: Verdict) -> str:
    known = {"helps": "helps", "harms": "harms", "diverged": "diverged or failed at some seeds", "equivalent": "no difference that matters"}
    said = known.get(verdict.decision, verdict.decision)
    measured = _difference(verdict)
    return f"{said}, {measured}" if measured else said


def _beside(first: Verdict, rival: str, verdict: Verdict) -> str:
    """What a further rival leaves of a gain."""
    if first.decision != "helps" or first.gain is None or verdict.gain is None:
        return f"Against {rival}: {_in_short(verdict)}."
    places = decimals(None if first.low is None or first.high is None else (first.high - first.low) / 2)
    whole, left = f"{first.gain:.{places}f}", f"{verdict.gain:.{places}f}"
    if verdict.gain <= 0:
        share = f"nothing of these {whole} is left"
    elif verdict.gain >= first.gain or left == whole:
        share = f"all of these {whole} is left"
    else:
        share = f"{left} of these {whole} is left"
    return f"Against {rival} {share}: {_in_short(verdict)}."


def _differences(rival: str, meaning: str, difference: Callable[[Row], Verdict | None], *, field: str) -> Column:
    """The column of differences to ``rival``."""

    def order(row: Row) -> float | None:
        found = difference(row)
        return None if found is None else found.difference

    return Column(
        header=f"over plain, {rival}",
        narrow_header=f"over plain,\n{rival.replace(' ', chr(10))}",
        meaning=meaning,
        text=lambda row: _difference(difference(row)),
        fields=(field,),
        difference=difference,
        order=order,
    )


COLUMNS = (
    Column(
        header="variant",
        narrow_header="variant",
        meaning='the variant, and its penalty; "2 x epochs" marks a baseline that trains longer, for as many gradient evaluations',
        text=lambda row: row.label,
        fields=("label", "variant", "budget", "method"),
        note=lambda row: row.method,
        align="left",
        breaks=((", ", ",\n"),),
        order=lambda row: row.label,
    ),
    Column(
        header="test {metric}",
        narrow_header="test\n{metric}",
        meaning="mean ± standard deviation (n − 1) over the seeds, after the last epoch; no epoch is picked by its test value",
        text=_value,
        fields=("runs", "diverged", "failed", "mean", "deviation"),
        order=lambda row: row.mean,
    ),
    Column(
        header="at the best epoch by validation",
        narrow_header="best by\nvalid.",
        meaning="mean test value of the epochs with the best validation value, where a task logs one",
        text=lambda row: "" if row.best_mean is None else f"{row.best_mean:.{decimals(row.deviation)}f}",
        fields=("best_mean",),
        order=lambda row: row.best_mean,
    ),
    _differences(
        "equal epochs",
        "mean difference to the baseline, paired by seed, with the 95 % interval of the paired t test",
        lambda row: row.difference,
        field="difference",
    ),
    _differences(
        "equal gradients",
        "the same to the baseline that trains longer, for as many gradient evaluations",
        lambda row: row.matched_difference,
        field="matched_difference",
    ),
    _differences(
        "equal seconds",
        "the same to the baseline that trains longer, for as many seconds (`--rivals`; the ratio was measured on the machine)",
        lambda row: row.seconds_difference,
        field="seconds_difference",
    ),
    _differences(
        "stopped early",
        "the same, both at their best epoch by validation, where a task logs one",
        lambda row: row.early_difference,
        field="early_difference",
    ),
    Column(
        header="seeds, looks",
        narrow_header="seeds,\nlooks",
        meaning="of a race (`--until decided`): seeds that the row has been given, and the looks after which",
        text=lambda row: "" if row.looks is None else f"{row.runs} ({row.looks})",
        fields=("looks",),
        order=lambda row: None if row.looks is None else row.runs,
    ),
    Column(
        header="gradient evaluations",
        narrow_header="gradient\nevals",
        meaning="of a run, and in units of the baseline's",
        text=lambda row: "" if row.gradient_evaluations is None else f"{row.gradient_evaluations:g} ({row.cost:.3g} x)",
        fields=("gradient_evaluations", "cost"),
        order=lambda row: row.gradient_evaluations,
    ),
    Column(
        header="seconds",
        narrow_header="seconds",
        meaning="mean time of a run, of recipes without evaluation; workers share the machine, so read it as a ratio",
        text=lambda row: f"{row.seconds:.2f}",
        fields=("seconds",),
        order=lambda row: row.seconds,
    ),
)


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that have something to show; those of validation have not, where none is logged."""
    return [column for column in COLUMNS if any(column.text(row) for row in rows)]


def json_row(row: Row) -> dict[str, Any]:
    """A row as ``results.json`` holds it: the fields of every column, and the verdict on a row that has one."""
    values = asdict(row)
    shown = {field: values[field] for column in COLUMNS for field in column.fields}
    judged = any(column.difference(row) is not None for column in COLUMNS)
    return {**shown, "verdict": row.verdict() if judged else None}


def terminal_table(rows: Sequence[Row], metric: Metric, *, title: str, width: int) -> Table:
    """The table for a terminal of ``width`` characters; if it is narrow, intervals are on separate lines, or each number is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = shown_columns(rows)
    tight = len(columns) > 6
    wide = width >= (WIDE if tight else 110)
    if tight and not wide:
        columns = [column for column in columns if column.fields != ("seconds",)]
    caption = "mean ± sd over seeds; differences paired by seed, with 95 % intervals"
    padding = (0, 2, 0, 0) if wide else (0, 1, 0, 0) if tight else 0
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, show_edge=False, padding=padding)
    for column in columns:
        table.add_column(column.title(metric, narrow=True), justify=column.align, no_wrap=True)
    styles = {1: "green", -1: "red", 0: ""}
    for row in rows:
        texts = [column.text(row) if wide else column.narrow_text(row, tight=tight) for column in columns]
        if not wide:
            texts[0] = "\n".join(part for line in texts[0].split("\n") for part in textwrap.wrap(line, 14 if tight else 20) or [""])
        table.add_row(*(Text(text, style=styles[column.sign(row)]) for column, text in zip(columns, texts, strict=True)))
    if Console(width=10_000).measure(table).maximum <= width:
        return table
    stacked = Table(title=title, caption=caption, box=None, show_header=False, padding=(0, 1, 0, 0))
    stacked.add_column()
    stacked.add_column(justify="right", no_wrap=True)
    label, *others = shown_columns(rows)
    for row in rows:
        stacked.add_row(Text(label.text(row).replace("\n", " "), style="bold"), "")
        for column in others:
            if text := column.narrow_text(row, tight=True):
                title_of_it = " ".join(column.title(metric, narrow=True).split())
                stacked.add_row(Text(f"  {title_of_it}"), Text(text, style=styles[column.sign(row)]))
    return stacked


def markdown(rows: Sequence[Row], metric: Metric) -> str:
    """The table in Markdown."""
    columns = shown_columns(rows)
    lines = [[column.title(metric) for column in columns], ["---" if column.align == "left" else "---:" for column in columns]]
    lines += [[column.text(row).replace("|", "\\|") for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(rows: Sequence[Row], metric: Metric) -> str:
    """The table as CSV, with numbers apart from their intervals."""
    written = io.StringIO()
    differences = ("difference", "matched_difference", "seconds_difference", "early_difference")
    plain = ("label", "variant", "budget", "method", "runs", "diverged", "failed")
    plain += ("mean", "deviation", "best_mean", "gradient_evaluations", "cost", "seconds", "looks")
    ends = ("difference", "low", "high", "p_holm", "decision")
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(["metric", *plain, *(f"{name}_{end}" if end != "difference" else name for name in differences for end in ends)])
    for row in rows:
        verdicts = [getattr(row, name) for name in differences]
        writer.writerow(
            [
                metric.name,
                *(getattr(row, name) for name in plain),
                *(None if v is None else getattr(v, end) for v in verdicts for end in ends),
            ]
        )
    return written.getvalue()


def latex(rows: Sequence[Row], metric: Metric) -> str:
    """The table in LaTeX, with the rules of ``booktabs``."""
    columns = shown_columns(rows)
    special = {
        "\\": r"\textbackslash{}",
        "%": r"\%",
        "&": r"\&",
        "_": r"\_",
        "#": r"\#",
        "$": r"\$",
        "{": r"\{",
        "}": r"\}",
        "±": r"$\pm$",
        "−": "$-$",
        "^": r"\^{}",
        "~": r"\~{}",
    }

    def cell(text: str) -> str:
        return "".join(special.get(letter, letter) for letter in text)

    lines = [" & ".join(cell(column.title(metric)) for column in columns)]
    lines += [" & ".join(cell(column.text(row)) for column in columns) for row in rows]
    head, *body = (line + r" \\" for line in lines)
    alignment = "".join("l" if column.align == "left" else "r" for column in columns)
    return "\n".join([rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])
