"""What executors on other machines send to a worker, and what it does: compare versions, find the folder, carry out, report."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import socket
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from gradreg import __version__, files
from gradreg.study.executors.executor import ExecutorError, OnShare, Site, Work

SEEN = ".seen"
"""The file in a study's folder by which a worker knows that it sees the same folder."""
NOTES = ".running"
"""The folder in a study's in which each work that is under way has a note, with its share, and what it writes."""
_COMPARED = ("torch", "jax")
_PATIENCE = 5.0
"""Seconds that a worker waits for the study's folder, which a network disk may show a little later."""
_OFTEN = 1.0

Order = dict[str, Any]


class Orders:
    """The orders of one session.

    Args:
        site: of the study.
        capture: whether what a work writes is kept in a file, for want of a log of the engine's own.
        threads: of each work.
    """

    def __init__(self, site: Site, *, capture: bool, threads: int) -> None:
        self._site, self._capture, self._threads = site, capture, max(1, threads)
        self._notes = None if site.url is not None else site.folder / NOTES
        self._looked = 0.0
        self._seen: dict[str, str] = {}
        if self._notes is not None:
            self._notes.mkdir(parents=True, exist_ok=True)
            file = site.folder / SEEN
            token = file.read_text() if file.is_file() else uuid.uuid4().hex  # works of a driver that died may still ask for it
            files.write_text(file, token)
            self._seen = {"folder": str(site.folder), "token": token}

    def of(self, work: Work) -> Order:
        """The order of a work, in plain values, which any version of gradreg can read.

        Raises:
            ExecutorError: the work cannot be pickled.
        """
        return {
            "key": work.key,
            "call": work.pickled(),
            "versions": {"gradreg": __version__, **{name: found for name in _COMPARED if (found := _version(name)) is not None}},
            "host": socket.gethostname(),
            "path": [place for place in sys.path if place],
            "threads": self._threads,
            "seen": self._seen,
            "note": None if self._notes is None else str(self._note(work.key)),
            "capture": self._capture,
        }

    def under_way(self, keys: Iterable[str], on_share: OnShare) -> int | None:
        """How many of the works ``keys`` have begun, whose shares are told; None if that is not known, or was asked a moment ago."""
        if self._notes is None or time.monotonic() - self._looked < _OFTEN:
            return None
        self._looked = time.monotonic()
        there = {entry.name for entry in os.scandir(self._notes)}
        count = 0
        for key in keys:
            note = self._note(key)
            if note.name not in there:
                continue
            count += 1
            with contextlib.suppress(OSError, ValueError):  # which is just being written, or has just been removed
                on_share(key, float(json.loads(note.read_text())["share"]))
        return count

    def written(self, key: str) -> list[str]:
        """The lines that a work wrote, as far as they were kept; its note is removed."""
        if self._notes is None:
            return []
        note = self._note(key)
        kept = note.with_suffix(".out")
        lines = kept.read_text(errors="replace").splitlines() if kept.is_file() else []
        for file in (note, kept):
            file.unlink(missing_ok=True)
        return lines

    def close(self) -> None:
        """Remove what is only of this session, but for the notes of works that are still under way."""
        if self._notes is not None:
            (self._site.folder / SEEN).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                self._notes.rmdir()

    def _note(self, key: str) -> Path:
        assert self._notes is not None
        return self._notes / hashlib.sha256(key.encode()).hexdigest()[:16]


def entry() -> Callable[[Order], dict[str, Any]]:
    """The function that a worker calls with an order. It is pickled by value, because a worker's own gradreg may be another."""

    def carry_out(order: Order) -> dict[str, Any]:
        import importlib
        import os
        import socket
        import sys
        from importlib import metadata

        sys.path += [place for place in order["path"] if place not in sys.path and os.path.exists(place)]
        differ: list[str] = []
        for name, wanted in order["versions"].items():
            try:
                own = importlib.import_module(name).__version__ if name == "gradreg" else metadata.version(name)
            except ImportError:
                own = "none"
            if own.partition("+")[0] != wanted.partition("+")[0]:
                differ.append(f"{name} {own}, but {wanted} on {order['host']}")
        if differ:
            return {
                "executor_error": "workers must have the versions of the process that started the study; got a worker on "
                f"{socket.gethostname()} with {' and '.join(differ)}. Install the same on both."
            }
        from gradreg.study.executors.order import carried

        return carried(order)

    return carry_out


def carried(order: Order) -> dict[str, Any]:
    """The result of an order, in the worker's process."""
    seen: Mapping[str, str] = order["seen"]
    if seen and not _sees(seen):
        return {
            "executor_error": f"--out must be a folder that workers see under the same path; got {seen['folder']!r}, which a worker on "
            f"{socket.gethostname()} does not. Name one on a shared disk, or a URL such as s3://bucket/study."
        }
    os.environ.setdefault("OMP_NUM_THREADS", str(order["threads"]))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(order["threads"])
    note = None if order["note"] is None else Path(order["note"])
    with _noted(note, capture=order["capture"]) as tell:
        return pickle.loads(order["call"])(tell)


def _sees(seen: Mapping[str, str]) -> bool:
    file, deadline = Path(seen["folder"]) / SEEN, time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if file.read_text() == seen["token"]:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


@contextlib.contextmanager
def _noted(note: Path | None, *, capture: bool) -> Generator[Callable[[float], None]]:
    """A context in which ``note`` says that a work is under way; gives what tells its share."""
    if note is None:
        yield lambda share: None
        return
    told = 0.0

    def tell(share: float) -> None:
        nonlocal told
        if share == 0.0 or time.monotonic() - told > _OFTEN:
            told = time.monotonic()
            with contextlib.suppress(OSError):  # progress must not end a run
                note.write_text(json.dumps({"share": share, "host": socket.gethostname(), "pid": os.getpid()}))

    note.parent.mkdir(exist_ok=True)
    tell(0.0)
    kept = note.with_suffix(".out")
    try:
        with _written_to(kept) if capture else contextlib.nullcontext():
            yield tell
    finally:
        note.unlink(missing_ok=True)
        kept.unlink(missing_ok=True)


@contextlib.contextmanager
def _written_to(file: Path) -> Generator[None]:
    """A context in which this process writes what it says into ``file``, so that its last lines outlive it."""
    before = [(number, os.dup(number)) for number in (1, 2)]
    with file.open("ab", buffering=0) as kept:
        for number, _ in before:
            os.dup2(kept.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in before:
            os.dup2(own, number)
            os.close(own)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def imported(package: str, *, extra: str) -> Any:
    """The package that an executor needs.

    Raises:
        ExecutorError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ExecutorError(
            f"--executor {extra} needs the package {package!r}, which is not installed. Run: pip install 'gradreg[{extra}]'"
        ) from error
