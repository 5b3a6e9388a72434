"""``--executor slurm``: runs are jobs of arrays, which submitit sends from a machine that has ``sbatch``; the nodes share its disk."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import math
import os
import re
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gradreg import checks, files
from gradreg.study.executors.executor import Ended, Executor, ExecutorError, OnShare, Session, Site, Work, option
from gradreg.study.executors.order import Orders, entry, imported

_LOG_LEVEL = "SUBMITIT_LOG_LEVEL"
FOLDER = "slurm"
"""The folder in a study's in which submitit keeps what it sends, what comes back, and the logs."""
JOBS = "jobs.json"
_BATCH = 500
"""Jobs of one array; Slurm itself allows 1,000 unless it is told otherwise."""
_GRACE = 5.0
"""Seconds between the end of a job and that of the wait for its result, which a network disk may show a little later."""
_ANSWER = 8.0
_UNANSWERED = 300.0
"""Seconds that one call of Slurm's may take, and for which its controller may fail to answer."""
_LOST = ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "REVOKED", "REQUEUED")
_OPEN = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "STAGE_OUT",
         "SIGNALING", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # fmt: skip
_TIMEOUTS = 20
"""How often a run that has reached its time may be queued again, to go on from its checkpoint."""


@dataclass(frozen=True)
class SlurmExecutor(Executor):
    """Jobs of Slurm. The package ``submitit`` is needed: ``pip install 'gradreg[slurm]'``.

    Args:
        partition: of the jobs; None takes the cluster's own.
        minutes: time of a job, ≥ 1. A run that reaches it, or is preempted, is queued again: recipes go on from their checkpoint.
        run_cpus: cores of a run, whole; also its threads.
        run_gpus: GPUs of a run, whole.
        run_memory: GB of a run; None takes the cluster's own.
        account: that is charged; None takes the user's own.
        at_once: most jobs of an array that run at a time, ≥ 1; also the trials of a search.
        others: other options of sbatch, as "qos=low" or "constraint=a100,exclude=node7".
    """

    name: ClassVar[str] = "slurm"
    partition: str | None = option("--slurm-partition", "partition of Slurm (the cluster's own)")
    minutes: int = option("--slurm-time", "minutes of a run, after which it is queued again (60)", default=60, kind=int)
    run_cpus: float = option("--run-cpus", "cores of a run, on Ray and Slurm (1)", default=1.0, kind=float)
    run_gpus: float = option("--run-gpus", "GPUs of a run, on Ray and Slurm; on Ray also a fraction (0)", default=0.0, kind=float)
    run_memory: float | None = option("--run-memory", "GB of a run, on Slurm (the cluster's own)", kind=float)
    account: str | None = option("--slurm-account", "account of Slurm that is charged (your own)")
    at_once: int = option("--slurm-at-once", "most jobs of Slurm that run at a time (32)", default=32, kind=int)
    others: str | None = option("--slurm-option", "other options of sbatch, as in qos=low,constraint=a100")

    def __post_init__(self) -> None:
        checks.whole("minutes", self.minutes, minimum=1, remedy="It is the time of one run.")
        checks.whole("at_once", self.at_once, minimum=1)
        for name, least in (("run_cpus", 1), ("run_gpus", 0)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least or value != int(value):
                raise ValueError(f"{name} must be a whole number >= {least} on Slurm; got {value:g}. Fractions of a GPU are for Ray.")
        if self.run_memory is not None:
            checks.positive("run_memory", self.run_memory)
        self._others()

    def at_a_time(self) -> int:
        return self.at_once

    def describe(self, count: int) -> str:
        where = "" if self.partition is None else f", partition {self.partition}"
        gpus = f" and {self.run_gpus:g} GPUs" if self.run_gpus else ""
        return f"on Slurm{where}, {self.run_cpus:g} CPUs{gpus} each, {self.at_once} at a time"

    @contextmanager
    def session(self, site: Site, on_share: OnShare) -> Generator[Session]:
        with _logging_left_alone():
            submitit = imported("submitit", extra="slurm")
        if shutil.which("sbatch") is None or shutil.which("squeue") is None:
            raise ExecutorError(
                "--executor slurm must be given on a machine of a Slurm cluster; got one without sbatch and squeue. Log in to one, or take "
                "another executor."
            )
        _squeue()
        at_work = _Slurm(submitit, self, site, on_share)
        try:
            yield at_work
        finally:
            at_work.close()

    def _others(self) -> dict[str, str]:
        pairs = [one.partition("=") for one in (self.others or "").split(",") if one]
        if any(not equals or not key for key, equals, _ in pairs):
            raise ValueError(f"others must be options of sbatch such as qos=low,constraint=a100; got {self.others!r}. Write NAME=VALUE.")
        return {key: value for key, _, value in pairs}

    def parameters(self, name: str) -> dict[str, Any]:
        """What submitit is told of each job."""
        given = {"partition": self.partition, "account": self.account, "gpus_per_node": int(self.run_gpus) or None}
        memory = None if self.run_memory is None else f"{math.ceil(1024 * self.run_memory)}MB"
        return {
            **{key: value for key, value in {**given, "mem": memory}.items() if value is not None},
            "job_name": re.sub(r"[^A-Za-z0-9._-]+", "-", f"gradreg-{name}")[:40],
            "time": self.minutes,
            "cpus_per_task": int(self.run_cpus),
            "array_parallelism": self.at_once,
            "additional_parameters": {"requeue": True, **self._others()},
        }


@contextmanager
def _logging_left_alone() -> Generator[None]:
    """A context in which the import of submitit configures no logging: doing so again would end the handlers of the whole process."""
    before = os.environ.get(_LOG_LEVEL)
    os.environ[_LOG_LEVEL] = before or "NOCONFIG"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LOG_LEVEL]


@dataclass
class _Submitted:
    """A job.

    Args:
        key: of its work.
        job: submitit's.
        ended: since when it has not been in the queue any more; None while it is.
        state: as Slurm last said.
    """

    key: str
    job: Any
    ended: float | None = None
    state: str = "PENDING"
    lines: Sequence[str] = field(default_factory=tuple)


class _Slurm(Session):
    """Jobs in arrays. Jobs that a driver which died has left in the queue are taken over."""

    def __init__(self, submitit: Any, executor: SlurmExecutor, site: Site, on_share: OnShare) -> None:
        self._submitit, self._executor, self._site, self._on_share = submitit, executor, site, on_share
        self._orders = Orders(site, capture=False, threads=int(executor.run_cpus))
        self._function = _checkpointed(submitit)
        self._held: deque[Work] = deque()
        self._jobs: dict[str, _Submitted] = {}
        self._looked = self._answered = time.monotonic()
        self._left = self._of_earlier_drivers()

    def submit(self, works: Sequence[Work]) -> None:
        new: list[Work] = []
        for work in works:
            left = self._left.pop(work.key, None)
            if left is None:
                new.append(work)
            elif left[1] == work.identity:
                self._jobs[work.key] = _Submitted(work.key, left[0])
            else:  # of another configuration
                self._cancel([left[0]])
                new.append(work)
        self._held.extend(new)
        self._fill()

    def wait(self, seconds: float) -> list[Ended]:
        ended = [Ended(one.key, self._result(one)) for one in [*self._jobs.values()] if one.job.paths.result_pickle.is_file()]
        if not ended:
            time.sleep(max(seconds, 0.2))
        self._look()
        ended += self._died({one.key for one in ended})
        for one in ended:
            self._tidy(self._jobs.pop(one.key), died=one.died is not None)
        self._orders.under_way(self._jobs, self._on_share)
        self._fill()
        return ended

    def queued(self) -> int | None:
        return len(self._held) + sum(one.state == "PENDING" for one in self._jobs.values())

    def close(self) -> None:
        """End what still runs."""
        self._cancel([one.job for one in self._jobs.values()])
        self._orders.close()

    def _fill(self) -> None:
        """Hand over what is held back, as long as fewer than two arrays' jobs are in the queue."""
        while self._held and len(self._jobs) < 2 * _BATCH:
            works = [self._held.popleft() for _ in range(min(_BATCH, len(self._held)))]
            folder = self._new_folder()
            try:
                sender = self._submitit.SlurmExecutor(folder=folder, max_num_timeout=_TIMEOUTS)
                sender.update_parameters(**self._executor.parameters(self._site.name))
                jobs = sender.map_array(self._function, [self._orders.of(work) for work in works])
            except ExecutorError:
                raise
            except Exception as error:  # of submitit, which has several kinds
                raise ExecutorError(f"Slurm must take the jobs of the study; got: {_reason(error)}") from error
            for work, job in zip(works, jobs, strict=True):
                self._jobs[work.key] = _Submitted(work.key, job)
            listed = [{"key": work.key, "job": job.job_id, "identity": work.identity} for work, job in zip(works, jobs, strict=True)]
            files.write_json(folder / JOBS, {"jobs": listed})

    def _new_folder(self) -> Path:
        place = self._site.folder / FOLDER
        for number in itertools.count(1):
            folder = place / f"array-{number}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
        raise AssertionError("the numbers do not end")

    def _of_earlier_drivers(self) -> dict[str, tuple[Any, str]]:
        """Key -> job and identity of what a driver that died has left in the queue."""
        states = {job: state for job, (state, _) in (_squeue() or {}).items()}
        found: dict[str, tuple[Any, str]] = {}
        for file in sorted((self._site.folder / FOLDER).glob(f"*/{JOBS}")):
            listed = files.read_json(file, holds="the jobs of an array", remedy="Remove it.")["jobs"]
            there = [one for one in listed if states.get(one["job"]) in _OPEN]
            for one in there:
                found[one["key"]] = (self._submitit.SlurmJob(folder=file.parent, job_id=one["job"]), one["identity"])
            if not there:
                shutil.rmtree(file.parent, ignore_errors=True)
        return found

    def _look(self) -> None:
        """Ask Slurm which jobs are in the queue; seldom where there are many."""
        often = 1.0 if len(self._jobs) < 100 else 5.0
        if time.monotonic() - self._looked < often or not self._jobs:
            return
        self._looked = time.monotonic()
        states = _squeue(patient=True)
        if states is None:
            if time.monotonic() - self._answered > _UNANSWERED:
                raise ExecutorError(
                    "Slurm must say which jobs are in the queue; squeue has not answered for five minutes. Start again later."
                )
            return
        self._answered = time.monotonic()
        for one in self._jobs.values():
            one.state, reason = states.get(one.job.job_id, ("GONE", ""))
            if one.state in _OPEN:
                one.ended = None
            elif one.ended is None:
                one.ended = time.monotonic()
                one.lines = (reason,) if reason not in ("", "None") else ()

    def _died(self, ended: set[str]) -> list[Ended]:
        """The jobs that have left the queue without a result."""
        found: list[Ended] = []
        for one in self._jobs.values():
            if one.key in ended or one.ended is None or time.monotonic() - one.ended < _GRACE:
                continue
            if one.job.paths.result_pickle.is_file():
                continue  # the next look takes it
            lines = [line for file in (one.job.paths.stdout, one.job.paths.stderr) for line in _tail(file)]
            found.append(Ended(one.key, died=f"Slurm's job {one.job.job_id} ended, {one.state}", lines=lines, own=one.state not in _LOST))
        return found

    def _result(self, one: _Submitted) -> dict[str, Any]:
        outcome, result = self._submitit.core.utils.pickle_load(one.job.paths.result_pickle)
        if outcome == "success":
            return result
        last = str(result).strip().splitlines()[-1]
        if "timed-out" in last:
            return {"error": f"its time of {self._executor.minutes} minutes was over {_TIMEOUTS + 1} times (--slurm-time)"}
        return {"executor_error": f"a worker must be able to begin the run {one.key}; got {last}"}

    def _tidy(self, one: _Submitted, *, died: bool) -> None:
        """Remove what submitit kept of a job; of one that died its logs stay."""
        paths = one.job.paths
        self._orders.written(one.key)
        for file in (paths.submitted_pickle, paths.result_pickle, *(() if died else (paths.stdout, paths.stderr))):
            file.unlink(missing_ok=True)

    def _cancel(self, jobs: Sequence[Any]) -> None:
        for start in range(0, len(jobs), _BATCH):
            subprocess.run(["scancel", *(job.job_id for job in jobs[start : start + _BATCH])], capture_output=True, check=False)


def _checkpointed(submitit: Any) -> Any:
    """The function of the jobs, which submitit queues again when a job is preempted or its time is over. It is pickled by value."""
    carry_out = entry()
    again = submitit.helpers.DelayedSubmission

    class Resumed:
        def __call__(self, order: dict[str, Any]) -> dict[str, Any]:
            return carry_out(order)

        def checkpoint(self, order: dict[str, Any]) -> Any:
            return again(self, order)

    return Resumed()


def _squeue(*, patient: bool = False) -> dict[str, tuple[str, str]] | None:
    """Job -> its state and the reason for it, of this user's; None if Slurm does not answer and ``patient``.

    Raises:
        ExecutorError: it does not answer.
    """
    words = ["squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%r"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=_ANSWER, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        if patient:
            return None
        raise ExecutorError(f"Slurm must answer; got of squeue: {_reason(error)}. Is its controller up? (scontrol ping)") from error
    rows = [line.strip().split("|") for line in said.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def _reason(error: BaseException) -> str:
    """What a command that failed said, or else the error's own last line."""
    said = getattr(error, "stderr", None) or str(error)
    said = said.decode(errors="replace") if isinstance(said, bytes) else said
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].removeprefix("sbatch: error: ") if lines else type(error).__name__


def _tail(file: Path, count: int = 20) -> list[str]:
    """The last lines of a log, without submitit's own and Slurm's frame."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return [line for line in lines if not line.startswith("submitit ")][-count:]
