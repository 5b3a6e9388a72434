"""``--executor local``: runs in worker processes of this machine, none of which outlives this process; or one by one in this process.

On Linux workers are forked from a process of their own that has imported what every run imports (``Site.imports``), once for all of them:
PyTorch takes seconds of the processor. Elsewhere, and where a task says nothing of its imports, each begins from nothing.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gradreg import checks
from gradreg.environment import usable_cores
from gradreg.study.executors.executor import Ended, Executor, OnShare, Session, Site, Work, option

_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0")
"""Files that are there where a driver of an accelerator is, whatever the framework."""

_HANG_UP: list[int] = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that this process gets when its parent dies."""
_LOST = 255
"""What multiprocessing takes for the exit code of a worker whose fork server has died, which ends it."""
_TOLD_TO_END = (-signal.SIGTERM, 128 + signal.SIGTERM, 0, _LOST)
"""Exit codes of workers that did not die by themselves."""

_DYING = 10.0
"""Seconds that a process which was killed may take to end."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt."""
_LARGEST_HEAP_BLOCK = 32 * 2**20
"""Bytes up to which glibc itself raises its threshold for blocks outside of the heap."""


def default_workers() -> int:
    """One worker per core; one in all if there is an accelerator."""
    if sys.platform == "darwin" or any(Path(file).exists() for file in _ACCELERATORS):
        return 1
    return usable_cores()


def refuse_where_a_worker_imports_it(function: str) -> None:
    """Raise if ``function`` is called by a script that a worker imports, which would begin the study once more.

    Raises:
        RuntimeError: it is.
    """
    # multiprocessing itself tells it by this attribute, and only later knows the parent.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            f'{function} must stand under if __name__ == "__main__": in a script, because its workers import the script; got a call by a '
            "worker while it imports it."
        )


@dataclass(frozen=True)
class LocalExecutor(Executor):
    """Processes of this machine.

    Args:
        workers: processes at a time, each of which takes its share of the cores: one a core by default, one with an accelerator. 0 runs one
            after the other in this process.
    """

    name: ClassVar[str] = "local"
    workers: int | None = option("--workers", "worker processes (one a core; one with an accelerator; 0: in this process)", kind=int)

    def __post_init__(self) -> None:
        if self.workers is not None:
            checks.whole("workers", self.workers, minimum=0, remedy="Leave it out for one a core.")

    @property
    def elsewhere(self) -> bool:
        return self.workers != 0

    def at_a_time(self) -> int:
        return default_workers() if self.workers is None else self.workers

    def describe(self, count: int) -> str:
        if self.workers == 0:
            return "one after the other"
        return f"{min(self.at_a_time(), max(1, count)) if self.workers is None else self.workers} at a time"

    @contextmanager
    def session(self, site: Site, on_share: OnShare) -> Generator[Session]:
        if self.workers == 0:
            yield _InThisProcess(on_share)
            return
        pool = _Pool(self.at_a_time(), on_share, site.imports)
        try:
            yield pool
        except BaseException:
            pool.terminate()  # an interrupted study leaves no process running; unfinished runs are started again next time
            raise
        finally:
            pool.close()


class _InThisProcess(Session):
    """Works one after the other."""

    def __init__(self, on_share: OnShare) -> None:
        self._on_share = on_share
        self._waiting: deque[Work] = deque()

    def submit(self, works: Sequence[Work]) -> None:
        self._waiting.extend(works)

    def wait(self, seconds: float) -> list[Ended]:
        if not self._waiting:
            return []
        work = self._waiting.popleft()
        return [Ended(work.key, work.call(lambda share: self._on_share(work.key, share)))]


class _Pool(Session):
    """Works in a pool of processes; where one of them dies the pool is replaced, and the others' works begin again."""

    def __init__(self, workers: int, on_share: OnShare, imports: str = "") -> None:
        self._workers, self._on_share = workers, on_share
        self._threads = max(1, usable_cores() // workers)
        self._context = _starting_by(imports)
        with _waiting_for(signal.SIGINT, *_HANG_UP):  # the process that collects what is shared, started here, must outlive a signal to all
            self._shares = self._context.Queue()
        self._notes = tempfile.TemporaryDirectory(prefix="gradreg-")
        self._waiting: dict[Future[dict[str, Any]], tuple[Work, Path]] = {}
        self._count = 0
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        if self._context.get_start_method() == "forkserver":
            self._start_fork_server()
        initial = (self._shares, self._threads, [*sys.path], dict(os.environ))
        return ProcessPoolExecutor(self._workers, mp_context=self._context, initializer=_start_worker, initargs=initial)

    def _start_fork_server(self) -> None:
        """Wait until the server has imported what it is to: until it has forked a process that does nothing.

        Requests for workers would wait in its queue meanwhile; were this process killed, the workers would be forked nevertheless, find
        what they share gone, and print tracebacks.
        """
        from multiprocessing import forkserver

        until = time.monotonic() + _DYING
        while True:
            with _waiting_for(signal.SIGINT), _few_threads(self._threads):
                forkserver.ensure_running()
            try:
                self._context.Process(target=_nothing, daemon=True).start()  # type: ignore[attr-defined]
                return
            except (EOFError, OSError) as error:
                # One that was killed a moment ago refuses, and is taken for alive until the system has cleaned up after it.
                if not isinstance(error, ConnectionRefusedError) or time.monotonic() > until:
                    raise RuntimeError(
                        "the process that imports what all workers need died meanwhile, perhaps for lack of memory. Run the command again; "
                        "with --workers 0 the runs go on in one process."
                    ) from error
            time.sleep(0.05)

    def submit(self, works: Sequence[Work]) -> None:
        for work in works:
            self._count += 1
            note = Path(self._notes.name) / str(self._count)
            call = work.pickled()
            with _waiting_for(signal.SIGINT):  # a worker that is still starting would answer it with a traceback
                self._waiting[self._pool.submit(_run, work.key, call, note)] = (work, note)

    def wait(self, seconds: float) -> list[Ended]:
        done, _ = wait(self._waiting, timeout=seconds, return_when=FIRST_COMPLETED)
        self._drain()
        ended: list[Ended] = []
        for future in done:
            if isinstance(future.exception(), BrokenProcessPool):
                return ended + self._replaced()
            work, _ = self._waiting.pop(future)
            ended.append(Ended(work.key, future.result()))
        return ended

    def queued(self) -> int | None:
        return max(0, len(self._waiting) - self._workers)

    def terminate(self) -> None:
        """End the workers."""
        for process in list((self._pool._processes or {}).values()):
            process.terminate()

    def close(self) -> None:
        """Wait until the workers have ended."""
        self._pool.shutdown(cancel_futures=True)
        self._notes.cleanup()

    def _replaced(self) -> list[Ended]:
        """What has ended in a pool one of whose workers died; what else was in it is begun again, in another one."""
        processes = dict(self._pool._processes or {})
        self._pool.shutdown()
        wait(self._waiting)
        ended = [Ended(work.key, future.result()) for future, (work, _) in self._waiting.items() if future.exception() is None]
        lost = [both for future, both in self._waiting.items() if future.exception() is not None]
        self._waiting.clear()
        begun = {work.key: int(text) for work, note in lost if (text := _first_line(note)).isdecimal()}
        codes = {pid: process.exitcode for pid, process in processes.items()}
        if not begun:  # they die before they begin, and would again
            raise RuntimeError(
                f"a worker process died while running {lost[0][0].key} or beside it, perhaps for lack of memory; where one has printed a "
                "traceback, for what that says. What is complete is kept: run the command again, with fewer --workers."
            )
        died = {key for key, pid in begun.items() if codes.get(pid) not in _TOLD_TO_END}
        own = bool(died)  # else a signal told one of them to end, and it is not known which
        for work, note in lost:
            if work.key in (died or begun):
                ended.append(Ended(work.key, died=_how(codes.get(begun[work.key])), lines=_lines(note)[1:], own=own))
        names = {one.key for one in ended}
        self._pool = self._new_pool()
        self.submit([work for work, _ in lost if work.key not in names])
        return ended

    def _drain(self) -> None:
        while True:
            try:
                self._on_share(*self._shares.get_nowait())
            except queue.Empty:
                return


def _starting_by(imports: str) -> multiprocessing.context.BaseContext:
    """How workers start whose runs all import the module ``imports``."""
    if not imports or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([imports])  # of no effect where a server runs already: then a worker imports it
    return context


@contextmanager
def _few_threads(threads: int) -> Generator[None]:
    """A context in which a process that starts lets its libraries take so many threads, unless the environment says how many.

    The libraries read it when they are imported, which is in the fork server.
    """
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(threads)
    try:
        yield
    finally:
        del os.environ[name]


def _how(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"its process ended with status {code}"
    lack = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-code).name}{lack}"


def _lines(note: Path) -> list[str]:
    return note.read_text(errors="replace").splitlines() if note.is_file() else []


def _first_line(note: Path) -> str:
    return next(iter(_lines(note)), "")


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


def _nothing() -> None:
    pass


def _start_worker(shares: Any, threads: int, path: list[str], environment: Mapping[str, str]) -> None:
    global _shares
    _shares = shares
    sys.path[:] = path
    for name in os.environ.keys() - environment.keys():  # a fork server has those of its start
        del os.environ[name]
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides which workers an interrupt ends
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.platform == "linux":  # at once; the thread must wait for an import to let it run
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _keep_freed_memory()
    # For whatever the task imports later, and for what it has imported already.
    given = os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(given) if given.isdecimal() and int(given) else threads)


def _keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of freed memory instead of giving it back, from the first step on.

    It comes to that by itself once a block of 32 MB has been freed. The largest tensors of a small network are smaller, and their pages
    would be given back and zeroed anew in every step.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_HEAP_BLOCK)


def _end_with_parent() -> None:
    """End this worker as soon as its parent has ended, however: killed, it cannot end its workers itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(key: str, pickled: bytes, note: Path) -> dict[str, Any]:
    """The result of a work; ``note`` says meanwhile which process has begun it, and then where that crashed."""
    call: Callable[[Callable[[float], None]], dict[str, Any]] = _unpickled(pickled)
    with note.open("w") as file:
        file.write(f"{os.getpid()}\n")
        file.flush()
        before = faulthandler.is_enabled()
        faulthandler.enable(file, all_threads=False)
        try:
            return call(lambda share: _shares.put((key, share)))
        finally:
            if before:
                faulthandler.enable()
            else:
                faulthandler.disable()
            note.unlink(missing_ok=True)


def _unpickled(pickled: bytes) -> Any:
    import pickle

    return pickle.loads(pickled)
