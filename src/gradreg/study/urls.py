"""Studies at a URL that fsspec knows (``s3://``, ``gs://``, ``file://``, ...): what is read is copied here, what is written goes there.

A run is uploaded when it is complete, its ``result.json`` last, so that it is there whole or not at all. One driver writes a study: it
keeps an object that it made on the condition that none was there, and renews it; one that has not been renewed for two minutes is of a
driver that died.
"""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradreg.folders import LOCK, FolderInUse, locked
from gradreg.study.executors.executor import ExecutorError

RESULT = "result.json"
_READ = (".json", ".jsonl", ".yaml", ".txt")
"""Endings of the files of a run that a study reads: weights stay where they are."""
_WHOLE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "memory")
"""Stores whose objects appear whole; elsewhere a file is written under another name and renamed."""
_RENEWED = 30.0
_DEAD = 120.0
"""Seconds between two renewals of a driver's object, and without one until it is taken for one of a driver that died."""


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL and not a path.

    >>> [is_url(text) for text in ("s3://bucket/study", "runs/mine", "C:/runs", "file:///shared/study")]
    [True, False, False, True]
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of ``url``, and the path in it.

    Raises:
        ModuleNotFoundError: fsspec, or the package that it needs for such URLs, is not installed.
        ValueError: it knows no such URLs.
    """
    import fsspec.core

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        found = re.search(r"[Ii]nstall (\w+)", str(error))
        raise ModuleNotFoundError(str(error), name=found[1] if found else error.name) from error
    except ValueError as error:
        raise ValueError(f"{url!r} must be a URL that fsspec knows, such as s3://bucket/study; {error}") from error


def uploaded(folder: Path, url: str) -> None:
    """Upload the files of a complete run, the result last."""
    store, path = file_system(url)
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and "checkpoints" not in file.relative_to(folder).parts]
    for file in sorted(found, key=lambda file: file.name == RESULT):
        _write(store, f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def _write(store: Any, path: str, data: bytes) -> None:
    store.makedirs(path.rpartition("/")[0], exist_ok=True)
    names = (store.protocol,) if isinstance(store.protocol, str) else store.protocol
    if any(name in _WHOLE for name in names):
        store.pipe_file(path, data)
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    store.pipe_file(temporary, data)
    store.mv(temporary, path)


class Mirror:
    """A study at a URL, and the copy of it that this process reads.

    Args:
        url: of the study.
        folder: for the copy.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url.rstrip("/"), folder
        self._store, self._path = file_system(self.url)
        self._pushed: dict[str, int] = {}

    def fetch(self, within: str = "") -> None:
        """Copy what is there, in the folder ``within`` or all of it, and not here yet."""
        start = f"{self._path}/{within}" if within else self._path
        self._store.invalidate_cache()
        try:
            there = self._store.find(start)
        except FileNotFoundError:
            return
        except Exception as error:  # of the store's client, which has its own
            raise ExecutorError(f"{self.url!r} must be a place that can be read; got {type(error).__name__}: {error}") from error
        wanted = {one: self.folder / one[len(self._path) :].lstrip("/") for one in there if one.endswith(_READ)}
        wanted = {one: here for one, here in wanted.items() if not here.is_file()}
        for here in {here.parent for here in wanted.values()}:
            here.mkdir(parents=True, exist_ok=True)
        if wanted:
            self._store.get(list(wanted), [str(here) for here in wanted.values()])
        self._pushed |= {here.name: here.stat().st_mtime_ns for here in wanted.values() if here.parent == self.folder}

    def push(self) -> None:
        """Write the study's own files, those outside its folders, as far as they have changed."""
        for file in self.folder.iterdir():
            if not file.is_file() or file.name == LOCK or self._pushed.get(file.name) == file.stat().st_mtime_ns:
                continue
            self._pushed[file.name] = file.stat().st_mtime_ns
            _write(self._store, f"{self._path}/{file.name}", file.read_bytes())

    @contextmanager
    def locked(self) -> Generator[None]:
        """A context in which no other driver writes the study.

        Raises:
            FolderInUse: another one does; naming its host, its process and since when.
            ExecutorError: the place cannot be written to.
        """
        place, own = f"{self._path}/{LOCK}", self._signature()
        self._take(place, own)
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(_RENEWED):
                with suppress(Exception):  # of the network: the next one may go through
                    _write(self._store, place, _json({**own, "renewed": time.time()}))

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(FileNotFoundError):
                self._store.rm_file(place)

    def _take(self, place: str, own: dict[str, Any]) -> None:
        try:
            self._store.makedirs(self._path, exist_ok=True)
            self._store.pipe_file(place, _json(own), mode="create")
            return
        except FileExistsError:
            pass
        except Exception as error:  # of the store's client, which has its own
            if not self._store.exists(place):
                raise ExecutorError(f"{self.url!r} must be a place that can be written to; got {type(error).__name__}: {error}") from error
        held = json.loads(self._store.cat_file(place))
        here = held["host"] == socket.gethostname() and not Path(f"/proc/{held['pid']}").exists() and Path("/proc/self").exists()
        if not here and time.time() - held["renewed"] < _DEAD:
            raise FolderInUse(
                f"--out must name a place that no other process writes; got {self.url!r}, written by process {held['pid']} on "
                f"{held['host']} since {held['since']}. Wait until that ends; if it died, two minutes."
            )
        _write(self._store, place, _json(own))

    def _signature(self) -> dict[str, Any]:
        now = time.time()
        since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now))
        return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "renewed": now}


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode()


@contextmanager
def opened(out: Path | str, *, reading: bool = False) -> Generator[tuple[Path, Mirror | None]]:
    """A context with the folder of a study, which is locked, and its mirror if it is at a URL.

    Args:
        out: the folder, or the URL.
        reading: nothing will be written, and another process may write.

    Raises:
        FolderInUse: another process writes it.
    """
    if not is_url(str(out)):
        if reading:
            yield Path(out), None
            return
        with locked(Path(out), purpose="--out"):
            yield Path(out), None
        return
    with tempfile.TemporaryDirectory(prefix="gradreg-") as place:
        mirror = Mirror(str(out), Path(place) / "study")
        mirror.folder.mkdir()
        if reading:
            mirror.fetch()
            yield mirror.folder, mirror
            return
        with mirror.locked():
            mirror.fetch()
            try:
                yield mirror.folder, mirror
            finally:
                mirror.push()
