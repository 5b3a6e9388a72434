"""``gradreg compare TASK``: train every variant and seed of a recipe or of a file's task, then say whether it helped, and at what cost."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradreg import checks
from gradreg.folders import keep_aside
from gradreg.study import task_arguments
from gradreg.study.executors.executor import command_options, from_command
from gradreg.study.plan import RIVALS, make_plan
from gradreg.study.urls import is_url

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
    ("--out", {"type": str, "help": "folder, or URL such as s3://bucket/study, for results.json, report.html and the runs (runs/TASK)"}),
    ("--fresh", {"action": "store_true", "help": "keep what is in the folder aside, and run everything again"}),
    ("--partial", {"action": "store_true", "help": "run nothing and print what is there, of a study that is still running, say"}),
    *command_options(),
)


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg compare``; returns 0, or 1 if a run failed. Interrupted, the same command runs only what is missing."""
    with ended_by_signals():
        return _compare(argv)


def _compare(argv: Sequence[str]) -> int:
    options, task = task_arguments.parse("compare", DESCRIPTION, OPTIONS, argv)
    plan = make_plan(task, options["penalties"], **_settings(options))
    executor = from_command(options)
    out = options["out"] or f"runs/{plan.task}"
    if options["fresh"]:
        begin_afresh(out)

    from rich.console import Console

    from gradreg.study import results, table
    from gradreg.study.comparison import partial_study, run_study
    from gradreg.study.display import Display

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # which the command line answers, for every command alike

    console = _Console()
    if options["partial"]:
        found = partial_study(plan, out)
    else:
        with Display(plan, console) as display:
            found = run_study(
                plan,
                out,
                executor=executor,
                command=shlex.join(["gradreg", "compare", *argv]),
                on_start=display.start,
                on_progress=display.advance,
                on_queue=display.queued,
                on_record=display.ended,
                on_measured=display.measured,
            )
    title = f"{plan.task}, {results.over_seeds(plan, found.records)}"
    console.print(table.terminal_table(found.rows, plan.metric, title=title, width=console.width))
    for row in found.rows:
        if row.variant != plan.baseline:
            console.print(row.verdict(), highlight=False, markup=False, soft_wrap=True)
    if found.race is not None:
        console.print(found.race_said, highlight=False, markup=False, soft_wrap=True)
    for text in found.logged_said:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for text in found.sharpness_said:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for text in found.warnings:
        console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)
    if not options["partial"]:
        console.print(f"report: {out.rstrip('/')}/report.html", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(record.error is not None for record in found.records) else 0


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``make_plan``."""
    checks.whole("--seeds", options["seeds"], minimum=1, remedy="A paired interval needs 2; 5 is the default.")
    if options["margin"] is not None:
        checks.positive("--margin", options["margin"], remedy="It is the difference that matters, in the table's unit.")
    return {name: options[name] for name in ("seeds", "rivals", "margin", "until", "max_seeds")}


def begin_afresh(out: Path | str) -> None:
    """Keep a folder that is there aside.

    Raises:
        ValueError: a URL.
        FolderInUse: another process writes it.
    """
    if is_url(str(out)):
        raise ValueError(f"--fresh must go with a folder, which is renamed; got {str(out)!r}. Name another --out.")
    keep_aside(Path(out), purpose="--out")


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
