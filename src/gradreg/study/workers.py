"""Runs in worker processes, each in its own folder, with progress; complete runs are not repeated."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from gradreg.study.plan import Job


def default_workers() -> int:
    """One worker per core; one in all if there is an accelerator."""
    import torch

    if torch.accelerator.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job], folder: Path, *, workers: int, on_epoch: Callable[[], None] = lambda: None
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run ``jobs`` in ``workers`` processes, yielding each with its result as it completes.

    Args:
        jobs: what to run.
        folder: each job runs in ``folder / job.folder``.
        workers: processes at a time, ≥ 1; each takes its share of the cores.
        on_epoch: called for every epoch that any job finishes.

    Raises:
        RuntimeError: a worker died (out of memory, say); complete runs are kept.
    """
    context = multiprocessing.get_context("spawn")
    epochs = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(epochs, threads))
    try:
        waiting: dict[Future[dict[str, Any]], Job] = {pool.submit(_run, job, folder): job for job in jobs}
        while waiting:
            done, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            _drain(epochs, on_epoch)
            for future in done:
                job = waiting.pop(future)
                try:
                    yield job, future.result()
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        f"a worker process died while running {job.folder} or beside it, perhaps for lack of memory. "
                        "What is complete is kept: run the command again, with fewer --workers."
                    ) from error
        _drain(epochs, on_epoch)
    except BaseException:
        # An interrupted comparison leaves no process running; unfinished runs are started again next time.
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_epochs: Any = None


def _start_worker(epochs: Any, threads: int) -> None:
    global _epochs
    _epochs = epochs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides which workers an interrupt ends
    import torch

    torch.set_num_threads(threads)


def _run(job: Job, folder: Path) -> dict[str, Any]:
    from gradreg.train.checkpoints.policy import Stopped
    from gradreg.train.run_folder import RunFolder

    try:
        return RunFolder(folder / job.folder).run(job.config, on_epoch=lambda epoch: _epochs.put(1), track=False)
    except Stopped as stopped:  # stopped by the parent, which starts no further job
        os._exit(128 + stopped.signal_number)


def _drain(epochs: Any, on_epoch: Callable[[], None]) -> None:
    while True:
        try:
            epochs.get_nowait()
        except queue.Empty:
            return
        on_epoch()
