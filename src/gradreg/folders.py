"""Folders with one writer: made atomically, locked by the operating system while they are written, and free again when the writer ends."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import socket
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradreg import files

LOCK = ".lock"
"""The file in a folder that its writer keeps locked. Its presence means nothing: a writer that was killed leaves it behind, unlocked."""

_TRIES = 1000
"""How often to begin again where the folder vanishes meanwhile; some paths, in /proc say, always do."""

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


class FolderInUse(OSError):
    """Another process writes the folder; the message says which."""


@contextmanager
def locked(folder: Path, *, purpose: str) -> Generator[None]:
    """A context in which no other process is inside ``locked(folder)``; makes the folder, and removes it at the end if it is empty.

    The operating system releases the lock when this process ends, however it ends; child processes do not inherit it.

    Args:
        folder: to be written.
        purpose: what names it (an argument, say ``--out``), for errors.

    Raises:
        FolderInUse: at once, if another process (or this one) holds it; naming its host, its process number and since when.
        OSError: the folder cannot be made or written to, or its file system has no locks.
    """
    descriptor = _acquired(folder, purpose)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # and this is not a forked child that leaves its parent's context
            _held.discard(descriptor)
            with suppress(OSError):  # removed while still locked: whoever has opened it already finds another file in its place, or none
                (folder / LOCK).unlink(missing_ok=True)
            os.close(descriptor)
            with suppress(OSError):  # not empty
                folder.rmdir()


def new_folder(stem: Path) -> Path:
    """A new folder, made atomically so that none is shared: ``stem``, or the first of ``stem-2``, ``stem-3``, ... that is free."""
    files.make_directory(stem.parent, purpose="the folder of a run")
    for path in itertools.chain([stem], (stem.with_name(f"{stem.name}-{i}") for i in itertools.count(2))):
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("the numbers do not end")


def keep_aside(folder: Path, *, purpose: str) -> None:
    """Rename a folder that is there, after the time, so that another can take its place.

    Raises:
        FolderInUse: another process writes it.
    """
    with suppress(FileNotFoundError):
        if folder.exists():
            with locked(folder, purpose=purpose):  # nobody writes it
                pass
            stem = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            taken = itertools.chain([stem], (stem.with_name(f"{stem.name}-{i}") for i in itertools.count(2)))
            folder.rename(next(path for path in taken if not path.exists()))


def _acquired(folder: Path, purpose: str) -> int:
    """The descriptor of the folder's lock, held."""
    for left in itertools.count(_TRIES, -1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if isinstance(error, (FileNotFoundError, FileExistsError)) and left:  # another writer has just removed the empty folder
                continue
            raise OSError(f"{purpose} must name a folder that can be written to; got {str(folder)!r}: {error.strerror}.") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(f"{str(folder / LOCK)!r} must be a plain file, which locks the folder; it is something else. Remove it.")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, folder / LOCK):
                _describe_holder(descriptor)
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise FolderInUse(
                f"{purpose} must name a folder that no other process writes; got {str(folder)!r}, written by {holder}. "
                "Wait until that ends, or choose another folder."
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(
                    f"{purpose} must be on a file system with locks, which keep two processes from writing one folder; got "
                    f"{str(folder)!r}: {error.strerror}. Choose a folder on another disk."
                ) from error
            raise
        os.close(descriptor)  # the last writer has removed the file between opening and locking it
    raise AssertionError("the count does not end")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _describe_holder(descriptor: int) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    with suppress(OSError):  # a full disk: the lock holds without a description too
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)


def _holder(descriptor: int) -> str:
    """Who holds the lock, in words."""
    try:
        found: Any = json.loads(os.pread(descriptor, 4096, 0))
        pid, host, since = int(found["pid"]), str(found["host"]), str(found["since"])
    except (ValueError, KeyError, TypeError):  # it has locked the file, and not described itself yet
        return "a process that has just started"
    return f"process {pid} on {host} since {since}"


def _close_in_child() -> None:
    """A forked child, a worker that loads data say, shares its parent's locks, and would keep them alive after the parent's death."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
