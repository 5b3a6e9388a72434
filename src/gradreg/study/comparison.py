"""``study.compare``: train every variant and seed of a task, and say whether it helped, by how much, and at what cost."""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradreg import checks, environment, files
from gradreg.folders import locked
from gradreg.study import results, table
from gradreg.study.functions import FunctionVariant, is_reference, load_task
from gradreg.study.plan import Job, Plan, make_plan
from gradreg.study.results import Record
from gradreg.study.table import Row
from gradreg.study.tasks import Task
from gradreg.study.verdicts import Verdict
from gradreg.study.workers import OnProgress, default_workers, run_jobs

RESULTS = "results.json"


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Args:
        plan: what was compared.
        records: the runs.
        rows: the table: a row for each variant, and for each longer baseline.
        environment: where the runs ran.
        folder: where ``results.json``, the page and the runs are.
        command: the command line that made it, if one did.
    """

    plan: Plan
    records: Sequence[Record]
    rows: Sequence[Row]
    environment: Mapping[str, Any]
    folder: Path
    command: str = ""

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Variant -> the verdict against the baseline at equal epochs."""
        return {row.label: row.difference for row in self.rows if row.difference is not None and row.variant != self.plan.baseline}

    @property
    def warnings(self) -> list[str]:
        """What must be known beside the table."""
        return results.warnings(self.plan, self.records)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return results.results(self.plan, self.records, self.environment, self.rows)

    def to_frame(self) -> Any:
        """The runs as a ``pandas.DataFrame``, a row each, with the columns of ``runs`` in ``results.json``.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame([record.to_dict(self.plan.metric) for record in self.records])

    def markdown(self) -> str:
        """The table in Markdown."""
        return table.markdown(self.rows, self.plan.metric)

    def csv(self) -> str:
        """The table as CSV."""
        return table.comma_separated(self.rows, self.plan.metric)

    def latex(self) -> str:
        """The table in LaTeX."""
        return table.latex(self.rows, self.plan.metric)

    def report(self) -> Path:
        """Write ``results.json``, the page and the table's exports into ``folder``; returns the page's path."""
        from gradreg.study.report import write_report

        files.write_json(self.folder / RESULTS, self.to_dict())
        for suffix, text in (("md", self.markdown()), ("csv", self.csv()), ("tex", self.latex())):
            files.write_text(self.folder / f"table.{suffix}", text)
        return write_report(self.plan, self.rows, self.records, self.environment, folder=self.folder, command=self.command)

    def __str__(self) -> str:
        said = [row.verdict() for row in self.rows if row.variant != self.plan.baseline]
        return "\n".join([self.markdown(), *said, *(f"warning: {text}" for text in self.warnings)])


def compare(
    task: Task | Callable[..., Any] | str,
    *,
    penalties: Mapping[str, Any] | Sequence[str] | None = None,
    seeds: int = 5,
    out: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    rivals: Sequence[str] | None = None,
    margin: float | None = None,
    workers: int | None = None,
) -> Comparison:
    """Compare penalties on a task: at equal epochs, at equal gradient evaluations and with plain training stopped early, over seeds.

    Complete runs in ``out`` are not repeated, so that an interrupted comparison goes on where it stopped.

    Args:
        task: a function decorated with ``@study.task``, or the name of one ("mine.py", "mine.py:train", "package.module:train"), or that
            of a recipe, or the path of its YAML file.
        penalties: name -> ``GradientPenalty``, None for plain training, a text such as "sam:rho=0.1", or a mapping with "penalty" and
            changed options. Or a list of such texts, which are then the names too. The baseline, plain training, is always included.
        seeds: how many, ≥ 1. A paired interval needs 2.
        out: the folder; ``runs/NAME`` by default.
        options: options of the task that all variants share; keys of a recipe, as in ``{"optimizer.lr": 0.1}``.
        rivals: what to compare with, some of "epochs", "gradients", "early"; all by default. "gradients" costs additional runs of the
            baseline.
        margin: the difference that matters, in the table's unit; verdicts then also say "no worse".
        workers: processes at a time: one a core by default, one with an accelerator. 0 runs in this process.

    Returns:
        The comparison, which has also been written into ``out``.

    Raises:
        TypeError, ValueError: bad arguments, or a task that breaks the rules of a study (``TaskError``).
        RuntimeError: a worker died; or the call stands in a script without ``if __name__ == "__main__":``.
    """
    if multiprocessing.parent_process() is not None and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            'study.compare must stand under if __name__ == "__main__": in a script, because its workers import the script; got a call by a '
            "worker while it imports it."
        )
    resolved = _resolved(task)
    plan = make_plan(resolved.configured(options or {}), penalties, seeds=seeds, rivals=rivals)
    if margin is not None:
        checks.positive("margin", margin, remedy="It is the difference that matters, in the table's unit.")
    folder = Path(out) if out is not None else Path("runs") / resolved.name
    return run_study(plan, folder, workers=workers, margin=margin)


def run_study(
    plan: Plan,
    folder: Path,
    *,
    workers: int | None = None,
    margin: float | None = None,
    command: str = "",
    on_start: Callable[[int, int, int], None] = lambda planned, done, workers: None,
    on_progress: OnProgress = lambda job, share: None,
    on_record: Callable[[Record, int], None] = lambda record, planned: None,
) -> Comparison:
    """Run what is missing of a plan in ``folder``, and report.

    Args:
        plan: what is compared.
        folder: for ``results.json``, the page and the runs.
        workers: processes at a time; None takes one a core.
        margin: the difference that matters.
        command: the command line that asked for it.
        on_start: told how many runs are planned, how many of them are complete, and how many will run at a time.
        on_progress: told which share of a run is done.
        on_record: told of every run that ends, and of how many are planned by now.
    """
    if workers is not None:
        checks.whole("workers", workers, minimum=0, remedy="Leave it out for one a core.")
    if workers != 0 and any(isinstance(v, FunctionVariant) and v.reference.held is not None for v in plan.variants.values()):
        warnings.warn(
            f"task {plan.task!r} has no file that a worker could import it from, as in a notebook or inside a function: its runs follow "
            "one another in this process. Put it into a file of its own to run several at a time.",
            stacklevel=3,
        )
        workers = 0
    with locked(folder, purpose="--out"):
        runs = folder / "runs"
        records: dict[str, Record] = {}

        def pending() -> Sequence[Job]:
            """What is needed and not there, looking into the folders of jobs that became known just now."""
            jobs = plan.jobs(records)
            for job in jobs:
                if job.folder not in looked_at:
                    looked_at.add(job.folder)
                    ended = job.variant.result(runs / job.folder, job.seed, job.stretch) if (runs / job.folder).is_dir() else None
                    if ended is not None:
                        records[job.folder] = Record.of(job, ended, plan.metric)
            known = plan.jobs(records)
            return pending() if len(known) > len(jobs) else [job for job in known if job.folder not in records]

        looked_at: set[str] = set()
        missing = pending()
        count = min(default_workers(), max(1, len(missing))) if workers is None else workers
        on_start(len(missing) + len(records), len(records), count)
        if missing:
            with contextlib.closing(run_jobs(pending, runs, workers=count, on_progress=on_progress)) as ended_runs:
                for job, ended in ended_runs:
                    records[job.folder] = record = Record.of(job, ended, plan.metric)
                    on_record(record, len(plan.jobs(records)))
        found = [records[job.folder] for job in plan.jobs(records) if job.folder in records]
        if all(record.error is not None for record in found):
            raise RuntimeError(
                f"every run failed, the first with {found[0].error}. Its traceback is in {folder / found[0].folder / 'error.txt'}."
            )
        comparison = Comparison(plan, found, results.rows(plan, found, margin=margin), environment_of(folder, found), folder, command)
        comparison.report()
    return comparison


def environment_of(folder: Path, records: Sequence[Record]) -> dict[str, Any]:
    """Where the runs ran: as the first of them has written it, else this process's own."""
    for record in records:
        file = folder / record.folder / "environment.json"
        if file.is_file():
            return files.read_json(file, holds="where a run ran", remedy="Remove the file.")
    return environment.describe()


def _resolved(task: Any) -> Task:
    if isinstance(task, Task):
        return task
    if isinstance(task, str) and is_reference(task):
        return load_task(task)
    if isinstance(task, str):
        from gradreg.train import recipe  # a task like any other, which needs more packages than most
        from gradreg.train.task import RecipeTask

        return RecipeTask(recipe.load(task))
    if callable(task):
        name = getattr(task, "__name__", "the function")
        raise TypeError(
            f"task must be decorated with @study.task; got the plain function {name}. Write @study.task(metric='accuracy') above it."
        )
    raise TypeError(f"task must be a function decorated with @study.task, or a name; got {checks.describe(task)}.")
