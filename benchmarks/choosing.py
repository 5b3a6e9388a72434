"""What the scripts behind docs/choosing.md share: where results and figures lie, their options, and running only what is missing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gradreg import files
from gradreg.study.executors.local import LocalExecutor, default_workers
from gradreg.study.plan import Job
from gradreg.study.running import run_jobs
from gradreg.train import recipe as recipes
from gradreg.train.run_folder import RunFolder

RESULTS = Path(__file__).parent / "results" / "choosing"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"

Measure = Callable[[str, int, str | None, Path, int], dict[str, Any]]
"""The content of a task's results, from the task, the number of seeds, the folder of the data sets, that of the runs, and workers."""


def base_of(recipe: recipes.Recipe, root: str | None) -> dict[str, Any]:
    """The settings of all variants, with the data sets in ``root`` if it is given."""
    return recipe.base if root is None else recipes.merge(recipe.base, {"data": {"root": root}})


def run_missing(jobs: Iterable[Job], runs: Path, workers: int) -> None:
    """Run the jobs that are not complete under ``runs``."""
    missing = [job for job in jobs if RunFolder(runs / job.folder).result() is None]
    for job, result in run_jobs(lambda: missing, runs, executor=LocalExecutor(workers=workers)):
        print(job.folder, result.get("test_accuracy", result.get("error")), flush=True)


def store(name: str, content: dict[str, Any]) -> None:
    """Write the results ``name``."""
    files.make_directory(RESULTS, purpose="results")
    files.write_json(RESULTS / f"{name}.json", content)


def show(name: str, table: str) -> None:
    """Print the table of the results ``name`` and write it beside them, where docs/tables.py finds it."""
    print(table)
    files.write_text(RESULTS / f"{name}.md", table + "\n")


def stored(name: str) -> dict[str, Any]:
    """Read the results ``name``."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def save(figure: Figure, name: str, dpi: int = 90) -> None:
    """Write the figure ``name``."""
    files.make_directory(FIGURES, purpose="figures")
    figure.savefig(FIGURES / f"{name}.png", dpi=dpi)


def found_by_command(
    kind: str, description: str | None, measure: Measure, *, task_help: str, tasks: Collection[str] | None = None
) -> dict[str, Any]:
    """Read the command line, measure unless told not to, and return the task's results of this ``kind``, which are then stored.

    Args:
        kind: of results: they are called ``KIND-TASK``, and the runs lie in ``runs/choosing-KIND/TASK``.
        description: the documentation of the command.
        measure: what is done without ``--figure``.
        task_help: what the task must be.
        tasks: those that there are; None: any recipe.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tasks, help=task_help)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--runs", type=Path, help=f"folder of the runs (runs/choosing-{kind}/TASK)")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--figure", action="store_true", help="only draw and print what is stored")
    options = parser.parse_args()
    name = f"{kind}-{options.task}"
    if not options.figure:
        runs = options.runs or Path(f"runs/choosing-{kind}") / options.task
        store(name, measure(options.task, options.seeds, options.root, runs, options.workers))
    return stored(name)
