"""What ``gradreg compare`` shows while it runs: all runs in one bar with the time left, those under way below it, and what has ended."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gradreg.study.plan import Job, Plan
from gradreg.study.results import Record
from gradreg.study.seconds import EqualSeconds

_SHOWN = 8
"""How many of the runs that are under way have a line of their own."""


class Display:
    """The progress of a study; without a terminal it prints only what has ended.

    Args:
        plan: what is compared.
        console: to print on.
    """

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan, self._console = plan, console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._all = self._bar.add_task("runs", total=1, done="", note="")
        self._lines: dict[str, TaskID] = {}
        self._shares: dict[str, float] = {}
        self._ended: set[str] = set()
        self._already = 0
        self._queued: int | None = None

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for line in self._lines.values():
            self._bar.remove_task(line)
        self._bar.stop()

    def start(self, planned: int, done: int, how: str) -> None:
        """Told how many runs are planned, how many are there, and how the others will be carried out."""
        self._already = done
        kept = f", {done} of them already there" if done else ""
        self._say(f"{self._plan.task}: {planned} runs{kept}, {how}")
        self._update(planned - done)

    def advance(self, job: Job, share: float) -> None:
        """Told which share of a run is done."""
        if job.folder in self._ended:
            return
        self._shares[job.folder] = max(share, self._shares.get(job.folder, 0.0))
        line = self._lines.get(job.folder)
        if line is None and len(self._lines) < _SHOWN and self._console.is_terminal:
            line = self._lines[job.folder] = self._bar.add_task(f"  {job.name}, seed {job.seed}", total=1.0, done="", note="")
        if line is not None:
            self._bar.update(line, completed=self._shares[job.folder], done=f"{100 * self._shares[job.folder]:.0f} %")
        self._update()

    def queued(self, count: int | None) -> None:
        """Told how many runs have been handed over and have not begun."""
        if count != self._queued:
            self._queued = count
            self._update()

    def ended(self, record: Record, planned: int) -> None:
        """Told of every run that ends, and of how many are planned by now."""
        plan, folder = self._plan, record.folder.removeprefix("runs/")
        self._ended.add(folder)
        self._shares[folder] = 1.0
        if (line := self._lines.pop(folder, None)) is not None:
            self._bar.remove_task(line)
        self._update(planned - self._already)
        value = "diverged" if record.test is None else plan.metric.text(record.test)
        value = f"failed: {record.error}" if record.error is not None else value
        label = record.variant if record.budget == "epochs" else f"{record.variant} ({record.planned_evaluations} gradients)"
        label = label.replace(" gradients)", " gradients, equal seconds)") if record.budget == "seconds" else label
        self._say(f"  {label}, seed {record.seed}: {value}, {record.seconds:.1f} s")

    def measured(self, name: str, one: EqualSeconds) -> None:
        """Told of a variant whose seconds were measured."""
        self._say(f"  {name}: {one.ratio:.3g} x the seconds of {self._plan.baseline}, measured once (median of {len(one.rounds)} rounds)")

    def _update(self, total: int | None = None) -> None:
        given: dict[str, Any] = {} if total is None else {"total": max(1, total)}
        done = sum(self._shares.values())
        under_way = len(self._shares) - len(self._ended)
        note = ", ".join([*([f"{under_way} under way"] if under_way else []), *([f"{self._queued} queued"] if self._queued else [])])
        self._bar.update(self._all, completed=done, **given)
        whole = self._bar.tasks[0].total or 1
        self._bar.update(self._all, done=f"{done:.1f}/{whole:g}", note=note)

    def _say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)
