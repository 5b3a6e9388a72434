"""A run of a study as a work for an executor: in its own folder, or at a URL; what it leaves is there whole or not at all."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from gradreg import files
from gradreg.folders import FolderInUse, locked
from gradreg.study.functions import ERROR, describe_failure
from gradreg.study.history import read_history
from gradreg.study.plan import Job
from gradreg.study.tasks import TaskError, Variant
from gradreg.study.urls import is_url, uploaded

_AGAIN = 1.0
"""Seconds until a run's folder that another process writes is looked at again."""


@dataclass(frozen=True)
class JobRun:
    """A run, as a work.

    Args:
        job: the run.
        runs: the folder of the study's runs, or its URL.
        shared: whether a process of an earlier driver may still be in the folder; its end is then waited for.
    """

    job: Job
    runs: str
    shared: bool = False

    def __call__(self, on_progress: Callable[[float], None]) -> dict[str, Any]:
        """The result; of a run that failed ``{"error": its last line}``, with the traceback in its folder."""
        if is_url(self.runs):
            with tempfile.TemporaryDirectory(prefix="gradreg-") as folder:
                place = Path(folder) / self.job.folder
                result = outcome(self.job, place, on_progress)
                if "task_error" not in result:
                    uploaded(place, f"{self.runs}/{self.job.folder}")
                return result
        place = Path(self.runs) / self.job.folder
        with _alone_in(place) if self.shared else nullcontext():
            if self.shared and place.is_dir():
                ended = self.job.variant.result(place, self.job.seed, self.job.stretch)
                if ended is not None:  # which the process that was in the folder has just completed
                    return ended
            return outcome(self.job, place, on_progress)

    def configuration(self) -> list[Any]:
        """What is run, in plain values."""
        job = self.job
        return [dict(job.variant.settings), job.variant.source, job.seed, str(job.stretch)]


def outcome(job: Job, place: Path, on_progress: Callable[[float], None]) -> dict[str, Any]:
    """The result of ``job`` in the folder ``place``; of one that failed its last line, with the traceback in the folder."""
    files.make_directory(place, purpose="--out")
    try:
        result = job.variant.run(place, job.seed, job.stretch, on_progress)
    except TaskError as error:
        return {"task_error": f"{job.name}, seed {job.seed}: {error}"}
    except Exception as error:
        files.write_text(place / ERROR, "".join(traceback.format_exception(error)))
        return {"error": describe_failure(error)}
    (place / ERROR).unlink(missing_ok=True)
    return result


def passing(variant: Variant, seed: int, stretch: Fraction) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result and the history of a run in a folder that is thrown away; an error is returned as its last line."""
    with tempfile.TemporaryDirectory(prefix="gradreg-") as folder:
        place = files.make_directory(Path(folder) / "run", purpose="TMPDIR")
        try:
            return variant.run(place, seed, stretch, lambda share: None), read_history(place)
        except Exception as error:
            return {"error": describe_failure(error)}, []


@contextmanager
def _alone_in(place: Path) -> Generator[None]:
    """A context in which no other process carries out the run of this folder."""
    while True:
        try:
            with locked(place.with_name(f"{place.name}.running"), purpose="--out"):
                yield
            return
        except FolderInUse:
            time.sleep(_AGAIN)
