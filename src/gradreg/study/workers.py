"""Runs in worker processes, each in its own folder; complete runs are not repeated, and no worker outlives this process."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from gradreg import files
from gradreg.environment import usable_cores
from gradreg.study.functions import ERROR, describe_failure
from gradreg.study.plan import Job
from gradreg.study.tasks import TaskError, Variant

_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0")
"""Files that are there where a driver of an accelerator is, whatever the framework."""

_HANG_UP: list[int] = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that this process gets when its parent dies."""

OnProgress = Callable[[Job, float], None]


def default_workers() -> int:
    """One worker per core; one in all if there is an accelerator."""
    if sys.platform == "darwin" or any(Path(file).exists() for file in _ACCELERATORS):
        return 1
    return usable_cores()


def run_jobs(
    jobs: Callable[[], Sequence[Job]],
    folder: Path,
    *,
    workers: int,
    on_progress: OnProgress = lambda job, share: None,
) -> Generator[tuple[Job, dict[str, Any]]]:
    """Run jobs, yielding each with its result as it completes; of one that failed the result is ``{"error": its last line}``.

    Args:
        jobs: what to run; asked again after every completed run, because results may call for more.
        folder: each job runs in ``folder / job.folder``.
        workers: processes at a time, each of which takes its share of the cores; 0 runs one after the other in this process.
        on_progress: told which share of a run is done.

    Raises:
        TaskError: the task breaks the rules of a study.
        RuntimeError: a worker died (out of memory, say); complete runs are kept.
    """
    if workers == 0:
        yield from _in_this_process(jobs, folder, on_progress)
        return
    context = multiprocessing.get_context("spawn")
    with _waiting_for(signal.SIGINT, *_HANG_UP):  # the process that collects what is shared, started here, must outlive a signal to all
        shares = context.Queue()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(shares, max(1, usable_cores() // workers), [*sys.path])
    )
    waiting: dict[Future[dict[str, Any]], Job] = {}
    started: dict[str, Job] = {}

    def start() -> None:
        for job in jobs():
            if job.folder not in started:
                started[job.folder] = job
                with _waiting_for(signal.SIGINT):  # a worker that is still starting would answer it with a traceback
                    waiting[pool.submit(_run, job, folder)] = job

    try:
        start()
        while waiting:
            done, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            _drain(shares, started, on_progress)
            for future in done:
                job = waiting.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        f"a worker process died while running {job.folder} or beside it, perhaps for lack of memory. "
                        "What is complete is kept: run the command again, with fewer --workers."
                    ) from error
                yield job, _checked(result)
            if done:
                start()
        _drain(shares, started, on_progress)
    except BaseException:
        # An interrupted comparison leaves no process running; unfinished runs are started again next time.
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def alone(workers: int) -> Iterator[Callable[[Variant, int, Fraction], dict[str, Any]]]:
    """A context that gives a function that runs a variant in a folder that is thrown away, beside no other run, and returns its result.

    It runs in one process like those of ``run_jobs`` with so many ``workers``, with as many threads; an error is returned as its last line.
    """
    if workers == 0:
        yield _passing
        return
    context = multiprocessing.get_context("spawn")
    initial = (context.Queue(), max(1, usable_cores() // workers), [*sys.path])
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=initial)
    try:
        yield lambda *run: pool.submit(_passing, *run).result()
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _passing(variant: Variant, seed: int, stretch: Fraction) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gradreg-") as place:
        try:
            return variant.run(files.make_directory(Path(place) / "run", purpose="TMPDIR"), seed, stretch, lambda share: None)
        except Exception as error:
            return {"error": describe_failure(error)}


def _in_this_process(jobs: Callable[[], Sequence[Job]], folder: Path, on_progress: OnProgress) -> Iterator[tuple[Job, dict[str, Any]]]:
    started: set[str] = set()
    while True:
        job = next((job for job in jobs() if job.folder not in started), None)
        if job is None:
            return
        started.add(job.folder)
        yield job, _checked(_outcome(job, folder, lambda share, job=job: on_progress(job, share)))


def _checked(result: dict[str, Any]) -> dict[str, Any]:
    if "task_error" in result:
        raise TaskError(result["task_error"])
    return result


@contextmanager
def _waiting_for(*numbers: int) -> Generator[None]:
    """A context in which these signals wait for its end; for processes that are started in it they wait until they say otherwise."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_shares: Any = None


def _start_worker(shares: Any, threads: int, path: list[str]) -> None:
    global _shares
    _shares = shares
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides which workers an interrupt ends
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.platform == "linux":  # at once; the thread must wait for an import to let it run
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # For whatever the task imports later, and for what it has imported already.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _end_with_parent() -> None:
    """End this worker as soon as its parent has ended, however: killed, it cannot end its workers itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(job: Job, folder: Path) -> dict[str, Any]:
    return _outcome(job, folder, lambda share: _shares.put((job.folder, share)))


def _outcome(job: Job, folder: Path, on_progress: Callable[[float], None]) -> dict[str, Any]:
    """The result of ``job``; of one that failed its last line, with the traceback in its folder."""
    place = files.make_directory(folder / job.folder, purpose="--out")
    try:
        result = job.variant.run(place, job.seed, job.stretch, on_progress)
    except TaskError as error:
        return {"task_error": f"{job.name}, seed {job.seed}: {error}"}
    except Exception as error:
        files.write_text(place / ERROR, "".join(traceback.format_exception(error)))
        return {"error": describe_failure(error)}
    (place / ERROR).unlink(missing_ok=True)
    return result


def _drain(shares: Any, started: dict[str, Job], on_progress: OnProgress) -> None:
    while True:
        try:
            folder, share = shares.get_nowait()
        except queue.Empty:
            return
        on_progress(started[folder], share)
