"""``gradreg compare RECIPE``: train every variant and seed, then say whether it helped, by how much, and at what cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from gradreg import checks, files
from gradreg.study.plan import make_plan
from gradreg.train import recipe as recipes
from gradreg.train.arguments import CommandParser

DEFAULT_RECIPE = "digits-noisy-labels"
DESCRIPTION = (
    "Train the variants of a recipe, and plain training with as many gradient evaluations as each, over several seeds, and report. "
    "Any key of the recipe can be overridden for all of them, as in --epochs 30."
)


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg compare``; returns 0. Interrupted, the same command runs only what is missing."""
    parser = CommandParser("compare", DESCRIPTION, default_recipe=DEFAULT_RECIPE)
    parser.add("--penalties", nargs="+", type=str, help="names of the recipe's variants to compare (all of them)")
    parser.add("--seeds", type=int, default=5, help="how many seeds, from the recipe's seed on")
    parser.add("--out", type=str, help="folder for results.json, report.html and the runs (runs/RECIPE)")
    parser.add("--workers", type=int, help="worker processes (one a core; one with an accelerator)")
    options = parser.parse(argv)
    if options["workers"] is not None:
        checks.whole("--workers", options["workers"], minimum=1, remedy="Leave it out for one a core.")
    recipe = recipes.load(options["recipe"])
    plan = make_plan(recipe, parser.settings(argv, recipe.base), penalties=options["penalties"], seeds=options["seeds"])

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from gradreg.study import report, results, table, workers
    from gradreg.train.run_folder import ENVIRONMENT, RunFolder

    folder = Path(options["out"] or f"runs/{recipe.name}")
    files.make_directory(folder, purpose="--out")
    done: dict[str, results.Run] = {}
    for job in plan.jobs:
        run_folder = RunFolder(folder / "runs" / job.folder)
        run_folder.check_free_for(job.config)
        ended = run_folder.result()
        if ended is not None:
            done[job.folder] = results.Run.of(job, ended)
    missing = [job for job in plan.jobs if job.folder not in done]

    console = Console()
    count = options["workers"] or min(workers.default_workers(), max(1, len(missing)))
    kept = f", {len(done)} of them already there" if done else ""
    console.print(f"{recipe.name}: {len(plan.jobs)} runs{kept}, {count} at a time", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("epochs", total=sum(job.config.epochs for job in missing))
        finished = workers.run_jobs(missing, folder / "runs", workers=count, on_epoch=lambda: progress.advance(task)) if missing else ()
        for job, ended in finished:
            run = done[job.folder] = results.Run.of(job, ended)
            accuracy = "diverged" if run.test_accuracy is None else f"{100 * run.test_accuracy:.2f} %"
            label = run.variant if run.budget == "epochs" else f"{run.variant} ({run.planned_evaluations} gradients)"
            progress.console.print(f"  {label}, seed {run.seed}: {accuracy}, {run.seconds:.1f} s", highlight=False, markup=False)

    runs = [done[job.folder] for job in plan.jobs]
    environment = json.loads((folder / runs[0].folder / ENVIRONMENT).read_text(encoding="utf-8"))
    found = results.rows(plan, runs)
    files.write_json(folder / "results.json", results.results(plan, runs, environment))
    page = report.write_report(plan, found, runs, environment, folder=folder, command=shlex.join(["gradreg", "compare", *argv]))
    console.print(table.terminal_table(found, title=f"{recipe.name}, {len(plan.seeds)} seeds", width=console.width))
    for row in found:
        if row.variant != plan.baseline:
            console.print(row.verdict(), highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
    return 0
