"""``study.compare``: train every variant and seed of a task, and say whether it helped, by how much, and at what cost."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradreg import checks, environment, files
from gradreg.study import logged, results, sharpness, table
from gradreg.study.executors.executor import Executor, ExecutorError, Site, as_executor
from gradreg.study.executors.local import LocalExecutor, refuse_where_a_worker_imports_it
from gradreg.study.functions import FunctionVariant, is_reference, load_task
from gradreg.study.plan import Job, Plan, make_plan
from gradreg.study.results import Record
from gradreg.study.running import OnProgress, measured, run_jobs
from gradreg.study.seconds import EqualSeconds
from gradreg.study.stored_plan import RESULTS, StoredPlan
from gradreg.study.table import Row
from gradreg.study.tasks import Task, Variant
from gradreg.study.urls import opened
from gradreg.study.verdicts import Verdict


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
        race: the rule and the looks of a race; None without one.
        lacking: runs that are planned by now and not there; 0 unless it is a partial one.
    """

    plan: Plan
    records: Sequence[Record]
    rows: Sequence[Row]
    environment: Mapping[str, Any]
    folder: Path
    command: str = ""
    race: Mapping[str, Any] | None = None
    lacking: int = 0

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Variant -> the verdict against the baseline at equal epochs."""
        return {row.label: row.difference for row in self.rows if row.difference is not None and row.variant != self.plan.baseline}

    @property
    def warnings(self) -> list[str]:
        """What must be known beside the table."""
        there = len(self.records)
        part = [f"partial: {there} of the {there + self.lacking} runs planned by now are there"] if self.lacking else []
        return [*part, *results.warnings(self.plan, self.records, self.race)]

    @property
    def race_said(self) -> str:
        """That seeds were added, in how many looks, and which error was spent; empty without a race."""
        return "" if self.race is None else results.race_said(self.plan, self.race["looks"])

    @property
    def sharpness(self) -> dict[str, Any] | None:
        """What the runs measured of sharpness, as in ``results.json``: means over seeds, and correlations with the metric."""
        return sharpness.measured(self.rows, self.records, self.plan.metric)

    @property
    def sharpness_said(self) -> list[str]:
        """The same in sentences, with how not to read them; empty if no run measured it."""
        return [] if (found := self.sharpness) is None else sharpness.sentences(found, self.plan.metric)

    @property
    def logged(self) -> dict[str, Any] | None:
        """What the runs logged beside the metric, as in ``results.json``: means over seeds, and differences to plain training."""
        return logged.measured(self.rows, self.records, self.plan.baseline)

    @property
    def logged_said(self) -> list[str]:
        """The same in lines; empty if no run logged anything else."""
        return [] if (found := self.logged) is None else logged.sentences(found)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return results.results(self.plan, self.records, self.environment, self.rows, self.race, self.sharpness, self.logged)

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
        return write_report(self.plan, self.rows, self.records, self.environment, folder=self.folder, command=self.command, race=self.race)

    def sentences(self) -> list[str]:
        """The verdicts in words, one for each variant."""
        return [row.verdict() for row in self.rows if row.variant != self.plan.baseline]

    def __str__(self) -> str:
        raced = [self.race_said] if self.race is not None else []
        said = [*self.sentences(), *raced, *self.logged_said, *self.sharpness_said]
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
    until: str | None = None,
    max_seeds: int | None = None,
    workers: int | None = None,
    executor: Executor | str | None = None,
    partial: bool = False,
) -> Comparison:
    """Compare penalties on a task: at equal epochs, at equal gradient evaluations and with plain training stopped early, over seeds.

    Complete runs in ``out`` are not repeated, so that an interrupted comparison resumes where it stopped.

    Args:
        task: a function decorated with ``@study.task``, or the name of one ("mine.py", "mine.py:train", "package.module:train"), or that
            of a recipe, or the path of its YAML file.
        penalties: name -> ``GradientPenalty``, None for plain training, a text such as "sam:rho=0.1", or a mapping with "penalty" and
            changed options. Or a list of such texts, which are then the names too. The baseline, plain training, is always included.
        seeds: how many, ≥ 1. A paired interval needs 2. With ``until``, those before the first look.
        out: the folder; ``runs/NAME`` by default. Or a URL that fsspec knows, such as "s3://bucket/study".
        options: options of the task that all variants share; keys of a recipe, as in ``{"optimizer.lr": 0.1}``.
        rivals: what to compare with, some of "epochs", "gradients", "seconds", "early"; all but "seconds" by default. "gradients" and
            "seconds" cost additional runs of the baseline; "seconds" first measures the variants' time on this machine, once.
        margin: the difference that matters, in the table's unit; verdicts then also say "no worse".
        until: "decided" adds seeds, one at a time, to the variants that are undecided. The chance of any false verdict is spent over the
            looks (``gradreg.study.racing.Race``). The first rival decides; the others are judged over the seeds that this gives.
        max_seeds: the bound of that; four times ``seeds`` by default. It must be chosen before the first result.
        workers: processes at a time: one a core by default, one with an accelerator. 0 runs in this process.
        executor: what carries the runs out: "local" by default, "ray", "slurm" with their usual options, the name of one of your own, or
            one with other options, such as ``RayExecutor(address="auto", run_gpus=0.5)`` (docs/many-machines.md).
        partial: run nothing, write nothing, and compare what is there, though another process may still be running the study.

    Returns:
        The comparison, which has also been written into ``out``.

    Raises:
        TypeError, ValueError: bad arguments, or a task that breaks the rules of a study (``TaskError``).
        ExecutorError: nothing can be carried out: no Ray or Slurm answers, say, or a worker has another version of gradreg or torch.
        RuntimeError: workers died; or the call stands in a script without ``if __name__ == "__main__":``.
    """
    refuse_where_a_worker_imports_it("study.compare")
    resolved = resolve_task(task)
    plan = make_plan(
        resolved.configured(options or {}), penalties, seeds=seeds, rivals=rivals, margin=margin, until=until, max_seeds=max_seeds
    )
    place = out if out is not None else Path("runs") / resolved.name
    if partial:
        return partial_study(plan, place)
    return run_study(plan, place, executor=as_executor(executor, workers))


def run_study(
    plan: Plan,
    out: Path | str,
    *,
    executor: Executor | None = None,
    command: str = "",
    on_start: Callable[[int, int, str], None] = lambda planned, done, how: None,
    on_progress: OnProgress = lambda job, share: None,
    on_queue: Callable[[int | None], None] = lambda queued: None,
    on_record: Callable[[Record, int], None] = lambda record, planned: None,
    on_measured: Callable[[str, EqualSeconds], None] = lambda name, found: None,
) -> Comparison:
    """Run what is missing of a plan in ``out``, and report.

    Args:
        plan: what is compared.
        out: the folder, or the URL, for ``results.json``, the page and the runs.
        executor: what carries the runs out; None takes one process a core.
        command: the command line that asked for it.
        on_start: told how many runs are planned, how many of them are complete, and how the others will be carried out.
        on_progress: told which share of a run is done.
        on_queue: told how many runs have been handed over and have not begun.
        on_record: told of every run that ends, and of how many are planned by now.
        on_measured: told of every variant whose seconds were measured, for the rival at equal seconds.
    """
    executor = usable(plan.task, list(plan.variants.values()), executor or LocalExecutor())
    with opened(out) as (folder, mirror):
        plain = plan.variants[plan.baseline]
        site = Site(folder.resolve(), None if mirror is None else mirror.url, plain.code, plan.task, plain.imports)
        found = _Found(plan, folder / "runs", reading=mirror is not None)
        stored = StoredPlan.of(folder, plan)
        plan = found.plan = stored.timed(plan)
        records, missing = found.records, found.missing()
        stored.take_looks(plan, records)
        on_start(len(missing) + len(records), len(records), executor.describe(len(missing)))
        while missing or plan.unmeasured(records):
            place = site.folder / "runs" if mirror is None else f"{mirror.url}/runs"
            carried = run_jobs(found.missing, place, executor=executor, site=site, on_progress=on_progress, on_queue=on_queue)
            with contextlib.closing(carried) as ended_runs:
                for job, ended in ended_runs:
                    if mirror is not None:
                        mirror.fetch(f"runs/{job.folder}")
                    records[job.folder] = record = Record.of(job, ended, plan.metric)
                    stored.take_looks(plan, records)
                    if mirror is not None:
                        mirror.push()
                    on_record(record, len(plan.jobs(records)))
            untimed = plan.unmeasured(records)
            for name in untimed:  # while no run is under way
                sides = [(plan.variants[one], *(plan.cost(one, records) or (0, 0.0))) for one in (plan.baseline, name)]
                stored.seconds = {**stored.seconds, name: measured(name, *sides, plan.seeds[0], executor=executor, site=site)}
                stored.write()
                on_measured(name, stored.seconds[name])
            if untimed:
                plan = found.plan = replace(plan, seconds=stored.seconds)
            missing = found.missing()
        stored.take_looks(plan, records)  # those too whose last results were there already
        comparison = _compared(plan, records, folder, command, stored.found())
        comparison.report()
    return comparison


def partial_study(plan: Plan, out: Path | str) -> Comparison:
    """What is there of a study by now, which another process may still be running; nothing is run or written.

    Raises:
        ValueError: no run of it is complete.
    """
    with opened(out, reading=True) as (folder, _):
        found = _Found(plan, folder / "runs", reading=True)
        stored = StoredPlan.of(folder, plan, reading=True)
        plan = found.plan = stored.timed(plan)
        missing = found.missing()
        if not found.records:
            raise ValueError(f"--partial needs a complete run; got none in {str(out)!r}. Wait for one, or correct --out.")
        looks = plan.standing(found.records)
        race = stored.found() if looks is None or looks.looks else None
        comparison = _compared(plan, found.records, folder, "", race)
        return replace(comparison, lacking=len(missing))


class _Found:
    """The runs of a plan that are complete in its folder.

    Args:
        plan: what is compared.
        runs: the folder of its runs.
        reading: whether nothing may be moved in it.
    """

    def __init__(self, plan: Plan, runs: Path, *, reading: bool = False) -> None:
        self.plan, self.records, self._reading = plan, dict[str, Record](), reading
        self._runs, self._looked_at = runs, set[str]()

    def missing(self) -> Sequence[Job]:
        """What is needed and not there, looking into the folders of jobs that became known just now."""
        jobs = self.plan.jobs(self.records)
        for job in jobs:
            if job.folder not in self._looked_at:
                self._looked_at.add(job.folder)
                place = self._place(job)
                ended = job.variant.result(place, job.seed, job.stretch) if place.is_dir() else None
                if ended is not None:
                    self.records[job.folder] = Record.of(job, ended, self.plan.metric)
        known = self.plan.jobs(self.records)
        return self.missing() if len(known) > len(jobs) else [job for job in known if job.folder not in self.records]

    def _place(self, job: Job) -> Path:
        """The folder of a run, which is put there if it lies where an earlier version, or a smaller plan, had it."""
        place = self._runs / job.folder
        for other in job.other_folders:
            before = self._runs / other
            if before.is_dir() and not place.exists():
                if self._reading:
                    return before
                place.parent.mkdir(parents=True, exist_ok=True)
                before.rename(place)
        return place


def _compared(plan: Plan, records: Mapping[str, Record], folder: Path, command: str, race: Mapping[str, Any] | None) -> Comparison:
    found = [records[job.folder] for job in plan.jobs(records) if job.folder in records]
    if all(record.error is not None for record in found):
        raise RuntimeError(
            f"every run failed, the first with {found[0].error}. Its traceback is in {folder / found[0].folder / 'error.txt'}."
        )
    return Comparison(plan, found, results.rows(plan, found), environment_of(folder, found), folder, command, race)


def usable(task: str, variants: Sequence[Variant], executor: Executor) -> Executor:
    """``executor``; for a task that another process cannot import the local one without processes, with a warning.

    Raises:
        ExecutorError: such a task, for an executor that needs other processes.
    """
    held = any(isinstance(variant, FunctionVariant) and variant.reference.held is not None for variant in variants)
    if not held or not executor.elsewhere:
        return executor
    if executor.name != "local":
        raise ExecutorError(
            f"task {task!r} must have a file that a worker can import it from; got a function of a notebook, or one inside another. Put it "
            f"into a file of its own to run it with executor={executor.name!r}."
        )
    warnings.warn(
        f"task {task!r} has no file that a worker could import it from, as in a notebook or inside a function: its runs follow "
        "one another in this process. Put it into a file of its own to run several at a time.",
        stacklevel=4,
    )
    return LocalExecutor(workers=0)


def environment_of(folder: Path, records: Sequence[Record]) -> dict[str, Any]:
    """Where the runs ran: as the first of them has written it, else this process's own."""
    for record in records:
        file = folder / record.folder / "environment.json"
        if file.is_file():
            return files.read_json(file, holds="where a run ran", remedy="Remove the file.")
    return environment.describe()


def resolve_task(task: Any) -> Task:
    """The task that an argument names: a task itself, the name of a function's, or of a recipe.

    Raises:
        TypeError, ValueError: something else, or a name of none.
    """
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
