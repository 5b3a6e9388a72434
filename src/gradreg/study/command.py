"""``gradreg compare TASK``: train every variant and seed of a recipe or of a file's task, then say whether it helped, and at what cost."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradreg import checks
from gradreg.study import task_arguments
from gradreg.study.plan import RIVALS, make_plan

DESCRIPTION = (
    "Train the variants of a recipe, or of a task in a file of your own (FILE.py, FILE.py:NAME or MODULE:NAME), and plain training with as "
    "many gradient evaluations as each, over several seeds, and report. Any key of the recipe, or option of the task, can be given for "
    "all of them, as in --epochs 30."
)
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--penalties",
        {
            "nargs": "+",
            "type": str,
            "help": "variants by name, or penalties such as sam:rho=0.1 or fgr:gamma=0.5,epsilon=0.5@lr=0.05 (all variants)",
        },
    ),
    ("--seeds", {"type": int, "default": 5, "help": "how many seeds, from the recipe's seed on"}),
    ("--rivals", {"nargs": "+", "type": str, "help": f"what to compare with: {', '.join(RIVALS)} (all but seconds)"}),
    ("--margin", {"type": float, "help": "the difference that matters, in the table's unit: verdicts then also say 'no worse'"}),
    (
        "--until",
        {"type": str, "help": "decided: add seeds to the undecided variants, up to --max-seeds; --seeds are those of the first look"},
    ),
    ("--max-seeds", {"type": int, "help": "the bound of --until decided (4 x --seeds)"}),
    ("--out", {"type": str, "help": "folder for results.json, report.html and the runs (runs/TASK)"}),
    ("--fresh", {"action": "store_true", "help": "keep what is in the folder aside, and run everything anew"}),
    ("--workers", {"type": int, "help": "worker processes (one a core; one with an accelerator; 0: in this process)"}),
)


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg compare``; returns 0, or 1 if a run failed. Interrupted, the same command runs only what is missing."""
    with ended_by_signals():
        return _compare(argv)


def _compare(argv: Sequence[str]) -> int:
    options, task = task_arguments.parse("compare", DESCRIPTION, OPTIONS, argv)
    plan = make_plan(task, options["penalties"], **_settings(options))
    if options["workers"] is not None:
        checks.whole("--workers", options["workers"], minimum=0, remedy="Leave it out for one a core.")
    folder = Path(options["out"] or f"runs/{plan.task}")
    if options["fresh"]:
        keep_aside(folder)

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from gradreg.study import results, table
    from gradreg.study.comparison import run_study

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # which the command line answers, for every command alike

    console = _Console()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}/{task.total:g}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar as progress:
        shown = progress.add_task("runs", total=1)
        shares: dict[str, float] = {}
        already = 0

        def start(planned: int, done: int, workers: int) -> None:
            nonlocal already
            already = done
            kept = f", {done} of them already there" if done else ""
            at_once = "one after the other" if workers == 0 else f"{workers} at a time"
            console.print(f"{plan.task}: {planned} runs{kept}, {at_once}", highlight=False, markup=False)
            progress.update(shown, total=max(1, planned - done))

        def advance(job: Any, share: float) -> None:
            shares[job.folder] = max(share, shares.get(job.folder, 0.0))
            progress.update(shown, completed=sum(shares.values()))

        def ended(record: Any, planned: int) -> None:
            shares[record.folder.removeprefix("runs/")] = 1.0
            progress.update(shown, total=max(1, planned - already), completed=sum(shares.values()))
            value = "diverged" if record.test is None else plan.metric.text(record.test)
            value = f"failed: {record.error}" if record.error is not None else value
            label = record.variant if record.budget == "epochs" else f"{record.variant} ({record.planned_evaluations} gradients)"
            label = label.replace(" gradients)", " gradients, equal seconds)") if record.budget == "seconds" else label
            progress.console.print(f"  {label}, seed {record.seed}: {value}, {record.seconds:.1f} s", highlight=False, markup=False)

        def measured(name: str, one: Any) -> None:
            text = f"  {name}: {one.ratio:.3g} x the seconds of {plan.baseline}, measured once (median of {len(one.rounds)} rounds)"
            progress.console.print(text, highlight=False, markup=False)

        found = run_study(
            plan,
            folder,
            workers=options["workers"],
            command=shlex.join(["gradreg", "compare", *argv]),
            on_start=start,
            on_progress=advance,
            on_record=ended,
            on_measured=measured,
        )
    title = f"{plan.task}, {results.over_seeds(plan, found.records)}"
    console.print(table.terminal_table(found.rows, plan.metric, title=title, width=console.width))
    for row in found.rows:
        if row.variant != plan.baseline:
            console.print(row.verdict(), highlight=False, markup=False, soft_wrap=True)
    if found.race is not None:
        console.print(found.race_said, highlight=False, markup=False, soft_wrap=True)
    for text in found.sharpness_said:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for text in found.warnings:
        console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(record.error is not None for record in found.records) else 0


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``make_plan``."""
    checks.whole("--seeds", options["seeds"], minimum=1, remedy="A paired interval needs 2; 5 is the default.")
    if options["margin"] is not None:
        checks.positive("--margin", options["margin"], remedy="It is the difference that matters, in the table's unit.")
    return {name: options[name] for name in ("seeds", "rivals", "margin", "until", "max_seeds")}


def keep_aside(folder: Path) -> None:
    """Rename a folder that is there, after the time, so that another can take its place."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP end the comparison and its workers as Ctrl-C does, with status 128 + the signal's number."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    try:
        before = {number: signal.signal(number, end) for number in names}
    except ValueError:  # not the main thread, which signals do not reach
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
