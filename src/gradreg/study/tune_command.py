"""``gradreg tune TASK``: search the strength of a penalty, and plain training as much, then compare the winners with fresh seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from gradreg.study import task_arguments
from gradreg.study.command import ended_by_signals, keep_aside
from gradreg.study.executors.executor import command_options, from_command
from gradreg.study.search_space import SYNTAX, arms, parse_search

DESCRIPTION = (
    "Search the strength of a penalty on a recipe, or on a task in a file of your own (FILE.py, FILE.py:NAME or MODULE:NAME), and plain "
    "training with as many trials; then compare the winners with fresh seeds. Selected on validation, judged on test. Any key of the "
    "recipe, or option of the task, can be given for all runs, as in --epochs 30."
)
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--penalty",
        {
            "nargs": "+",
            "type": str,
            "default": ["fgr"],
            "help": "one or several, such as sam or gnp:alpha=0.5; strengths left out are searched",
        },
    ),
    ("--search", {"nargs": "+", "type": str, "default": [], "help": f"what to search beside them, of both sides. {SYNTAX}"}),
    ("--trials", {"type": int, "default": 20, "help": "configurations of each side"}),
    ("--seeds", {"type": int, "default": 3, "help": "seeds of a complete trial; one that is behind is dropped earlier"}),
    ("--confirm", {"type": int, "default": 5, "help": "fresh seeds of the comparison of the winners"}),
    (
        "--storage",
        {
            "type": str,
            "help": "where trials are kept and shared: memory, journal:FILE, sqlite:///FILE, postgresql://... (a journal in --out)",
        },
    ),
    ("--out", {"type": str, "help": "folder for search.json, search.html and the runs (runs/TASK-search)"}),
    ("--fresh", {"action": "store_true", "help": "keep what is in the folder aside, and search anew"}),
    *command_options(),
)


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg tune``; returns 0. Interrupted, the same command goes on where it stopped."""
    with ended_by_signals():
        return _tune(argv)


def _tune(argv: Sequence[str]) -> int:
    options, task = task_arguments.parse("tune", DESCRIPTION, OPTIONS, argv)

    from gradreg.study.tuning import plan_search, run_search, search_folder

    sides = arms(task, options["penalty"], parse_search(options["search"]))
    search = plan_search(task, sides, trials=options["trials"], seeds=options["seeds"], confirm=options["confirm"])
    executor = from_command(options)
    folder = search_folder(options["out"], task)
    if options["fresh"]:
        keep_aside(folder)

    from rich.console import Console

    from gradreg.study import table

    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    names = " and ".join(arm.name for arm in search.searched)
    say(f"{task.name}: {search.trials} trials each of {names}, {len(search.seeds)} seeds at most")
    found = run_search(
        search,
        folder,
        storage=options["storage"],
        executor=executor,
        command=shlex.join(["gradreg", "tune", *argv]),
        on_trial=lambda one: say(f"  {one.arm} {one.number}: {one.shown_values()}: {_ended(task, one)}"),
        on_record=lambda record, planned: say(f"  confirmed {record.variant}, seed {record.seed}, {record.seconds:.1f} s"),
    )
    for sentence in found.sentences():
        say(sentence)
    if found.comparison is not None:
        plan = found.comparison.plan
        title = f"{plan.task}, {len(plan.seeds)} fresh seeds"
        console.print(table.terminal_table(found.comparison.rows, plan.metric, title=title, width=console.width))
        for sentence in found.comparison.sentences():
            say(sentence)
    for text in found.warnings:
        say(f"warning: {text}")
    say(f"report: {folder / 'search.html'}")
    return 0


def _ended(task: Any, one: Any) -> str:
    seeds = f"{len(one.scores)} seed{'' if len(one.scores) == 1 else 's'}"
    if one.state == "failed":
        return f"failed: {one.error}"
    if one.mean is None:
        return f"diverged, {seeds}"
    return f"{task.metric.text(one.mean)} on validation, {seeds}{', dropped' if one.state == 'dropped' else ''}"
