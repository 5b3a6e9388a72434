"""Checkpoint folders: atomic, checked for damage, and only the newest few kept.

A checkpoint is ``step-000000001200/``: its files, and ``manifest.json`` with the size and BLAKE2 digest of each. It is filled under a
temporary name, flushed to disk, and renamed, so that a process killed at any moment leaves a complete checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradreg import files

MANIFEST = "manifest.json"
_FINISHED = re.compile(r"step-(\d{12})")
_UNFINISHED = ".unfinished"


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they are; created when the first is written.
        keep: how many of the newest are kept, ≥ 1.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    @contextmanager
    def new(self, step: int) -> Iterator[Path]:
        """An empty folder to fill for the checkpoint of ``step``; it is finished when the block ends, and removed if the block raises."""
        files.make_directory(self.folder, purpose="the run's folder")
        for leftover in self.folder.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(leftover)
        unfinished = self.folder / f"step-{step:012d}{_UNFINISHED}"
        try:
            unfinished.mkdir()
            yield unfinished
            self._finish(unfinished)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def all(self) -> list[Path]:
        """Every checkpoint, whole or damaged, the newest first."""
        found = [path for path in self.folder.glob("step-*") if _FINISHED.fullmatch(path.name)] if self.folder.is_dir() else []
        return sorted(found, reverse=True)

    def whole(self, report: Callable[[str], None]) -> Iterator[Path]:
        """The undamaged checkpoints, the newest first; ``report`` is called with what is wrong with each damaged one."""
        found = self.all()
        for path, left in zip(found, range(len(found) - 1, -1, -1), strict=True):
            damage = _damage(path)
            if damage is None:
                yield path
            else:
                then = "going back to the one before it" if left else "none is left: the run starts again from its beginning"
                report(f"checkpoint {path.name} is damaged ({damage}); {then}.")

    def _finish(self, unfinished: Path) -> None:
        """Flush every file, write the manifest, rename the folder, and remove the oldest beyond ``keep``."""
        listing = {path.name: _description(path) for path in sorted(unfinished.iterdir())}
        for name in listing:
            files.flush(unfinished / name)
        files.write_json(unfinished / MANIFEST, {"format": 1, "files": listing})
        files.flush(unfinished)
        finished = unfinished.with_name(unfinished.name.removesuffix(_UNFINISHED))
        if finished.exists():  # a damaged one, skipped when the run resumed from an earlier one
            shutil.rmtree(finished)
        unfinished.rename(finished)
        files.flush(self.folder)
        for old in self.all()[self.keep :]:
            shutil.rmtree(old)


def _description(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, "blake2b").hexdigest()}


def _damage(checkpoint: Path) -> str | None:
    """A description of what is wrong with a checkpoint; None if nothing is."""
    try:
        if not (checkpoint / MANIFEST).is_file():
            raise FileNotFoundError  # nor is it waited for what a FIFO will say
        listing = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in listing.items():
            path = checkpoint / os.path.basename(name)
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if _description(path) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}"
    return None
