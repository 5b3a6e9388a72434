"""Runs on any executor: complete ones are not repeated, one whose process died is begun again, and one that dies three times has failed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from gradreg import files
from gradreg.study.executors.executor import Ended, Executor, ExecutorError, Site, Work
from gradreg.study.functions import ERROR
from gradreg.study.job_run import JobRun, passing
from gradreg.study.plan import Job
from gradreg.study.seconds import EqualSeconds, Side, Timed, measure
from gradreg.study.tasks import TaskError, Variant
from gradreg.study.urls import is_url

DEATHS = 3
"""A run whose process has died so often by itself has failed."""
LOSSES = 10
"""The same of runs whose machine was lost, or taken for something else."""
_LINES = 5
"""Last lines of a run that died which its error repeats; its folder has more."""
_FRAME = re.compile(r"\[.* E .*\] logging\.cc|PC: @|@ |\*\*\* SIG")
"""Lines of a stack outside Python, which no reader of a table can use."""
_POLL = 0.1

OnProgress = Callable[[Job, float], None]


def run_jobs(
    jobs: Callable[[], Sequence[Job]],
    runs: Path | str,
    *,
    executor: Executor,
    site: Site | None = None,
    on_progress: OnProgress = lambda job, share: None,
    on_queue: Callable[[int | None], None] = lambda queued: None,
) -> Generator[tuple[Job, dict[str, Any]]]:
    """Run jobs, yielding each with its result as it completes; of one that failed the result is ``{"error": its last line}``.

    Args:
        jobs: what to run; asked again after every completed run, because results may call for more.
        runs: the folder, or the URL, under which each job has its own.
        executor: what carries them out.
        site: of the study; by default that of the folder around ``runs``.
        on_progress: told which share of a run is done.
        on_queue: told how many runs have been handed over and have not begun.

    Raises:
        TaskError: the task breaks the rules of a study.
        ExecutorError: nothing can be carried out.
        RuntimeError: workers die before they begin a run; complete runs are kept.
    """
    started: dict[str, Job] = {}
    works: dict[str, Work] = {}
    deaths, losses = Counter[str](), Counter[str]()
    with executor.session(site or Site(Path(runs).parent), lambda key, share: on_progress(started[key], share)) as session:

        def start() -> None:
            new = [job for job in jobs() if job.folder not in started]
            for job in new:
                started[job.folder] = job
                run = JobRun(job, str(runs), shared=executor.name != "local")
                works[job.folder] = Work(job.folder, run, run.configuration)
            if new:
                session.submit([works[job.folder] for job in new])

        start()
        while works:
            ended_runs = session.wait(_POLL)
            on_queue(session.queued())
            for ended in ended_runs:
                result = ended.result
                if result is None:
                    counts, most = (deaths, DEATHS) if ended.own else (losses, LOSSES)
                    counts[ended.key] += 1
                    if counts[ended.key] < most:
                        session.submit([works[ended.key]])
                        continue
                    result = _failed(ended, counts[ended.key], runs)
                del works[ended.key]
                yield started[ended.key], checked(result)
            if ended_runs:
                start()


def run_one(work: Work, *, executor: Executor, site: Site) -> dict[str, Any]:
    """The result of one work, carried out by itself.

    Raises:
        ExecutorError: nothing can be carried out, or its process died.
    """
    with executor.session(site, lambda key, share: None) as session:
        session.submit([work])
        while True:
            for ended in session.wait(_POLL):
                if ended.result is None:
                    raise ExecutorError(f"{work.key} must be carried out: {ended.died}{_said(ended)}")
                return checked(ended.result)


def checked(result: dict[str, Any]) -> dict[str, Any]:
    """``result``, unless it tells of what no other run would do better.

    Raises:
        TaskError, ExecutorError: as it says.
    """
    if "task_error" in result:
        raise TaskError(result["task_error"])
    if "executor_error" in result:
        raise ExecutorError(result["executor_error"])
    return result


def _failed(ended: Ended, times: int, runs: Path | str) -> dict[str, Any]:
    """The result of a run that died too often."""
    said = f"{'its process died' if ended.own else 'its machine was lost'} {times} times, the last time: {ended.died}"
    if not is_url(str(runs)):
        place = files.make_directory(Path(runs) / ended.key, purpose="--out")
        files.write_text(place / ERROR, "\n".join([said, *ended.lines, ""]))
    return {"error": f"{said}{_said(ended)}"}


def _said(ended: Ended) -> str:
    last = _telling([line.strip() for line in ended.lines if line.strip()])[-_LINES:]
    return f"; its last lines: {' | '.join(last)}" if last else ""


def _telling(lines: Sequence[str]) -> list[str]:
    """The lines that tell a reader something: of what Python writes when it crashes, what happened and the two innermost calls."""
    crash = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
    return [line for line in lines[: crash + 4] if not _FRAME.match(line)]


def _marks(history: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float, float], ...]:
    """Where a run logged: epochs (or steps) done, seconds and gradient evaluations."""
    unit = "epoch" if any(one.get("epoch") is not None for one in history) else "step"
    read = [(one.get(unit), one.get("seconds"), one.get("gradient_evaluations")) for one in history]
    return tuple((float(at), float(s), float(n)) for at, s, n in read if at is not None and s is not None and n is not None)


@dataclass(frozen=True)
class _Measuring:
    """The measurement of a variant's seconds in units of the baseline's, as a work; each side a variant, its length and its evaluations."""

    plain: tuple[Variant, int, float]
    variant: tuple[Variant, int, float]
    seed: int

    def __call__(self, on_progress: Callable[[float], None]) -> dict[str, Any]:
        try:
            return asdict(measure(self._side(*self.plain), self._side(*self.variant)))
        except ValueError as error:
            return {"unmeasured": str(error)}

    def _side(self, variant: Variant, length: int, evaluations: float) -> Side:
        def timed(stretch: Fraction) -> Timed | str:
            ended, history = passing(variant, self.seed, stretch)
            return ended["error"] if "error" in ended else Timed(ended["seconds"], ended["gradient_evaluations"], _marks(history))

        return Side(timed, length, evaluations)


def measured(
    name: str, plain: tuple[Variant, int, float], variant: tuple[Variant, int, float], seed: int, *, executor: Executor, site: Site
) -> EqualSeconds:
    """The seconds of the variant ``name``, measured in one process of the executor's, beside no other run of the study.

    Raises:
        ValueError: they cannot be measured.
    """
    found = run_one(Work(f"the seconds of {name}", _Measuring(plain, variant, seed)), executor=executor, site=site)
    if "unmeasured" in found:
        raise ValueError(f"{name}: {found['unmeasured']}")
    return EqualSeconds(found["ratio"], found["length"], tuple(found["rounds"]), tuple(found["lengths"]))
