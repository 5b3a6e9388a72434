"""``gradreg tune TASK``: search the strength of a penalty, and plain training as much, then compare the winners with fresh seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradreg.study import task_arguments
from gradreg.study.command import begin_afresh, ended_by_signals
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
    ("--fresh", {"action": "store_true", "help": "keep what is in the folder aside, and search again"}),
    *command_options(),
    (
        "--probe",
        {
            "action": "store_true",
            "help": "instead of a search: one run of the first epochs, which measures the alignment of the two gradients over radii and "
            "recommends a start and a range for the search; for each --penalty",
        },
    ),
    ("--probe-share", {"type": float, "default": 0.1, "help": "share of the training that is probed, at least an epoch"}),
    ("--alignment", {"type": float, "default": 0.95, "help": "alignment at the start that the probe recommends"}),
)
_OF_SEARCH = ("--search", "--trials", "--seeds", "--confirm", "--storage", "--fresh", "--workers")
_OF_PROBE = ("--probe-share", "--alignment")


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg tune``; returns 0. Interrupted, the same command resumes where it stopped."""
    with ended_by_signals():
        return _tune(argv)


def _tune(argv: Sequence[str]) -> int:
    options, task = task_arguments.parse("tune", DESCRIPTION, OPTIONS, argv)
    given = [word.partition("=")[0] for word in argv]
    unused = [option for option in (_OF_SEARCH if options["probe"] else _OF_PROBE) if option in given]
    if unused:
        rule = "be left out with --probe, which searches nothing" if options["probe"] else "go with --probe"
        raise ValueError(f"{unused[0]} must {rule}; got it {'with' if options['probe'] else 'without'} that. Remove one of them.")
    if options["probe"]:
        return _probe(options, task)

    from gradreg.study.tuning import plan_search, run_search, search_folder

    sides = arms(task, options["penalty"], parse_search(options["search"]))
    search = plan_search(task, sides, trials=options["trials"], seeds=options["seeds"], confirm=options["confirm"])
    executor = from_command(options)
    folder = search_folder(options["out"], task)
    if options["fresh"]:
        begin_afresh(folder)

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


def _probe(options: dict[str, Any], task: Any) -> int:
    """Probe each penalty, print its curve and what it says, and write ``probe.json``."""
    from rich.console import Console
    from rich.table import Table

    from gradreg import files
    from gradreg.study.probing import RESULTS, SCHEMA, probe

    console = Console()
    folder = Path(options["out"] or f"runs/{task.name}-probe")
    files.make_directory(folder, purpose="--out")
    found = []
    for text in dict.fromkeys(options["penalty"]):
        one = probe(task, penalty=text, share=options["probe_share"], alignment=options["alignment"])
        found.append(one)
        console.print(
            f"{task.name}, {text}: the two gradients in the second half of the probe", highlight=False, markup=False, soft_wrap=True
        )
        table = Table()
        for header in (one.argument, "alignment", "nonlinearity"):
            table.add_column(header, justify="right")
        for radius, cosine, nonlinearity in one.curve():
            table.add_row(f"{radius:g}", f"{cosine:.3f}", "" if nonlinearity != nonlinearity else f"{nonlinearity:+.2f}")
        console.print(table)
        for sentence in one.sentences():
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    files.write_json(folder / RESULTS, {"schema": SCHEMA, "task": task.name, "probes": [one.to_dict() for one in found]})
    console.print(f"numbers: {folder / RESULTS}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _ended(task: Any, one: Any) -> str:
    seeds = f"{len(one.scores)} seed{'' if len(one.scores) == 1 else 's'}"
    if one.state == "failed":
        return f"failed: {one.error}"
    if one.mean is None:
        return f"diverged, {seeds}"
    return f"{task.metric.text(one.mean)} on validation, {seeds}{', dropped' if one.state == 'dropped' else ''}"
